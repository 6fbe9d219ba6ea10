"""Mistakes of a user, told in one line: what was given, what is expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # sysexits.h EX_TEMPFAIL: "try again later", what schedulers are told to requeue.


class UserError(Exception):
    """A mistake that the user can mend. The command line prints it without a traceback and exits with 2."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not registered: the nearest known names first, then all of them.

    Args:
      kind: what the name stands for, for example "model".
      given: the name as the user wrote it.
      known: every accepted name.
    """
    known = sorted(str(name) for name in known)
    near = difflib.get_close_matches(str(given), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    return UserError(f"unknown {kind} {given!r}: {hint}Known: {', '.join(known)}.")
