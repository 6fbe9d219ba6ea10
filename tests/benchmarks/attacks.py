"""Attacks against foolbox and torchattacks on the same weights and images, interleaved in one run: seconds and robust accuracy.

    python tests/benchmarks/attacks.py pgd --peer_python=PYTHON          PGD-40: all steps, and leaving at the first success
    python tests/benchmarks/attacks.py decisions --peer_python=PYTHON    PGD-40 on all 1,017 images at four radii
    python tests/benchmarks/attacks.py auto_attack --peer_python=PYTHON  AutoAttack standard on the 128 images with row < 128
    python tests/benchmarks/attacks.py steps                             a step of each attack beside one compiled input gradient
    python tests/benchmarks/attacks.py batches                           forward pass and input gradient over batch sizes

With `JAX_NUM_CPU_DEVICES=2` before a command, our side shares each batch between two devices; torch takes both cores as ever.

Weights and images are those of the data folder (`ROBUST_VIT_DATA` or `--data`): ResNet-20 and a ViT on exact CIFAR-10. The peer's
Python needs torch, torchattacks, foolbox and `transformers`. Results: tests/benchmarks/results/attacks.md.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
import real_models
import torch_process

from robust_vit import attacks, command_line, losses
from robust_vit import mesh as meshes
from robust_vit.attacks import skeleton

STEPS = 40
MODELS = {
    "resnet20": (real_models.resnet20, "resnet20-12fca82f.npz"),
    "vit": (real_models.vit, "smmk47_vit_cifar10.npz"),
}
# Images at a time, of us and of torch; each side the fastest of several that were tried.
SLICES = {"resnet20": (16, 128), "vit": (16, 64)}
# The radii at which PGD-40 leaves about half of the images right.
HALF = {"resnet20": 0.58 / 255, "vit": 0.54 / 255}
PEERS = ("foolbox", "torchattacks")
# The attacks whose step is timed, and their options; the tables that need no peer; the batches of one of them.
STEPPED = {
    "pgd": {"epsilon": 1 / 255},
    "apgd_ce": {"epsilon": 1 / 255},
    "apgd_t": {"epsilon": 1 / 255},
    "fab_t": {"norm": "linf"},
    "square": {"epsilon": 1 / 255},
    "fmn": {"norm": "linf"},
}
ALONE = {"steps", "batches"}
BATCHES = (4, 8, 16, 32, 64, 128)


def _attack(epsilon: float, *, early: bool, start: bool = True) -> attacks.Attack:
    return attacks.build(
        "pgd", epsilon=epsilon, steps=STEPS, relative_step=0.25, random_start=start, stop_on_success=early
    )


class Ours:
    """A model with the images, and our attacks on them."""

    def __init__(self, model: str, folder: str, examples: dict[str, np.ndarray]):
        self.mesh = meshes.make() if jax.device_count() > 1 else None
        self.model = MODELS[model][0](folder)
        if self.mesh is not None:
            self.model = jax.device_put(self.model, meshes.replicated(self.mesh))
        self.examples = examples

    def part(self, size: int, begin: int = 0) -> dict[str, jax.Array]:
        """As many examples on the devices; the first ones again after the last."""
        rows = np.arange(begin, begin + size) % len(self.examples["label"])
        return meshes.put_global(self.mesh, {name: array[rows] for name, array in self.examples.items()})

    def all_steps(self, epsilon: float, size: int) -> np.ndarray:
        """PGD-40, slice by slice, no image left early; which are still right."""
        attack = _attack(epsilon, early=False)
        standing, count = [], len(self.examples["label"])
        for begin in range(0, count, size):
            part = self.part(size, begin)
            keys = attacks.example_keys(0, part["row"])
            found = attack(self.model, keys, part["image"], part["label"])
            standing.append(~np.asarray(found.success))
        return np.concatenate(standing)[:count]

    def early(self, epsilon: float, slots: int) -> np.ndarray:
        """PGD-40 with refilled slots; which are still right."""
        attack = _attack(epsilon, early=True)
        return ~attacks.run(attack, self.model, self.examples, slots=slots, mesh=self.mesh).success

    def auto_attack(self, epsilon: float, slots: int) -> attacks.SuiteResult:
        """AutoAttack standard."""
        return attacks.auto_attack(self.model, self.examples, epsilon=epsilon, slots=slots, mesh=self.mesh)


def _timed(function, *arguments):
    begin = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - begin, found


def pgd(model: str, ours: Ours, peer: torch_process.Torch, rounds: int) -> None:
    """One line an epsilon: equal work, and early exit."""
    size, theirs = SLICES[model]
    count = len(ours.examples["label"])
    epsilon = HALF[model]
    seconds: dict[str, list[float]] = {"all": [], "early": [], **{name: [] for name in PEERS}}
    left = {}
    for number in range(rounds + 1):
        for name in PEERS:
            answer = peer.ask(do="pgd", library=name, epsilon=epsilon, size=theirs, count=count, start=True)
            left[name] = np.mean(answer["standing"])
            if number:
                seconds[name].append(answer["seconds"])
        for name, function in (("all", ours.all_steps), ("early", ours.early)):
            took, standing = _timed(function, epsilon, size)
            left[name] = standing.mean()
            if number:  # The first round compiles, and warms torch up.
                seconds[name].append(took)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min(middle[name] for name in PEERS)
    cells = [f"{middle[name]:.1f} ({left[name]:.1%})" for name in ("all", "early", *PEERS)]
    ratios = [f"{middle[name] / fastest:.2f}" for name in ("all", "early")]
    print(f"| {model} | {epsilon * 255:g}/255 | {count} | " + " | ".join([*cells, *ratios]) + " |", flush=True)


def auto_attack(model: str, ours: Ours, peer: torch_process.Torch, epsilon: float) -> None:
    """One line: AutoAttack standard of both."""
    size, theirs = SLICES[model]
    count = len(ours.examples["label"])
    answer = peer.ask(do="auto_attack", epsilon=epsilon, size=theirs, count=count)
    seconds, found = _timed(ours.auto_attack, epsilon, size)
    standing = np.asarray(answer["standing"])
    differ = found.row[found.robust != standing].tolist()
    print(
        f"| {model} | {epsilon * 255:g}/255 | {count} | {seconds:.1f} | {answer['seconds']:.1f} | "
        f"{seconds / answer['seconds']:.2f} | {found.robust.sum()} | {standing.sum()} | {differ or 'none'} |",
        flush=True,
    )


def decisions(model: str, ours: Ours, peer: torch_process.Torch) -> None:
    """Images that PGD-40 leaves right, ours and the peers', on all images at four radii."""
    size, theirs = SLICES[model]
    count = len(ours.examples["label"])
    for level in (0.125, 0.25, 0.5, 1.0):
        standing = ours.all_steps(level / 255, size)
        cells = []
        for name in PEERS:
            answer = peer.ask(do="pgd", library=name, epsilon=level / 255, size=theirs, count=count, start=True)
            cells += [f"{np.sum(answer['standing'])} ({np.sum(standing != np.asarray(answer['standing']))} differ)"]
        print(f"| {model} | {level:g}/255 | {standing.sum()} | " + " | ".join(cells) + " |", flush=True)


@jax.jit
def _forward(network, images):
    return network(images)


@jax.jit
def _gradient(network, images, labels):
    return jax.grad(lambda pixels: losses.cross_entropy(network(pixels), labels).sum())(images)


def _least(calls: Mapping[str, Callable], repeats: int) -> dict[str, float]:
    """Least milliseconds of each call, turn by turn; the first round compiles."""
    best = {name: np.inf for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            took, _ = _timed(lambda call=call: jax.block_until_ready(call()))
            if number:
                best[name] = min(best[name], 1e3 * took)
    return best


def steps(model: str, ours: Ours) -> None:
    """One line an attack: its step beside the forward pass and the compiled input gradient of the same batch."""
    part = ours.part(SLICES[model][0])
    images, labels = part["image"], part["label"]
    calls = {
        "forward pass": lambda: _forward(ours.model, images),
        "input gradient": lambda: _gradient(ours.model, images, labels),
    }
    advance = jax.jit(skeleton.by_device(skeleton.advance, images, ours.model))
    for name, options in STEPPED.items():
        attack = attacks.build(name, **options)
        state = skeleton.start(attack, attacks.example_keys(0, part["row"]), part["image"], part["label"])
        state = advance(state, 0, attack, ours.model)  # Some begin with a step of another kind.
        calls[name] = lambda attack=attack, state=state: advance(state, 1, attack, ours.model)
    best = _least(calls, 40)
    for name, took in best.items():
        print(f"| {model} | {len(labels)} | {name} | {took:.2f} | {took / best['input gradient']:.3f} |", flush=True)


def batches(model: str, ours: Ours) -> None:
    """One line a batch size: milliseconds an image of a forward pass and of an input gradient."""
    calls = {}
    for size in BATCHES:
        images, labels = (ours.part(size)[name] for name in ("image", "label"))
        calls["forward", size] = lambda images=images: _forward(ours.model, images)
        calls["gradient", size] = lambda images=images, labels=labels: _gradient(ours.model, images, labels)
    best = _least(calls, 15)
    for size in BATCHES:
        cells = [f"{best[name, size] / size:.2f}" for name in ("forward", "gradient")]
        print(f"| {model} | {size} | " + " | ".join(cells) + " |", flush=True)


COLUMNS = {
    "pgd": "model, ε, images, all steps: s (left), early exit, foolbox, torchattacks, all / best peer, early / best peer",
    "auto_attack": "model, ε, images, ours with compilation: s, torchattacks: s, ratio, left by ours, theirs, rows that differ",
    "decisions": "model, ε, ours, foolbox, torchattacks",
    "steps": "model, images, call, ms, of an input gradient",
    "batches": "model, images at a time, forward pass: ms an image, input gradient: ms an image",
}


def main() -> None:
    """Prints one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=COLUMNS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", type=int, help="images with a smaller row")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first images: a long table in parts")
    parser.add_argument(
        "--levels", nargs="+", type=float, default=[0.25, 0.5, 1.0], help="radii of AutoAttack in 255ths"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--peer_python", default=sys.executable, help="a Python that has torch, foolbox and torchattacks"
    )
    parser.add_argument("--data", default=os.environ.get("ROBUST_VIT_DATA", "../shared/data"))
    flags = parser.parse_args()
    command_line.configure_jax()
    examples = real_models.images(flags.data, rows=flags.rows or (128 if flags.table == "auto_attack" else 1017))
    examples = {name: array[flags.skip :] for name, array in examples.items()}
    peer = None
    with tempfile.TemporaryDirectory() as folder:
        if flags.table not in ALONE:
            for name in ("image", "label"):
                np.save(f"{folder}/{name}.npy", examples[name])
            peer = torch_process.Torch(flags.peer_python, "attack_peers.py")
            print(f"<!-- JAX {jax.__version__}; {peer.ask(do='version')} -->")
        columns = COLUMNS[flags.table].split(", ")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
        for model in flags.models:
            ours = Ours(model, flags.data, examples)
            if peer is not None:
                weights = str(pathlib.Path(flags.data).resolve() / "weights" / MODELS[model][1])
                arrays = {"images": f"{folder}/image.npy", "labels": f"{folder}/label.npy"}
                peer.ask(do="build", model=model, weights=weights, **arrays)
            if flags.table == "pgd":
                pgd(model, ours, peer, flags.rounds)
            elif flags.table == "auto_attack":
                for level in flags.levels:
                    auto_attack(model, ours, peer, level / 255)
            elif flags.table == "decisions":
                decisions(model, ours, peer)
            else:
                {"steps": steps, "batches": batches}[flags.table](model, ours)
    if peer is not None:
        peer.close()


if __name__ == "__main__":
    main()
