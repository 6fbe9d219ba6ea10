"""`python -m robust_vit.report RUN [RUN ...] [--out DIR]`: one page that compares runs that are on disk."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from robust_vit import errors, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report and prints its path; 2 and one line for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m robust_vit.report", description=main.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a workdir, one run in it, or NAME=RUN")
    parser.add_argument("--out", help="folder of the report; <workdir>/report where one workdir is given")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    try:
        path = report.write([_named(run) for run in given.runs], given.out or _default_folder(given.runs))
    except errors.UserError as error:
        if given.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return errors.EXIT_USER_ERROR
    print(path)
    return 0


def _named(run: str) -> str | tuple[str, str]:
    name, separator, path = run.partition("=")
    return (name, path) if separator and not pathlib.Path(run).exists() else run


def _default_folder(given: Sequence[str]) -> pathlib.Path:
    return pathlib.Path(given[0]) / "report" if len(given) == 1 and "=" not in given[0] else pathlib.Path("report")


if __name__ == "__main__":
    sys.exit(main())
