"""How fast the models are; prints a table.

    python tests/benchmarks/throughput.py --peer_python=PYTHON --resnet_weights=resnet20-12fca82f.npz
    python tests/benchmarks/throughput.py --suite=accelerator [--models=...] [--batches=...] [--minutes=...]

The first, `--suite=cpu`, prints every row in one run: about 12 minutes on two cores, three calls of each form. It compares
forward, input gradient, parameter gradient and Hessian-vector product (forward over reverse), float32, with torch on the same
weights: torch lives in a process of its own (`--peer_python`), idle while this one computes, and the two take turns. Torch's
attention is the faster one of `transformers`' eager and sdpa, which the table names. Each side runs the whole batch at once, and
slice by slice. Beside each row stand the time of its matrix products and convolutions alone in XLA (of the whole batch, and of a
slice times the number of slices), the count of their operations, and the time to trace and compile, without a cache. Freed
memory is kept, as `robust_vit.main` does it (`robust_vit.allocation`).

The second reports the share of the machine's own matrix-product rate that training, forward pass, gradient, steps of attacks and
Hessian-vector product reach in bfloat16: see `accelerator.py`.

`--tiny` shrinks all models: a check that the script works, not a measurement.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import sys
import tempfile
import time

import accelerator
import jax
import jax.numpy as jnp
import numpy as np
import passes
import torch_process

from robust_vit import allocation, classifier, loops, models

# Model, its options, images, side, classes, images at a time of the sliced rows.
ROWS = {
    "ViT-S/16": ("vit", {"size": "S"}, 8, 224, 1000, 4),
    "ViT-Ti/16": ("vit", {"size": "Ti"}, 64, 224, 1000, 8),
    "ResNet-20": ("resnet", {"depth": 20}, 128, 32, 10, 16),
}
TINY_ROWS = {
    "ViT-tiny": ("vit", {"width": 32, "depth": 1, "heads": 2, "patch": 4}, 4, 8, 10, 2),
    "ResNet-20": ("resnet", {"depth": 20}, 4, 8, 10, 2),
}
HEADER = (
    "| model, batch | pass | ours, ms | ours in slices | torch | torch in slices | ratio | best to best | products alone, ms "
    "| products in slices | GFLOP | compile, s |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


class Ours:
    """A row's model with the weights that torch has, and its passes over the whole batch and in slices."""

    def __init__(self, row: tuple, weights: str, batch: tuple):
        name, given, _, side, classes, self.size = row
        self.module = models.build(name, num_classes=classes, **given)
        spec = classifier.ImageSpec(size=(side, side), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
        shapes = jax.eval_shape(lambda key: models.init(self.module, spec, key), jax.random.key(0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        self.variables = models.load_weights(weights, zeros)
        self.vector = passes.like(self.variables["params"])
        self.batch = batch

    def compile(self, name: str) -> tuple[passes.Pass, float]:
        """A pass, and how long tracing and compiling it takes from nothing."""
        function = passes.Pass(self.module, name)
        begin = time.perf_counter()
        self.compiled = jax.jit(function).lower(self.batch, self.variables, self.vector).compile()
        return function, time.perf_counter() - begin

    def whole(self):
        """The pass over the batch at once."""
        return self.compiled(self.batch, self.variables, self.vector)

    def sliced(self, function: passes.Pass):
        """The pass over a slice of the batch after the other, as attacks and curvature do it that are told a slice."""
        if function.name in ("forward", "input_gradient"):
            return loops.concatenate(function, self.batch, self.variables, self.vector, size=self.size)
        return loops.accumulate(function, loops.split(self.batch, self.size), self.variables, self.vector)


def compare(
    rows: dict, chosen: list[str], torch: torch_process.Torch, *, rounds: int, calls: int, resnet_weights: str | None
) -> None:
    """Prints a line for each pass of each row."""
    for label, row in rows.items():
        name, _, count, side, classes, size = row
        draw = np.random.default_rng(0)
        images = draw.standard_normal((count, side, side, 3)).astype(np.float32)
        labels = draw.integers(0, classes, count).astype(np.int32)
        with tempfile.TemporaryDirectory() as folder:
            files = {each: f"{folder}/{each}.npy" for each in ("images", "labels")}
            np.save(files["images"], images)
            np.save(files["labels"], labels)
            weights = f"{folder}/weights.npz"
            if name == "resnet" and resnet_weights:
                weights = resnet_weights
            found = torch.ask(do="build", model=name, given=_shape(row), weights=weights, **files)
            ours = Ours(row, weights, (jnp.asarray(images), jnp.asarray(labels)))
        for each in chosen:
            _line(label, each, ours, torch, found["variants"], size, count, rounds, calls)


def _line(label, name, ours, torch, variants, size, count, rounds, calls):
    function, compile_time = ours.compile(name)
    if name == "forward":
        theirs = np.asarray(torch.ask(do="logits", variant=variants[0])["logits"])
        worst = np.abs(np.asarray(ours.whole()) - theirs).max() / np.abs(theirs).max()
        print(f"<!-- {label}: logits differ by {worst:.1e} of the largest -->", flush=True)
        if not worst < 1e-4:
            sys.exit(
                f"{label}: logits differ from torch's by {worst:.1e} of the largest, so the models are not the same."
            )
    request = {"do": "time", "pass": name}
    tried = {variant: torch.ask(**request, variant=variant, slice=None, calls=1) for variant in variants}
    tried = {variant: answer["seconds"] for variant, answer in tried.items() if "seconds" in answer}
    fastest = min(tried, key=tried.get)
    functions = {"ours": ours.whole, "ours in slices": lambda: ours.sliced(function)}
    times = {key: [] for key in (*functions, "torch", "torch in slices")}
    for one in functions.values():
        passes.seconds(one, 1)
    for _ in range(rounds):
        for key, one in functions.items():
            times[key] += passes.seconds(one, calls)
        for key, part in (("torch", None), ("torch in slices", size)):
            times[key] += torch.ask(**request, variant=fastest, slice=part, calls=calls)["seconds"]
    least = {key: min(values) for key, values in times.items()}
    best = min(least["ours"], least["ours in slices"]) / min(least["torch"], least["torch in slices"])
    arguments = (ours.batch, ours.variables, ours.vector)
    slice_of = (jax.tree.map(lambda leaf: leaf[:size], ours.batch), *arguments[1:])
    cells = (
        f"{label}, {count}",
        name.replace("_", " "),
        *(passes.summary(times[key]) for key in functions),
        f"{passes.summary(times['torch'])} {fastest}".strip(),
        passes.summary(times["torch in slices"]),
        f"{least['ours'] / least['torch']:.2f}",
        f"{best:.2f}",
        f"{1e3 * passes.floor(function, *arguments):,.0f}",
        f"{1e3 * count / size * passes.floor(function, *slice_of):,.0f}",
        f"{passes.flops(function, *arguments) / 1e9:,.1f}",
        f"{compile_time:.1f}",
    )
    print("| " + " | ".join(cells) + " |", flush=True)


def _shape(row: tuple) -> dict:
    """What torch's ViT is made from."""
    name, given, _, side, classes, _ = row
    if name != "vit":
        return {}
    module = models.build(name, num_classes=classes, **given)
    shared = {key: getattr(module, key) for key in ("width", "depth", "heads", "mlp_width", "patch")}
    return {**shared, "size": side, "classes": classes}


def _processor() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if pathlib.Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> None:
    """Reads the flags and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("cpu", "accelerator"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="shrunken models: checks the script")
    parser.add_argument("--models", type=_words, default=(), help="comma-separated; all by default")
    parser.add_argument("--passes", type=_words, default=(), help="comma-separated; all by default")
    parser.add_argument("--batches", type=_numbers, default=(), help="of the accelerator suite, comma-separated")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="of the accelerator suite; then no row is begun"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--calls", type=int, default=1, help="calls in a turn")
    parser.add_argument("--peer_python", default=sys.executable, help="a Python that has torch and transformers")
    parser.add_argument("--resnet_weights", help="an .npz of a trained ResNet-20; random weights without it")
    flags = parser.parse_args()
    on_cpu = flags.suite == "cpu"
    shrunken, full = (TINY_ROWS, ROWS) if on_cpu else (accelerator.TINY_ROWS, accelerator.ROWS)
    rows = shrunken if flags.tiny else full
    names = passes.PASSES if on_cpu else accelerator.PASSES
    for given, known in ((flags.models, rows), (flags.passes, names)):
        for word in given:
            if word not in known:
                parser.error(f"{word}: expected some of {', '.join(known)}")
    names = flags.passes or names
    allocation.keep_freed_memory()
    if not on_cpu:
        accelerator.report(
            tiny=flags.tiny, chosen=flags.models, names=names, batches=flags.batches, minutes=flags.minutes
        )
        return
    rows = {label: row for label, row in rows.items() if label in (flags.models or rows)}
    torch = torch_process.Torch(flags.peer_python, "peers.py")
    version = torch.ask(do="version")
    print(f"{_processor()}; jax {jax.__version__}, torch {version['torch']} ({version['threads']} threads)")
    print("Milliseconds: least / median." + f"\n\n{HEADER}", flush=True)
    compare(
        rows,
        names,
        torch,
        rounds=flags.rounds,
        calls=flags.calls,
        resnet_weights=flags.resnet_weights,
    )
    torch.close()


if __name__ == "__main__":
    main()
