"""What every command of the library shares: one-line errors, flags, log lines, JAX's user-level compilation cache."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from robust_vit import allocation, errors

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count.
_FRACTION = r"\d+(?:\.\d+)?/\d+(?:\.\d+)?"


def logger() -> logging.Logger:
    """The library's logger, writing short lines to standard error."""
    found = logging.getLogger("robust_vit")
    if not found.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        found.addHandler(handler)
        found.setLevel(logging.INFO)
        found.propagate = False
    return found


def define_processes() -> None:
    """The flags of a program that several processes run together; `processes_given` reads them."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where several processes share the work.")
    flags.DEFINE_integer("processes", None, "How many processes there are.")
    flags.DEFINE_integer("process", None, "The number of this process, from 0.")
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes.")


def processes_given() -> dict[str, Any]:
    """What `processes.start` takes, as the flags give it."""
    given = {name: flags.FLAGS[name].value for name in ("coordinator", "processes", "process")}
    return {**given, "timeout": flags.FLAGS["start_timeout"].value}


def configure_jax() -> None:
    """Keeps freed memory, and turns on the persistent compilation cache of the user, unless the environment names one.

    It lives under `XDG_CACHE_HOME` (or `~/.cache`), in a folder of its own for each kind of processor: programs compiled
    for one may not run on another that shares the home folder.
    """
    allocation.keep_freed_memory()
    import jax

    logger()
    # Orbax and TFDS narrate their work through absl; their failures are exceptions.
    absl_logging.set_verbosity(absl_logging.ERROR)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compilation" / _processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def cache_folder() -> pathlib.Path:
    """The library's folder in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(home) if home else pathlib.Path.home() / ".cache") / "robust_vit"


def check_workdir(workdir: str) -> str:
    """The workdir, or a `UserError` where it is the address of a bucket: checkpoints are renamed, which needs a file system."""
    if "://" in workdir:
        raise errors.UserError(
            f"workdir={workdir}: expected a folder; mount the bucket (gcsfuse, with hierarchical namespace) on all machines and "
            "give the mounted path."
        )
    return workdir


@contextlib.contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """Prints a user's mistake, and a device out of memory, as one line and exits with 2; `debug` lets the traceback through.

    One of several processes ends at once, whatever the error: the others cannot go on without it, and it may not wait for them.
    """
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted; run the same command again to go on.", file=sys.stderr)
        _exit(EXIT_INTERRUPTED)
    except Exception as error:
        message = _explain(error)
        if debug or message is None:
            if not _joined():
                raise
            traceback.print_exc()
            _exit(1)
        print(f"error: {message}", file=sys.stderr)
        _exit(errors.EXIT_USER_ERROR)


def _joined() -> bool:
    # Not imported for this: a mistyped flag answers before JAX is loaded.
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _exit(code: int) -> None:
    if _joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flag parsing, in which a mistake in the configuration, by file or by flag, is a `UserError`."""
    if "--help" in argv or "--helpfull" in argv:
        return app.parse_flags_with_usage(list(argv))
    try:
        left = flags.FLAGS(list(argv))
        # A file that could not be loaded says so at the first access only.
        _ = getattr(flags.FLAGS["config"].value, "seed", None) if "config" in flags.FLAGS else None
        return left
    except flags.Error as error:
        raise errors.UserError(f"{_first_line(error)} (--help lists the flags).") from error
    except OSError as error:
        given = next((argument.partition("=")[2] for argument in argv if argument.startswith("--config=")), "")
        raise errors.UserError(f"the configuration file {given} could not be read: see the folder configs/.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise errors.UserError(f"in the configuration: {_first_line(error)}") from error


def evaluate_fractions(argv: Sequence[str]) -> list[str]:
    """Command-line arguments in which a number may be a fraction: `--config.threat.epsilon=8/255`, `(2/255,4/255)`."""

    def value(match: re.Match) -> str:
        numerator, denominator = match.group().split("/")
        return repr(float(numerator) / float(denominator))

    evaluated = []
    for argument in argv:
        name, equals, given = argument.partition("=")
        is_number = re.fullmatch(rf"[\s(,\d./]*{_FRACTION}[\s),\d./]*", given) is not None
        if name.startswith("--config.") and equals and is_number:
            argument = name + equals + re.sub(_FRACTION, value, given)
        evaluated.append(argument)
    return evaluated


def _explain(error: Exception) -> str | None:
    if isinstance(error, errors.UserError):
        return " ".join(str(error).split())
    # Not at the top: a mistyped flag is answered without JAX.
    from robust_vit import programs

    if programs.out_of_memory(error):
        return (
            f"out of memory ({_first_line(error)[:160]}): in training set train.accumulate=auto, lower data.batch, or set "
            "sharding=fsdp on several devices; in a study set batch=auto, or microbatch=auto where it has one. Finished work "
            "is kept. --plan shows what each part takes, and names the setting."
        )
    if "No space left on device" in str(error):
        return f"no space left ({_first_line(error)[:160]}): free some, then run the same command again; finished work is kept."
    return None


def _first_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join((text or type(error).__name__).split())[:400]


def _processor() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
        text = "".join(re.findall(r"^(?:model name|flags|Features)\s*:.*$", text, flags=re.MULTILINE)[:2])
    except OSError:
        text = platform.processor()
    return hashlib.sha256(f"{platform.machine()}{text}".encode()).hexdigest()[:12]
