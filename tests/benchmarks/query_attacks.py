"""Square against torchattacks on the same weights and images: robust accuracy at equal queries, over seeds.

    python tests/benchmarks/query_attacks.py --peer_python=PYTHON

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


COLUMNS = "norm, ε, queries, left right by ours (a seed each), torchattacks, difference, p (paired), ours: s, theirs: s"


def main() -> None:
    """Prints one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128, help="images with a smaller row")
    parser.add_argument("--queries", type=int, default=500, help="proposals after each start")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--norms", nargs="+", default=["linf", "l2"], choices=("linf", "l2"))
    parser.add_argument("--peer_python", default=sys.executable, help="a Python with torch, torchattacks and foolbox")
    parser.add_argument("--data", default=os.environ.get("ROBUST_VIT_DATA", "../shared/data"))
    flags = parser.parse_args()
    command_line.configure_jax()
    examples = real_models.images(flags.data, rows=flags.rows)
    model = real_models.resnet20(flags.data)
    columns = COLUMNS.split(", ")
    header = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    peer = torch_process.Torch(flags.peer_python, "query_peers.py")
    print(f"<!-- JAX {jax.__version__}; {peer.ask(do='version')} -->\n{header}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("image", "label"):
            np.save(f"{folder}/{name}.npy", examples[name])
        weights = str(pathlib.Path(flags.data).resolve() / "weights" / "resnet20-12fca82f.npz")
        arrays = {"images": f"{folder}/image.npy", "labels": f"{folder}/label.npy"}
        peer.ask(do="build", model="resnet20", weights=weights, **arrays)
    square(model, examples, peer, norms=flags.norms, queries=flags.queries, seeds=flags.seeds)
    peer.close()


if __name__ == "__main__":
    main()
