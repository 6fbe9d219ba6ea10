"""Attacks by queries against torchattacks and foolbox on the same weights and images.

    python tests/benchmarks/query_attacks.py square --peer_python=PYTHON          robust accuracy at equal queries, over seeds
    python tests/benchmarks/query_attacks.py hop_skip_jump --peer_python=PYTHON   median distance and the queries that it took
    python tests/benchmarks/query_attacks.py cost                                 a step beside the forward passes in it

The model is the ResNet-20, the images are exact CIFAR-10, of the data folder (`ROBUST_VIT_DATA` or `--data`). The peer's Python
needs torch, torchattacks, foolbox and `transformers`. Results: tests/benchmarks/results/query_attacks.md.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
import real_models
import torch_process

from robust_vit import attacks, command_line
from robust_vit.attacks import skeleton
from robust_vit.metrics import statistics

SLOTS = 32
# Norm and radius of each row of the comparison of Square.
BALLS = (("linf", 1 / 255), ("linf", 2 / 255), ("l2", 0.25), ("l2", 0.5))


def square(
    model, examples: dict[str, np.ndarray], peer: torch_process.Torch, *, norms: list[str], queries: int, seeds: int
) -> None:
    """A line a ball: images left right by each side, seed by seed; the images' shares of seeds compared, paired."""
    for norm, epsilon in ((norm, epsilon) for norm, epsilon in BALLS if norm in norms):
        attack = attacks.build("square", epsilon=epsilon, norm=norm, queries=queries)
        ours, theirs, seconds = [], [], []
        for seed in range(seeds):
            begin = time.perf_counter()
            found = attacks.run(attack, model, examples, slots=SLOTS, seed=seed, stride=20)
            answer = peer.ask(do="square", norm=norm, epsilon=epsilon, queries=queries, seed=seed)
            seconds.append((time.perf_counter() - begin - answer["seconds"], answer["seconds"]))
            ours.append(~found.success)
            theirs.append(np.asarray(answer["standing"]))
        test = statistics.sign_flip(np.mean(theirs, axis=0), np.mean(ours, axis=0))
        size = f"{epsilon * 255:g}/255" if norm == "linf" else f"{epsilon:g}"
        counts = [", ".join(str(bits.sum()) for bits in side) for side in (ours, theirs)]
        least = np.min(seconds, axis=0)
        cells = (norm, size, queries, *counts, f"{np.mean(ours) - np.mean(theirs):+.2%}", f"{test.p_value:.2f}")
        print(f"| {' | '.join(map(str, cells))} | {least[0]:.0f} | {least[1]:.0f} |", flush=True)


def hop_skip_jump(
    model,
    examples: dict[str, np.ndarray],
    peer: torch_process.Torch,
    *,
    norms: list[str],
    rounds: list[int],
    right: np.ndarray,
) -> None:
    """A line a norm and number of rounds: the median distance of the images that were right, and queries an image."""
    for norm in norms:
        for count in rounds:
            attack = attacks.build("hop_skip_jump", norm=norm, rounds=count)
            begin = time.perf_counter()
            found = attacks.run(attack, model, examples, slots=SLOTS, stride=20)
            took = time.perf_counter() - begin
            answer = peer.ask(do="hop_skip_jump", norm=norm, steps=count, seed=0)
            distances = found.distance[right], np.asarray(answer["distances"])[right]
            failed = (~found.success).sum(), np.sum(answer["standing"])
            asked = found.forward_passes[right].mean(), answer["queries"]
            cells = [f"{np.median(each):.4f}" for each in distances] + [f"{each:,.0f}" for each in asked]
            cells += [str(each) for each in failed] + [f"{took:.0f}", f"{answer['seconds']:.0f}"]
            print(f"| {norm} | {count} | {' | '.join(cells)} |", flush=True)


def cost(model, examples: dict[str, np.ndarray]) -> None:
    """A line an attack: a step, and the forward passes that it holds, alone; milliseconds, least of several."""
    part = {name: array[:SLOTS] for name, array in examples.items()}
    keys = attacks.example_keys(0, part["row"])
    forward = jax.jit(lambda network, images: network(images))
    advance = jax.jit(skeleton.advance)
    for name, options in (
        ("square", {"epsilon": 8 / 255}),
        ("square", {"epsilon": 0.5, "norm": "l2"}),
        ("hop_skip_jump", {}),
        ("nes", {"epsilon": 8 / 255}),
        ("spsa", {"epsilon": 8 / 255}),
    ):
        attack = attacks.build(name, **options)
        state = skeleton.start(attack, keys, part["image"], part["label"])
        times = attack.step_passes[0]
        wide = np.tile(part["image"], (times, 1, 1, 1))
        best = {"step": np.inf, "forward": np.inf}
        for _ in range(max(3, 40 // times)):
            begin = time.perf_counter()
            # The state moves on, so that each phase has its share.
            state = jax.block_until_ready(advance(state, 0, attack, model))
            best["step"] = min(best["step"], time.perf_counter() - begin)
            begin = time.perf_counter()
            jax.block_until_ready(forward(model, wide))
            best["forward"] = min(best["forward"], time.perf_counter() - begin)
        cells = (f"{1e3 * value:.1f}" for value in best.values())
        norm = attack.norm.name
        print(
            f"| {name} | {norm} | {SLOTS} x {times} | {' | '.join(cells)} | {best['step'] / best['forward']:.2f} |",
            flush=True,
        )


COLUMNS = {
    "square": (
        "norm, ε, queries, left right by ours (a seed each), by torchattacks, difference, p (paired over images), ours: s, "
        "theirs: s"
    ),
    "hop_skip_jump": (
        "norm, rounds, median distance: ours, foolbox, queries an image: ours, foolbox, failed: ours, foolbox, ours: s, "
        "foolbox: s"
    ),
    "cost": "attack, norm, images x queries, step: ms, forward: ms, ratio",
}


def main() -> None:
    """Prints one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=COLUMNS)
    parser.add_argument("--rows", type=int, default=128, help="images with a smaller row")
    parser.add_argument("--queries", type=int, default=500, help="of Square")
    parser.add_argument("--seeds", type=int, default=3, help="of Square")
    parser.add_argument("--norms", nargs="+", default=["linf", "l2"], choices=("linf", "l2"))
    parser.add_argument("--rounds", nargs="+", type=int, default=[5, 20], help="of HopSkipJump")
    parser.add_argument("--peer_python", default=sys.executable, help="a Python with torch, torchattacks and foolbox")
    parser.add_argument("--data", default=os.environ.get("ROBUST_VIT_DATA", "../shared/data"))
    flags = parser.parse_args()
    command_line.configure_jax()
    examples = real_models.images(flags.data, rows=flags.rows)
    model = real_models.resnet20(flags.data)
    columns = COLUMNS[flags.table].split(", ")
    header = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    if flags.table == "cost":
        print(header)
        cost(model, examples)
        return
    peer = torch_process.Torch(flags.peer_python, "query_peers.py")
    print(f"<!-- JAX {jax.__version__}; {peer.ask(do='version')} -->\n{header}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("image", "label"):
            np.save(f"{folder}/{name}.npy", examples[name])
        weights = str(pathlib.Path(flags.data).resolve() / "weights" / "resnet20-12fca82f.npz")
        arrays = {"images": f"{folder}/image.npy", "labels": f"{folder}/label.npy"}
        right = np.asarray(peer.ask(do="build", model="resnet20", weights=weights, **arrays)["standing"])
    if flags.table == "square":
        square(model, examples, peer, norms=flags.norms, queries=flags.queries, seeds=flags.seeds)
    else:
        hop_skip_jump(model, examples, peer, norms=flags.norms, rounds=flags.rounds, right=right)
    peer.close()


if __name__ == "__main__":
    main()
