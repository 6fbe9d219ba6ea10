"""Many processes that run one program: how they find each other, agree, take turns at the disk, and stop together.

On one process everything here is a no-op, so callers never ask how many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from robust_vit import errors

_logger = logging.getLogger(__name__)

# A worker that stops answering ends the job after so many seconds: XLA's default of 100 is more than the minute we promise.
HEARTBEAT_SECONDS = 30
_EXIT_ALONE = 1  # Not a user's mistake: machines of a pod may start minutes apart, and launchers try again.


def start(
    *, coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = 300
) -> None:
    """Joins the other processes of the job where the arguments or the environment ask for it; once, before JAX sees a device.

    What asks for it: the arguments; the variables ROBUST_VIT_COORDINATOR, ROBUST_VIT_PROCESSES and ROBUST_VIT_PROCESS;
    ROBUST_VIT_DISTRIBUTED=1 (set by the launchers for TPU pods); more than one Slurm or Open MPI task; a GKE TPU job with
    more than one worker. In the last three the numbers are found by `jax.distributed.initialize`.

    Args:
      coordinator: host:port of process 0.
      processes: how many there are.
      process: the number of this one, from 0.
      timeout: seconds to wait for the others.

    Raises:
      errors.UserError: arguments that do not fit together. When the others do not come in time, the process prints one line with
        the coordinator's address and exits with 1: the wait cannot be broken from Python.
    """
    given = {
        "coordinator": coordinator or os.environ.get("ROBUST_VIT_COORDINATOR"),
        "processes": _number("ROBUST_VIT_PROCESSES") if processes is None else processes,
        "process": _number("ROBUST_VIT_PROCESS") if process is None else process,
    }
    explicit = any(value is not None for value in given.values())
    if not explicit and not _environment_asks():
        return
    if explicit:
        _check(**given)
        if given["processes"] == 1:
            return
    watchdog = threading.Timer(timeout, _give_up, (timeout,), given)
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(
            coordinator_address=given["coordinator"],
            num_processes=given["processes"],
            process_id=given["process"],
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise errors.UserError(
            f"the processes of this job could not be connected ({str(error).splitlines()[0]}): give --coordinator, --processes "
            "and --process."
        ) from error
    finally:
        watchdog.cancel()
    if jax.process_index():
        logging.getLogger("robust_vit").setLevel(logging.WARNING)  # Process 0 tells what all of them do.


def is_first() -> bool:
    """Whether this process is the one that writes results, logs and reports."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def barrier(name: str) -> None:
    """Waits until every process is here; what process 0 wrote before is then whole."""
    if several():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 goes through the block before the others start on it: it may prepare what they then find prepared."""
    if not is_first():
        barrier("first alone")
    yield
    if is_first():
        barrier("first alone")


def from_first(value: np.ndarray) -> np.ndarray:
    """Process 0's value on all processes: a decision that depends on the disk is made once. Same shape and dtype on all."""
    value = np.asarray(value)
    if not several():
        return value
    return np.asarray(multihost_utils.broadcast_one_to_all(value)).astype(value.dtype)


def first_finds(find: Callable[[], int]) -> int:
    """The whole number (or truth) that process 0 finds, on all processes: a question to the disk is asked once."""
    return int(from_first(np.int32(find() if is_first() else 0)))


def first_does(action: Callable[[], Any]) -> Any:
    """What `action` returns on process 0, which alone does it, and None on the others; its mistake is that of all processes.

    Raises:
      errors.UserError: `action` raised one on process 0. All raise it, and so all end with the code of a mistake, which no
        launcher answers with a new start.
    """
    result, mistake = None, b""
    if is_first():
        try:
            result = action()
        except errors.UserError as error:
            if not several():
                raise
            mistake = str(error).encode()
    size = int(from_first(np.int32(len(mistake))))
    if size:
        text = np.frombuffer(mistake, np.uint8) if is_first() else np.zeros(size, np.uint8)
        raise errors.UserError(from_first(text).tobytes().decode())
    return result


def everywhere(value: np.ndarray) -> np.ndarray:
    """`[processes, ...]`: what each process holds."""
    value = np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value)) if several() else value[None]


def least(number: int) -> int:
    """The smallest of the numbers that the processes hold, rounded down to a multiple of 1024: all decide by it alike."""
    return int(everywhere(np.int32(min(number >> 10, 2**31 - 1))).min()) << 10 if several() else number


def check_same(parts: Mapping[str, str]) -> None:
    """Refuses processes that were started with different things, on all of them alike.

    Args:
      parts: what has to be the same (in words) -> its text, for example the configuration as JSON.

    Raises:
      errors.UserError: naming the process and what differs.
    """
    digests = np.stack([_digest(text) for text in parts.values()])
    differs = (everywhere(digests) != from_first(digests)[None]).any(axis=-1)
    for process, row in enumerate(differs):
        names = [name for name, different in zip(parts, row, strict=True) if different]
        if names:
            raise errors.UserError(
                f"process {process} was started with another {' and another '.join(names)} than process 0: start all processes "
                "with the same command from the same code."
            )


def check_shared(folder: os.PathLike | str, *, patience: float = 10.0) -> None:
    """Refuses a folder that the processes do not share, on all of them alike.

    Args:
      folder: made by process 0.
      patience: seconds that a network file system may take to show a new file.

    Raises:
      errors.UserError: naming the first process that does not see what process 0 wrote.
    """
    if not several():
        return
    token = pathlib.Path(folder) / f".shared-{from_first(np.int32(time.time_ns() % 2**31))}"
    if is_first():
        token.touch()
    barrier("shared folder")
    deadline = time.monotonic() + patience
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = everywhere(np.asarray([token.exists()]))[:, 0]
    if is_first():
        token.unlink(missing_ok=True)
    if not seen.all():
        raise errors.UserError(
            f"process {int(np.argmin(seen))} does not see {folder} as process 0 wrote it: --workdir has to be a folder that all "
            "machines share (NFS, Filestore, a mounted bucket)."
        )


def code_version() -> str:
    """A hash of the library's source files and the versions of JAX and Python: equal where programs are equal."""
    digest = hashlib.sha256(f"{jax.__version__} {sys.version_info[:2]}".encode())
    root = pathlib.Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Stop:
    """Whether to save and leave: polled between steps and chunks, by every process the same number of times.

    On one process a SIGTERM says so. On several, a SIGTERM to any of them is passed on by JAX's preemption service, and all see
    True at the same poll.
    """

    def __init__(self):
        self._polls = 0
        self._raised = threading.Event()
        if not several():
            # Several processes: JAX has installed its own handler, which must stay.
            signal.signal(signal.SIGTERM, lambda *_: self._raised.set())

    def __call__(self) -> bool:
        self._polls += 1
        if several() and multihost_utils.reached_preemption_sync_point(self._polls):
            self._raised.set()
        return self._raised.is_set()


def finish() -> None:
    """Leaves the job in order: waits for the others, so that none is taken for dead."""
    if several():
        barrier("finish")
        jax.distributed.shutdown()


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is None or processes is None or process is None:
        raise errors.UserError(
            f"coordinator={coordinator}, processes={processes}, process={process}: give all three, for example "
            "--coordinator=10.0.0.1:8476 --processes=2 --process=0."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise errors.UserError(f"coordinator={coordinator!r}: expected host:port, for example 10.0.0.1:8476.")
    if not 0 <= process < processes:
        raise errors.UserError(f"process={process} of processes={processes}: expected 0 to {processes - 1}.")


def _environment_asks() -> bool:
    if os.environ.get("ROBUST_VIT_DISTRIBUTED") == "1":
        return True
    tasks = [os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    if any(count.isdecimal() and int(count) > 1 for count in tasks):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise errors.UserError(f"{variable}={text!r}: expected a whole number from 0.")
    return int(text)


def _digest(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)


def _give_up(timeout: int, coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is None:
        # Found by JAX in the environment of a cluster, which it has no public name for; without it the line is less exact.
        with contextlib.suppress(ImportError, AttributeError):
            from jax._src.distributed import global_state

            if global_state.coordinator_address:
                coordinator = global_state.coordinator_address
                processes, process = global_state.num_processes, global_state.process_id
    who = "this process" if coordinator is None else f"process {process} of {processes}"
    address = coordinator or "the address found in the environment"
    print(
        f"error: {who} waited {timeout} s for the others at {address}: check that process 0 runs there, that its port is open to "
        "all machines, and that all processes were started.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(_EXIT_ALONE)
