"""Eigenvalues and traces beside float64 and beside PyHessian's formulas: how exact, and in what time?

    python tests/benchmarks/curvature.py exact --peer_python=<a Python with torch and transformers>
    python tests/benchmarks/curvature.py time --model=vit --images=8 --peer_python=...
    python tests/benchmarks/curvature.py time --model=vit --images=8 --rule=residual --products=2000 --rounds=1 --peer_python=...
    python tests/benchmarks/curvature.py trace --peer_python=...

`exact`: the ResNet-20 of the data folder on its first exact CIFAR-10 training images, beside torch in float64. `time`: the top
eigenvalues of the same loss by Lanczos until their residuals are within the tolerance, and by power iteration until PyHessian's
rule ends it, or with `--rule=residual` until its true residuals are within the same tolerance; both sides have the same weights,
in each run (`--seed`), and take turns. `trace`: where PyHessian's rule ends the trace, and how far from it.

Results: tests/benchmarks/results/curvature.md.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import real_models
import torch_process
from PIL import Image

from robust_vit import classifier, command_line, curvature, models, trees
from robust_vit import data as datasets
from robust_vit.studies import training_loss

LOSS = training_loss.MeanLoss()
TOP, STEPS, TOLERANCE = 5, 100, 1e-3
KEY = jax.random.key(0)


def _training_images(folder: pathlib.Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    source = datasets.open_source("cifar10_exact", split="train", data_dir=folder / "tfds")
    examples = [source[index] for index in range(count)]
    images = np.stack([example["image"] for example in examples]).astype(np.float32) / 255
    return images, np.asarray([example["label"] for example in examples], np.int32)


def _large_images(folder: pathlib.Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    paths = sorted((folder / "imagenet_samples" / "images").glob("*.jpg"))[:count]
    images = [np.asarray(Image.open(path).convert("RGB").resize((224, 224)), np.float32) / 255 for path in paths]
    return np.stack(images), np.arange(count, dtype=np.int32)


class Case:
    """A model with a batch on both sides, with the same weights."""

    def __init__(self, flags: argparse.Namespace, torch: torch_process.Torch, work: pathlib.Path):
        self.torch, self.work = torch, work
        given: dict = {}
        if flags.model == "resnet":
            images, labels = _training_images(flags.data, flags.images)
            model = real_models.resnet20(flags.data)
            spec, module, weights = model.spec, model.module, flags.data / "weights" / "resnet20-12fca82f.npz"
        else:
            images, labels = _large_images(flags.data, flags.images)
            spec = classifier.ImageSpec(size=(224, 224))
            module, weights = models.build("vit", num_classes=1000, size="Ti"), work / "vit.npz"
            given = {key: getattr(module, key) for key in ("width", "depth", "heads", "mlp_width", "patch")}
            given |= {"size": 224, "classes": 1000}
        # Both sides see normalised images: what is timed is the network.
        images = np.asarray(spec.normalize(jnp.asarray(images)))
        spec = classifier.ImageSpec(size=spec.size, mean=(0.0,) * 3, std=(1.0,) * 3)
        files = {"images": work / "images.npy", "labels": work / "labels.npy"}
        np.save(files["images"], images)
        np.save(files["labels"], labels)
        files = {name: str(path) for name, path in files.items()}
        self.request = {"model": flags.model, "given": given, "weights": str(weights), "seed": flags.seed, **files}
        found = self.build()
        shapes = jax.eval_shape(lambda key: models.init(module, spec, key), KEY)
        self.empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        self.weights = weights
        self.model = classifier.Classifier(models.load_weights(weights, self.empty), module, spec)
        self.batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
        self.loss = LOSS(self.model.params, self.batch, self.model)
        print(f"<!-- loss: {float(self.loss):.6f}, torch's {found['loss']:.6f} -->", flush=True)

    def build(self, *, double: bool = False) -> dict:
        """The network on torch's side, in single or double precision."""
        return self.torch.ask(do="build", double=double, **self.request)

    def eigenvalues(self, starts: list[str], rule: str, products: int) -> dict:
        """Power iteration on torch's side under PyHessian's rule, or its loop until the true residual is within the tolerance."""
        steps = STEPS if rule == "quotient" else products
        options = {"tolerance": TOLERANCE, "steps": steps, "rule": rule, "products": products}
        return self.torch.ask(do="eigenvalues", starts=starts, **options)

    def operator(self) -> curvature.Operator:
        """The Hessian of the mean cross-entropy of the batch."""
        return curvature.hessian(LOSS, self.model.params, self.batch, self.model)

    def vectors(self, count: int, *, signs: bool) -> tuple[list[str], list]:
        """Random vectors under torch's names in files, and the same as this library's pytrees."""
        arrays, draw = np.load(self.weights), np.random.default_rng(1)
        paths, found = [], []
        for index in range(count):
            path = self.work / f"{'signs' if signs else 'normal'}{index}.npz"
            make = (lambda shape: draw.choice([-1.0, 1.0], shape)) if signs else draw.standard_normal
            named = {name: make(arrays[name].shape).astype(np.float32) for name in arrays.files}
            np.savez(path, **named)
            paths.append(str(path))
            found.append(models.load_weights(path, self.empty)["params"])
        return paths, found


def exact(case: Case, probes: int, rank: int) -> None:
    """The table of agreement."""
    paths, starts = case.vectors(TOP, signs=False)
    sign_paths, signs = case.vectors(probes, signs=True)
    operator = case.operator()
    found = curvature.lanczos(operator, KEY, rank=rank, top=TOP, tolerance=1e-6, check_every=10)
    power = curvature.power_iteration(
        operator, KEY, top=TOP, steps=STEPS, tolerance=TOLERANCE, rule="pyhessian", starts=_stacked(starts)
    )
    forms = [float(trees.dot(vector, operator(vector))) for vector in signs]
    theirs = case.eigenvalues(paths, "quotient", TOP * STEPS)
    their_forms = case.torch.ask(do="quadratic_forms", vectors=sign_paths)["values"]
    case.build(double=True)
    reference = case.torch.ask(do="lanczos", start=paths[0], steps=rank, top=TOP)
    wide_forms = case.torch.ask(do="quadratic_forms", vectors=sign_paths)["values"]
    print("| λ | torch in float64, Lanczos | its residual | Lanczos, float32 | relative difference |", end="")
    print(" PyHessian's rule, ours | torch's | relative difference | residual of that rule, of λ |")
    print("|---|---|---|---|---|---|---|---|---|")
    for index in range(TOP):
        value, ours = reference["values"][index], found.values[index]
        ruled, torch = power.values[index], theirs["values"][index]
        cells = (
            f"{value:.6f}",
            f"{reference['residuals'][index]:.1e}",
            f"{ours:.6f}",
            f"{abs(ours / value - 1):.1e}",
            f"{ruled:.5f}",
            f"{torch:.5f}",
            f"{abs(ruled / torch - 1):.1e}",
            f"{power.residuals[index] / abs(ruled):.1e}",
        )
        print(f"| {index + 1} | " + " | ".join(cells) + " |")
    trace, other, wide_trace = (float(np.mean(values)) for values in (forms, their_forms, wide_forms))
    error = np.std(wide_forms, ddof=1) / np.sqrt(probes)
    print(
        f"\nTrace over the same {probes} vectors of signs: float64 {wide_trace:.6f} (standard error {error:.3g}), float32 ",
        end="",
    )
    print(f"{trace:.6f} ({abs(trace / wide_trace - 1):.1e}), torch's {other:.6f} ({abs(trace / other - 1):.1e}).")
    print(
        f"Products: {found.applications} by Lanczos, {power.applications} and {theirs['products']} by PyHessian's rule."
    )


def trace(case: Case, most: int, samples: int, seed: int) -> None:
    """Where PyHessian's rule ends Hutchinson's estimate, in one order of the vectors and in others, beside Hutch++."""
    forms = np.asarray(case.torch.ask(do="signs", seed=seed, count=most)["values"])
    reference = curvature.trace(case.operator(), KEY, samples=samples, method="hutch++")
    print(
        f"Trace: {reference.value:.3f} by {reference.applications} products of Hutch++ (standard error "
        f"{reference.standard_error:.2g}); {forms.mean():.3f} by {most} of Hutchinson ({forms.std(ddof=1) / most**0.5:.2g})."
    )
    count = stopping(forms)
    if count is None:
        print(f"PyHessian's rule does not stop within {most} vectors.")
    else:
        error = abs(forms[:count].mean() / reference.value - 1)
        print(f"PyHessian's rule stops after {count} vectors, {error:.1%} away.")
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(forms) for _ in range(1000)]
    counts = [stopping(order) for order in orders]
    stopped = [order[:count].mean() for order, count in zip(orders, counts, strict=True) if count is not None]
    print(f"Of 1000 orders of these vectors {len(stopped)} stop", end="")
    if stopped:
        errors = np.asarray(stopped) / reference.value - 1
        median = np.median([count for count in counts if count is not None])
        print(
            f", after {median:.0f} (median): {np.sqrt(np.mean(errors**2)):.1%} away (root mean square), "
            f"{np.mean(np.abs(errors) > 0.01):.0%} of them by more than 1 %",
            end="",
        )
    print(".")


def stopping(forms: np.ndarray) -> int | None:
    """After how many terms their running mean changes by less than the tolerance; None where it never does."""
    means = np.cumsum(forms) / np.arange(1, len(forms) + 1)
    still = np.abs(np.diff(means)) / (np.abs(means[:-1]) + 1e-6) < TOLERANCE
    return int(np.argmax(still)) + 2 if still.any() else None


def _stacked(vectors: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *vectors)


def _rows(vectors):
    return [jax.tree.map(lambda leaf, i=index: leaf[i], vectors) for index in range(TOP)]


def timed(case: Case, rounds: int, rank: int, rule: str, most: int) -> None:
    """The table of times: both sides in turns, the first call of ours with its compilation.

    The batch is resident and keeps what does not depend on the vector, on both sides.
    """
    paths, _ = case.vectors(TOP, signs=False)
    words = "PyHessian's rule" if rule == "quotient" else "PyHessian's loop to the same residual"
    print(
        f"| round | Lanczos: s | products | largest true residual, of λ | {words}: s | products | largest, of λ | values "
        "| time ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for number in range(rounds):
        begin = time.perf_counter()
        options = {"rank": rank, "top": TOP, "tolerance": TOLERANCE, "check_every": 5}
        found = curvature.lanczos(curvature.linearise(case.operator()), KEY, **options, vectors=True)
        jax.block_until_ready(found.vectors)
        seconds = time.perf_counter() - begin
        residuals = [
            trees.norm(trees.add(case.operator()(vector), vector, -value))
            for value, vector in zip(found.values, _rows(found.vectors), strict=True)
        ]
        theirs = case.eigenvalues(paths, rule, most)
        ours_worst = np.max(np.asarray(residuals) / np.abs(found.values))
        theirs_worst = np.max(np.asarray(theirs["residuals"]) / np.abs(theirs["values"]))
        cells = (
            str(number + 1) + (" (with compilation)" if number == 0 else ""),
            f"{seconds:.1f}",
            found.applications,
            f"{ours_worst:.1e}",
            f"{theirs['seconds']:.1f}",
            theirs["products"],
            f"{theirs_worst:.1e}",
            f"{len(theirs['values'])} of {TOP}",
            f"{seconds / theirs['seconds']:.2f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        print(f"<!-- ours {np.round(found.values, 4)}, PyHessian's {np.round(theirs['values'], 4)} -->", flush=True)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("exact", "time", "trace"))
    parser.add_argument("--model", choices=("resnet", "vit"), default="resnet")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rank", type=int, default=60)
    parser.add_argument("--probes", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--rule", choices=("quotient", "residual"), default="quotient", help="what ends the peer's loop"
    )
    parser.add_argument("--products", type=int, default=TOP * STEPS, help="of the peer's loop at most, in all")
    parser.add_argument("--signs", type=int, default=200, help="vectors of the trace at most")
    parser.add_argument("--samples", type=int, default=240, help="products of Hutch++ beside it")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and of the trace's vectors")
    parser.add_argument("--data", type=pathlib.Path, default=os.environ.get("ROBUST_VIT_DATA", "../shared/data"))
    parser.add_argument("--peer_python", required=True)
    flags = parser.parse_args()
    flags.data = pathlib.Path(flags.data)
    if flags.table != "time" and flags.model != "resnet":
        parser.error(f"{flags.table} is of the ResNet-20")
    command_line.configure_jax()
    torch = torch_process.Torch(flags.peer_python, "curvature_peer.py")
    try:
        print(f"<!-- JAX {jax.__version__}; {torch.ask(do='version')} -->")
        with tempfile.TemporaryDirectory() as work:
            case = Case(flags, torch, pathlib.Path(work))
            if flags.table == "exact":
                exact(case, flags.probes, flags.rank)
            elif flags.table == "trace":
                trace(case, flags.signs, flags.samples, flags.seed)
            else:
                timed(case, flags.rounds, flags.rank, flags.rule, flags.products)
    finally:
        torch.close()


if __name__ == "__main__":
    main()
