"""Are the features of a Transformer bent and those of a convolutional network straight? Kim et al. 2022 on two CIFAR-10 models.

    python tests/benchmarks/bent_representations.py --data=../shared/data --images=30 --directions=32 --figures=figures

runs the study `representation_curvature` along random directions and along the FGSM direction, and `boundary_travel` on the same
images, prints Markdown tables, and draws the figures. Results: results/representation_sweep.md.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import real_models

from robust_vit import command_line, plots, studies, tables
from robust_vit.studies import representation_summary

MODELS = {"ResNet-20": real_models.resnet20, "ViT, 6 blocks": real_models.vit}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Stream:
    """Images in memory as an evaluation stream."""

    def __init__(self, examples: dict[str, np.ndarray], size: int = 64):
        self.examples, self.size = examples, size
        self.num_examples = len(examples["row"])

    def with_batch(self, batch: int, limit: int | None = None) -> Stream:
        """The first `limit` images in batches of another size."""
        return Stream({name: array[:limit] for name, array in self.examples.items()}, batch)

    def __len__(self) -> int:
        return -(-self.num_examples // self.size)

    def batch(self, index: int) -> dict[str, np.ndarray]:
        """The last one is filled up and masked."""
        chosen = np.arange(index * self.size, (index + 1) * self.size)
        mask = chosen < self.num_examples
        return {name: array[np.where(mask, chosen, 0)] for name, array in self.examples.items()} | {"mask": mask}


def markdown(table: tables.Table) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(tables.text(cell) for cell in row) + " |" for row in table.rows])


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--directions", type=int, default=32)
    parser.add_argument("--figures", type=pathlib.Path)
    flags = parser.parse_args()
    command_line.configure_jax()
    stream = Stream(real_models.images(flags.data, rows=flags.images))
    subjects = {
        name: studies.Subject(classifier=load(flags.data), test=stream, num_classes=10, class_names=CLASSES)
        for name, load in MODELS.items()
    }
    travel = studies.build("boundary_travel", examples=None, batch=stream.num_examples, limit=0.2, exhibits=0)
    travels = {name: travel.run(subject).records for name, subject in subjects.items()}
    for direction in ("random", "gradient"):
        options = {"direction": direction, "directions": flags.directions, "examples": None}
        study = studies.build("representation_curvature", **options)
        findings = {name: study.run(subject) for name, subject in subjects.items()}
        (table,) = study.tables(findings).values()
        print(f"\n{table.caption}\n\n{markdown(table)}\n", flush=True)
        first, second = findings
        for found in study.compare(findings[first], findings[second]):
            print(
                f"{found.quantity}, {second} minus {first}: {found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            )
        for name, finding in findings.items():
            change = finding.summary["change"]
            print(
                f"{name}: θ after the jump minus before {change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
            )
            print(
                f"{name}: rank correlation of θ with ε to the boundary {_with_boundary(finding.records, travels[name])}"
            )
        if flags.figures:
            flags.figures.mkdir(parents=True, exist_ok=True)
            for key, figure in study.figures(findings).items():
                plots.save(figure, flags.figures / f"{direction}_{key}", formats=("png",))


def _with_boundary(records: dict[str, np.ndarray], travels: dict[str, np.ndarray]) -> str:
    """Over the images that the model gets right and whose travel meets a boundary."""
    chosen = travels["correct"] & travels["crossed/start"]
    angles = representation_summary.per_image(records["angles/start"])[chosen]
    found = representation_summary.correlation(travels["epsilon/start"][chosen], angles)
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}] ({chosen.sum()} images)"


if __name__ == "__main__":
    main()
