"""Torch in a process of its own, idle while this one computes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys


class Torch:
    """The other process, that answers one request at a time.

    Args:
      python: of an environment that has torch.
      script: beside this file: reads a JSON request a line and answers with a JSON line.
    """

    def __init__(self, python: str, script: str):
        script = str(pathlib.Path(__file__).with_name(script))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([python, script], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def ask(self, **request) -> dict:
        """The answer; exits with the request where there is none."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the torch process ended at {request}: has its Python what the script imports (--peer_python)?")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)
