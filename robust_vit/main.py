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
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of every error.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where several processes share the work."
)
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
PROCESS = flags.DEFINE_integer("process", None, "The number of this process, from 0.")
START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes.")


def main(_: list[str]) -> int:
    """Trains every run of the configuration, runs every study on them, writes the report."""
    began = time.monotonic()
    command_line.configure_jax()
    # Imported after the flags are read: `--help` and a mistyped flag answer at once.
    from robust_vit import evaluate, files, processes, progress, report, runs, settings, train

    logger = command_line.logger()
    processes.start(
        coordinator=COORDINATOR.value, processes=PROCESSES.value, process=PROCESS.value, timeout=START_TIMEOUT.value
    )
    stop = processes.Stop()
    config, workdir = CONFIG.value, command_line.check_workdir(WORKDIR.value)
    asked = json.dumps(files.jsonable([config.to_dict(), workdir]), sort_keys=True)
    processes.check_same({"configuration or workdir": asked, "version of the code": processes.code_version()})
    resolved = settings.resolve(config)
    setups = {name: runs.prepare(run, workdir, name) for name, run in resolved.items()}
    if processes.is_first():
        files.write_json(f"{workdir}/config.json", config.to_dict())
    processes.check_shared(workdir)
    try:
        for setup in setups.values():
            train.train(setup, stop=stop)
        subjects, steps = {}, {}
        for setup in setups.values():
            found, step = runs.subjects(setup)
            subjects.update(found)
            steps.update(dict.fromkeys(found, step))
        studies = settings.build_studies(next(iter(resolved.values())))
        evaluate.evaluate_runs(workdir, subjects, studies, steps, stop=stop)
    except (train.Stopped, evaluate.Stopped) as stopped:
        logger.warning("%s Run the same command again to go on.", stopped)
        processes.finish()
        return errors.EXIT_REQUEUE
    if processes.is_first():
        path = report.write([workdir], f"{workdir}/report")
        logger.info("finished in %s. The report: %s", progress.duration(time.monotonic() - began), path)
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
