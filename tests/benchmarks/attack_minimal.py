"""Distances of the minimal attacks beside other libraries' on the same weights and images: prints a table.

    python tests/benchmarks/attack_minimal.py --data_dir=../shared/data --peer_python=<a Python with torch, adv-lib, autoattack>

ResNet-20 and the first exact CIFAR-10 test images, those it classifies as labelled, float32, same settings on both sides. The
other side runs in a process of its own: see `attack_minimal_peer.py`. Distances are in pixel units [0, 1].
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import tensorflow_datasets as tfds

from robust_vit import attacks, classifier, models

# Name of ours, norm, options of ours, library and its options.
ROWS = (
    ("deep_fool", "l2", {"steps": 50}, "adv_lib", {"steps": 50}),
    ("deep_fool", "linf", {"steps": 50}, "adv_lib", {"steps": 50}),
    ("ddn", "l2", {"steps": 100}, "adv_lib", {"steps": 100, "levels": None}),
    ("fmn", "linf", {"steps": 100, "loss": "margin"}, "adv_lib", {"steps": 100}),
    ("fmn", "l2", {"steps": 100, "loss": "margin"}, "adv_lib", {"steps": 100}),
    ("fmn", "l1", {"steps": 100, "loss": "margin"}, "adv_lib", {"steps": 100}),
    (
        "carlini_wagner",
        "l2",
        {"steps": 100, "rounds": 4, "start_weight": 0.1},
        "adv_lib",
        {"max_iterations": 100, "binary_search_steps": 4, "initial_const": 0.1},
    ),
    ("fab", "linf", {"steps": 20}, "autoattack", {"n_iter": 20}),
    ("fab", "l2", {"steps": 20}, "autoattack", {"n_iter": 20}),
    ("fab", "l1", {"steps": 20}, "autoattack", {"n_iter": 20}),
    ("fab_t", "linf", {"steps": 20, "targets": 3}, "autoattack", {"n_iter": 20, "n_target_classes": 3}),
    ("fab_t", "l2", {"steps": 20, "targets": 3}, "autoattack", {"n_iter": 20, "n_target_classes": 3}),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADER = (
    "| attack, norm | settings; the other library | our median | theirs | ratio | median ratio of an image "
    "| nearer by 1 %: ours, theirs | found: ours, theirs |\n|---|---|---|---|---|---|---|---|"
)


def resnet(weights: pathlib.Path) -> classifier.Classifier:
    """ResNet-20 of CIFAR-10 with the weights of an .npz under their torch names."""
    module = models.build("resnet", num_classes=10, depth=20)
    spec = classifier.ImageSpec(size=(32, 32), mean=MEAN, std=STD)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
    variables = models.load_weights(weights, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    return classifier.Classifier(variables=variables, module=module, spec=spec)


def images(data_dir: pathlib.Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first test images, canonical pixels, and their labels."""
    source = tfds.data_source("cifar10_exact", split="test", data_dir=data_dir / "tfds")
    records = [record for record in (source[index] for index in range(len(source))) if record["row"] < count]
    stacked = np.stack([record["image"] for record in records]).astype(np.float32) / np.float32(255)
    return stacked, np.asarray([record["label"] for record in records], np.int32)


def ours(model, row: tuple, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Distances, infinite where there is no success."""
    name, norm, options, _, _ = row
    attack = attacks.build(name, norm=norm, **options)
    result = attacks.run(attack, model, {"image": inputs, "label": labels}, slots=len(inputs))
    return np.where(result.success, result.distance, np.inf)


def main() -> None:
    """Reads the flags and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=pathlib.Path, required=True, help="has tfds/cifar10_exact and weights/")
    parser.add_argument("--peer_python", default=sys.executable, help="a Python that has torch and the other libraries")
    parser.add_argument("--images", type=int, default=64, help="the first so many test images")
    parser.add_argument("--rows", help="comma-separated names of attacks; all by default")
    flags = parser.parse_args()
    weights = flags.data_dir / "weights" / "resnet20-12fca82f.npz"
    model = resnet(weights)
    inputs, labels = images(flags.data_dir, flags.images)
    right = np.asarray(jax.jit(lambda model, x: model(x))(model, inputs)).argmax(axis=1) == labels
    inputs, labels = inputs[right], labels[right]
    rows = [row for row in ROWS if flags.rows is None or row[0] in flags.rows.split(",")]
    print(f"jax {jax.__version__}; {len(inputs)} of the first {flags.images} test images\n\n{HEADER}", flush=True)
    for row in rows:
        mine = ours(model, row, inputs, labels)
        theirs = peer(flags.peer_python, weights, row, inputs, labels)
        print(_cells(row, mine, theirs), flush=True)


def peer(python: str, weights: pathlib.Path, row: tuple, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Distances of the other library, from a process of its own."""
    name, norm, _, library, options = row
    with tempfile.TemporaryDirectory() as folder:
        given, found = pathlib.Path(folder, "given.npz"), pathlib.Path(folder, "found.npy")
        np.savez(given, images=inputs, labels=labels)
        request = {"name": name, "norm": norm, "library": library, "options": options}
        script = pathlib.Path(__file__).with_name("attack_minimal_peer.py")
        subprocess.run([python, str(script), str(weights), str(given), str(found), json.dumps(request)], check=True)
        return np.load(found)


def _cells(row: tuple, mine: np.ndarray, theirs: np.ndarray) -> str:
    name, norm, options, library, _ = row
    medians = np.median(mine), np.median(theirs)
    nearer = (mine < 0.99 * theirs).sum(), (theirs < 0.99 * mine).sum()
    both = np.isfinite(mine) & np.isfinite(theirs)
    settings = ", ".join(f"{key} {value}" for key, value in options.items())
    cells = (
        f"{name}, {norm}",
        f"{settings}; {library}",
        f"{medians[0]:.5f}",
        f"{medians[1]:.5f}",
        f"{medians[0] / medians[1]:.4f}",
        f"{np.median(mine[both] / theirs[both]):.4f}",
        f"{nearer[0]}, {nearer[1]}",
        f"{np.isfinite(mine).sum()}, {np.isfinite(theirs).sum()}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
