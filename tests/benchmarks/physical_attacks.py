"""Patches and the print-photo channel on trained models and exact CIFAR-10 images: the tables of the two studies.

    python tests/benchmarks/physical_attacks.py patch --images=512 --steps=300
    python tests/benchmarks/physical_attacks.py physical --images=64

Weights and images are those of the data folder (`ROBUST_VIT_DATA` or `--data`): ResNet-20 and a ViT on exact CIFAR-10. Results:
tests/benchmarks/results/physical_attacks.md.
"""

from __future__ import annotations

import argparse
import os
import time

import real_models

from robust_vit import command_line, data, plots, studies

MODELS = {"resnet20": real_models.resnet20, "vit": real_models.vit}


def _subject(name: str, folder: str) -> studies.Subject:
    def stream(split: str) -> data.EvaluationStream:
        return data.EvaluationStream(
            data.open_source("cifar10_exact", split=split, data_dir=f"{folder}/tfds"), batch=32
        )

    test = stream("test")
    return studies.Subject(
        classifier=MODELS[name](folder),
        test=test,
        validation=stream("train"),
        num_classes=10,
        class_names=test.source.class_names,
        name=name,
        threat="cifar10/linf-8",
    )


def main() -> None:
    """Runs one study on the models and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("patch", "physical"))
    parser.add_argument("--data", default=os.environ.get("ROBUST_VIT_DATA", "../shared/data"))
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300, help="of learning the patch")
    parser.add_argument("--target", type=int, default=None, help="class that the patch is to reach")
    parser.add_argument("--blur", type=float, default=1.0, help="largest deviation of the channel's blur, in pixels")
    parser.add_argument("--figures", default=None, help="folder for the figures")
    arguments = parser.parse_args()
    command_line.configure_jax()
    if arguments.study == "patch":
        options = {"steps": arguments.steps, "target": arguments.target, "shape": "square", "batch": 32}
        study = studies.build("patch_attack", examples=arguments.images, **options)
    else:
        study = studies.build(
            "physical_attack", examples=arguments.images, batch=32, threat="cifar10/linf-2", blur=arguments.blur
        )
    findings = {}
    for name in arguments.models:
        begin = time.perf_counter()
        findings[name] = study.run(_subject(name, arguments.data))
        print(f"{name}: {time.perf_counter() - begin:.0f} s")
    for table in study.tables(findings).values():
        print(table.title)
        print(table.csv())
    for name, figure in study.figures(findings).items():
        if arguments.figures:
            plots.save(figure, f"{arguments.figures}/{name}", ("png",))


if __name__ == "__main__":
    main()
