"""Runs robust_vit as N processes on this machine, each with its own virtual CPU devices: a pod to try things on.

    python launch/local_processes.py --processes=2 --config=configs/quickstart.py:smoke --workdir=runs/two

The launcher's own options come first; from `--config=` (or from `--`) on, every flag is one of `robust_vit.main`.
The processes find one another through `ROBUST_VIT_COORDINATOR`, `ROBUST_VIT_PROCESSES` and `ROBUST_VIT_PROCESS`. Each
writes a log of its own; process 0 is also shown here. They live and die together: when one crashes, the others are
ended, and the end of its log is printed. Ctrl-C and SIGTERM ask all of them to save and leave; a second one kills them.
Run the same command again to go on.

Exit codes: 0 finished; 2 a user's mistake, which beats every other code and is never retried; 75 saved before it was
finished; everything else is the code of the first crash (128 + the signal's number, where a signal ended it).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75
POLL = 0.05  # Seconds between two looks at the processes.
SETTLE = 2.0  # Seconds for the others to end by themselves after a crash: often all made the same mistake.
TAIL = 20  # Lines of a failed process's log that are shown.
# Reads process groups and kills them when this launcher dies, whatever killed it: then its end of the pipe closes.
GUARD = """
while read -r word; do [ "$word" = done ] && exit; groups="$groups $word"; done
for group in $groups; do kill -KILL "-$group"; done
"""


@dataclasses.dataclass
class Process:
    """One process of the job.

    Attributes:
      index: its number, from 0.
      popen: the running program; it leads a process group of its own.
      log: the file that it writes to.
      shown: how many bytes of the log have been printed.
      first: where in the log this attempt begins, in bytes.
      killed: whether it was sent SIGKILL, or SIGTERM because another one crashed: then its code says nothing.
    """

    index: int
    popen: subprocess.Popen
    log: pathlib.Path
    shown: int
    first: int
    killed: bool = False

    def code(self) -> int | None:
        """The exit code, 128 + signal where a signal ended it, or None while it runs."""
        code = self.popen.poll()
        return code if code is None or code >= 0 else 128 - code

    def signal(self, number: signal.Signals) -> None:
        """Signals the process; SIGKILL goes to its whole group, data workers included."""
        try:
            if number == signal.SIGKILL:
                os.killpg(self.popen.pid, number)
            elif self.popen.poll() is None:
                self.popen.send_signal(number)
        except (ProcessLookupError, PermissionError):
            pass  # It has ended in the meantime; on macOS a group of the dead may not be signalled.


class Job:
    """One attempt: starts the processes, watches them, ends them. Use as a context manager: nothing outlives it."""

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str], stops: collections.deque):
        """Args: `options` of the launcher, `arguments` of the program, `stops`: the signals that arrived so far."""
        self.options, self.arguments, self.stops = options, arguments, stops
        self.processes: list[Process] = []

    def __enter__(self) -> Job:
        # A session of its own, so that Ctrl-C does not reach it.
        self.guard = subprocess.Popen(
            ["sh", "-c", GUARD], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.signal(signal.SIGKILL)
            process.popen.wait()
        self.guard.communicate(b"done\n")

    def run(self) -> int:
        """Starts all processes, waits for all, and returns the exit code of the job."""
        self.options.log_folder.mkdir(parents=True, exist_ok=True)
        for index, variables in enumerate(plan(self.options)):
            self._start(index, variables)
        deadline, asked, crashed = float("inf"), 0, False
        while any(process.code() is None for process in self.processes):
            time.sleep(POLL)
            self._show()
            ended = [process.code() for process in self.processes if process.code() is not None]
            if not crashed and any(code not in (0, EXIT_REQUEUE) for code in ended):
                crashed = True
                self._settle()
                self._end(signal.SIGTERM, innocent=True)
                # jax.distributed catches SIGTERM: a process that waits for a dead one never leaves of itself.
                deadline = min(deadline, time.monotonic() + self.options.seconds_to_end)
            elif asked < len(self.stops):
                asked = len(self.stops)
                _say("asked to stop: the processes save and leave; ask again to kill them")
                self._end(signal.SIGTERM)
                patience = self.options.seconds_to_save if asked == 1 else 0
                deadline = min(deadline, time.monotonic() + patience)
            elif ended:
                deadline = min(deadline, time.monotonic() + self.options.seconds_to_save)
            if time.monotonic() >= deadline:
                self._end(signal.SIGKILL, innocent=crashed)
        self._show()
        return self._conclude()

    def _start(self, index: int, variables: dict[str, str]) -> None:
        log = self.options.log_folder / f"process_{index}.log"
        with log.open("ab") as output:
            first = output.tell()
            popen = subprocess.Popen(
                command(self.options, self.arguments),
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.guard.stdin.write(f"{popen.pid}\n".encode())
        self.guard.stdin.flush()
        self.processes.append(Process(index, popen, log, first, first))

    def _settle(self) -> None:
        until = time.monotonic() + SETTLE
        while time.monotonic() < until and any(process.code() is None for process in self.processes):
            time.sleep(POLL)

    def _end(self, number: signal.Signals, *, innocent: bool = False) -> None:
        """Signals all that run; `innocent`: what they return from now on is not a verdict on the job."""
        for process in self.processes:
            if process.code() is None:
                process.killed = process.killed or innocent
                process.signal(number)

    def _show(self) -> None:
        for process in self.processes:
            if self.options.show == "all" or str(process.index) == self.options.show:
                prefix = f"[{process.index}] " if self.options.show == "all" else ""
                process.shown += _print_lines(process, prefix=prefix)

    def _conclude(self) -> int:
        codes = {process.index: process.code() for process in self.processes}
        judged = {process.index: codes[process.index] for process in self.processes if not process.killed}
        wrong = {index: code for index, code in judged.items() if code not in (0, EXIT_REQUEUE)}
        if not wrong:
            return EXIT_REQUEUE if EXIT_REQUEUE in judged.values() else 0
        mistakes = [index for index, code in wrong.items() if code == EXIT_USER_ERROR]
        guilty = mistakes[0] if mistakes else next(iter(wrong))
        process = self.processes[guilty]
        _say(f"process {guilty} ended with {codes[guilty]}; all: {' '.join(f'{i}:{c}' for i, c in codes.items())}")
        if self.options.show not in ("all", str(guilty)):
            with process.log.open("rb") as file:
                file.seek(process.first)
                tail = file.read().decode(errors="replace").splitlines()[-TAIL:]
            print("\n".join([f"--- the end of {process.log}", *tail, "---"]), file=sys.stderr, flush=True)
        return codes[guilty]


def plan(options: argparse.Namespace) -> list[dict[str, str]]:
    """The environment variables of each process.

    Every call finds a new free port for the coordinator: the last one may be in use for a while after a crash.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "ROBUST_VIT_COORDINATOR": f"127.0.0.1:{port}",
        "ROBUST_VIT_PROCESSES": str(options.processes),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(options.devices_per_process),
        # XLA's threads: processes that each make one for every core get in each other's way. Giving each process cores
        # of its own instead (taskset) was slower: the threads of the collectives then wait for those that compute.
        "NPROC": str(options.threads or max(1, _cores() // options.processes)),
        "PYTHONUNBUFFERED": "1",
    }
    if "ROBUST_VIT_MEMORY_GIB" not in os.environ:
        # Each process would count the whole memory of the machine as its own when it plans, and where "auto" asks for it.
        devices = options.processes * options.devices_per_process
        shared["ROBUST_VIT_MEMORY_GIB"] = f"{_memory() / devices / 2**30:.3f}"
    return [{**shared, "ROBUST_VIT_PROCESS": str(index)} for index in range(options.processes)]


def command(options: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """The command line of every process."""
    return [sys.executable, "-m", options.module, *arguments]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options and the program's arguments; exits with 2 and one line when they are wrong."""
    of_program = [argument == "--" or argument.startswith(("--config=", "--workdir=")) for argument in argv]
    start = of_program.index(True) if True in of_program else len(argv)
    arguments = list(argv[start + 1 :] if argv[start : start + 1] == ["--"] else argv[start:])
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--processes", type=_one_or_more, required=True, help="how many processes")
    add("--devices_per_process", type=_one_or_more, default=1, help="virtual CPU devices of each process (default 1)")
    add("--retries", type=_count, default=0, help="how often to start again after a crash or exit code 75 (default 0)")
    add("--log_folder", type=pathlib.Path, help="where process_N.log are appended to (default WORKDIR.logs)")
    add("--show", default="0", help="the process that is shown here, or all (default 0)")
    add("--threads", type=_one_or_more, help="of XLA in each process (default: the cores shared out)")
    add("--seconds_to_save", type=float, default=300, help="from SIGTERM, or the first end, to SIGKILL (default 300)")
    add("--seconds_to_end", type=float, default=10, help="for the others after a crash, then SIGKILL (default 10)")
    add("--module", default="robust_vit.main", help="the program (default robust_vit.main)")
    add("--dry_run", action="store_true", help="print the commands and start nothing")
    options = parser.parse_args(argv[:start])
    given = {argument.partition("=")[0]: argument.partition("=")[2] for argument in arguments}
    if options.module == "robust_vit.main" and not (given.get("--config") and given.get("--workdir")):
        parser.error("the program needs --config=FILE and --workdir=FOLDER; they come after the launcher's options.")
    if options.show != "all" and options.show not in map(str, range(options.processes)):
        parser.error(f"--show={options.show}: expected a number below --processes={options.processes}, or all.")
    if options.log_folder is None:
        options.log_folder = pathlib.Path((given.get("--workdir") or "runs/processes").rstrip("/") + ".logs")
    return options, arguments


def main(argv: Sequence[str]) -> int:
    """Runs the job, again where it may be, and returns its exit code."""
    options, arguments = parse(argv)
    if options.dry_run:
        for variables in plan(options):
            words = [f"{name}={value}" for name, value in variables.items()]
            print(shlex.join(["env", *words, *command(options, arguments)]))
        return 0
    stops: collections.deque = collections.deque()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda received, _: stops.append(received))
    for attempt in range(options.retries + 1):
        with Job(options, arguments, stops) as job:
            code = job.run()
        if code in (0, EXIT_USER_ERROR) or stops or attempt == options.retries:
            break
        _say(f"exit code {code}: starting again ({attempt + 1} of {options.retries})")
    if code:
        _say(f"exit code {code}; logs: {options.log_folder}")
    return code


def _memory() -> int:
    """Bytes of the machine, or what its control group allows; as `robust_vit.programs.device_memory` finds them."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(pathlib.Path(path).read_text(encoding="ascii")))
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(EXIT_USER_ERROR, f"error: {message} (--help lists the options)\n")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number")
    return int(text)


def _one_or_more(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more")
    return int(text)


def _print_lines(process: Process, *, prefix: str) -> int:
    """Prints the whole lines that the log has gained, all that is left once the process has ended; returns bytes."""
    ended = process.code() is not None
    with process.log.open("rb") as file:
        file.seek(process.shown)
        text = file.read()
    if not ended:
        text = text[: text.rfind(b"\n") + 1]
    for line in text.decode(errors="replace").splitlines():
        print(prefix + line, flush=True)
    return len(text)


def _say(message: str) -> None:
    print(f"launcher: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
