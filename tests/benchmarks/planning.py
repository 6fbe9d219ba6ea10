"""What `--plan` foretells against what the parts then take, in one process, as a Markdown table.

    python tests/benchmarks/planning.py configs/quickstart.py
    python tests/benchmarks/planning.py configs/fashion_mnist.py data.data_dir=FOLDER train.steps=300

Both sides are steady work: a study is its number of chunks times the median chunk without the first, which compiles; training
is its steps at the median speed of the log. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import ast
import tempfile
import time

import configurations
import numpy as np

from robust_vit import command_line, planning, progress, runs, settings, train


def _configuration(given: str, overrides: list[str]):
    path, _, argument = given.partition(":")
    config = configurations.load(path, argument)
    for override in overrides:
        key, _, value = override.partition("=")
        with config.ignore_type():
            try:
                config.update_from_flattened_dict({key: ast.literal_eval(value)})
            except (SyntaxError, ValueError):
                config.update_from_flattened_dict({key: value})
    return config


def _trained(setup: runs.Setup) -> float:
    """Trains, and returns the seconds that all steps would take at the median speed of the log."""
    train.train(setup)
    lines = progress.read(setup.folder / progress.SPEED_FILE)
    speed = float(np.median([line["images_per_second"] for line in lines[1:] or lines]))
    return setup.steps * setup.config.data.batch / speed


def main() -> None:
    """Plans, runs, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of configs/, after a colon its argument")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    flags = parser.parse_args()
    command_line.configure_jax()
    resolved = settings.resolve(_configuration(flags.config, flags.overrides))
    with tempfile.TemporaryDirectory() as workdir:
        setups = {name: train.settle(runs.prepare(config, workdir, name)) for name, config in resolved.items()}
        asked = settings.build_studies(next(iter(resolved.values())))
        parts = list(planning.collect(setups, asked))
        started = time.monotonic()
        speed = planning.calibrate(parts, setups)
        print(f"calibration {time.monotonic() - started:.1f} s, {speed.product / 1e9:.0f} GFLOP/s\n")
        print("| run | part | by | plan, s | measured, s | measured / plan |\n|---|---|---|---|---|---|")
        total = np.zeros(2)
        for name, setup in setups.items():
            measured = {"training": _trained(setup)}
            subject = runs.subjects(setup)[0][name]
            for label, study in asked.items():
                seconds = []
                for index in range(study.chunks(subject)):
                    began = time.monotonic()
                    study.chunk(subject, index)
                    seconds.append(time.monotonic() - began)
                measured[label] = len(seconds) * float(np.median(seconds[1:] or seconds))
            for part in parts:
                if part.run == name and part.name in measured:
                    pair = np.asarray([speed.of(part), measured[part.name]])
                    total += pair
                    by = "timing" if speed.timed(part) else "operations"
                    print(f"| {name} | {part.name} | {by} | {pair[0]:.2f} | {pair[1]:.2f} | {pair[1] / pair[0]:.2f} |")
        print(f"| all | | | {total[0]:.1f} | {total[1]:.1f} | {total[1] / total[0]:.2f} |")


if __name__ == "__main__":
    main()
