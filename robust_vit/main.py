"""The command line: `python -m robust_vit.main --config=configs/vit_b16.py --workdir=runs/vit_b16`."""

from __future__ import annotations

import signal
import sys
import threading
import time

from absl import app, flags
from ml_collections import config_flags

from robust_vit import command_line, errors

CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, results and the report go.")
PLAN = flags.DEFINE_bool("plan", False, "Print what the configuration would take, and run nothing.")
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Compile the training step for a TPU pod, for example v5e-64, and run nothing."
)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of every error.")


def main(_: list[str]) -> int:
    """Trains every run of the configuration, runs every study on them, writes the report."""
    began = time.monotonic()
    command_line.configure_jax()
    # Imported after the flags are read: `--help` and a mistyped flag answer at once.
    from robust_vit import evaluate, files, planning, progress, report, runs, settings, topology, train

    if TOPOLOGY.value:
        topology.configure(TOPOLOGY.value, alone=not PLAN.value)
    stopping = threading.Event()
    # SIGTERM is what schedulers send before they take a machine away: finish the step or the chunk, save, leave.
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    logger = command_line.logger()
    config = CONFIG.value
    resolved = settings.resolve(config)
    setups = {name: runs.prepare(run, WORKDIR.value, name) for name, run in resolved.items()}
    if PLAN.value:
        print(planning.plan(setups, settings.build_studies(next(iter(resolved.values())))))
    if TOPOLOGY.value:
        print(topology.plan(setups, TOPOLOGY.value))
    if PLAN.value or TOPOLOGY.value:
        return 0
    setups = {name: train.settle(setup) for name, setup in setups.items()}
    files.write_json(f"{WORKDIR.value}/config.json", config.to_dict())
    try:
        for setup in setups.values():
            train.train(setup, stop=stopping.is_set)
        subjects, steps = {}, {}
        for setup in setups.values():
            found, step = runs.subjects(setup)
            subjects.update(found)
            steps.update(dict.fromkeys(found, step))
        asked = settings.build_studies(next(iter(resolved.values())))
        evaluate.evaluate_runs(WORKDIR.value, subjects, asked, steps, stop=stopping.is_set)
    except (train.Stopped, evaluate.Stopped) as stopped:
        logger.warning("%s Run the same command again to go on.", stopped)
        return errors.EXIT_REQUEUE
    path = report.write([WORKDIR.value], f"{WORKDIR.value}/report")
    logger.info("finished in %s. The report: %s", progress.duration(time.monotonic() - began), path)
    return 0


def run() -> None:
    """The entry point: `main` under absl, with a user's mistakes told in one line and exit code 2."""
    flags.mark_flags_as_required(["config", "workdir"])
    debug = any(argument in ("--debug", "--debug=true") for argument in sys.argv)
    with command_line.one_line_errors(debug=debug):
        app.run(main, argv=command_line.evaluate_fractions(sys.argv), flags_parser=command_line.parse_flags)


if __name__ == "__main__":
    run()
