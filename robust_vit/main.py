"""The command line: `python -m robust_vit.main --config=configs/vit_b16.py --workdir=runs/vit_b16`."""

from __future__ import annotations

import json
import sys
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
command_line.define_processes()


def main(_: list[str]) -> int:
    """Trains every run of the configuration, runs every study on them, writes the report."""
    began = time.monotonic()
    command_line.configure_jax()
    # Imported after the flags are read: `--help` and a mistyped flag answer at once.
    from robust_vit import evaluate, files, planning, processes, progress, report, runs, settings, topology, train

    if TOPOLOGY.value:
        topology.configure(TOPOLOGY.value, alone=not PLAN.value)
    logger = command_line.logger()
    processes.start(**command_line.processes_given())
    stop, config, workdir = processes.Stop(), CONFIG.value, command_line.check_workdir(WORKDIR.value)
    given = json.dumps(files.jsonable([config.to_dict(), workdir]), sort_keys=True)
    processes.check_same({"configuration or workdir": given, "version of the code": processes.code_version()})
    resolved = settings.resolve(config)
    setups = {name: runs.prepare(run, workdir, name) for name, run in resolved.items()}
    asked = settings.build_studies(next(iter(resolved.values())))
    if PLAN.value or TOPOLOGY.value:
        logger.info("planning: every program is compiled, none of the work is done")
        text = [planning.plan(setups, asked)] if PLAN.value else []
        text += [topology.plan(setups, TOPOLOGY.value)] if TOPOLOGY.value else []
        if processes.is_first():
            print("\n\n".join(text))
        return 0
    setups = {name: train.settle(setup) for name, setup in setups.items()}
    processes.first_does(lambda: files.write_json(f"{workdir}/config.json", config.to_dict()))
    processes.check_shared(workdir)
    try:
        subjects, steps = {}, {}
        for setup in setups.values():
            train.train(setup, stop=stop)
        for setup in setups.values():
            found, step = runs.subjects(setup)
            subjects.update(found)
            steps.update(dict.fromkeys(found, step))
        evaluate.evaluate_runs(workdir, subjects, asked, steps, stop=stop)
    except (train.Stopped, evaluate.Stopped) as stopped:
        logger.warning("%s Run the same command again to go on.", stopped)
        processes.finish()
        return errors.EXIT_REQUEUE
    processes.first_does(lambda: report.write([workdir], f"{workdir}/report"))
    took = progress.duration(time.monotonic() - began)
    logger.info("finished in %s. The report: %s/report/index.html", took, workdir)
    processes.finish()
    return 0


def run() -> None:
    """The entry point: `main` under absl, with a user's mistakes told in one line and exit code 2."""
    flags.mark_flags_as_required(["config", "workdir"])
    debug = any(argument in ("--debug", "--debug=true") for argument in sys.argv)
    with command_line.one_line_errors(debug=debug):
        app.run(main, argv=command_line.evaluate_fractions(sys.argv), flags_parser=command_line.parse_flags)


if __name__ == "__main__":
    run()
