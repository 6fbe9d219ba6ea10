"""The torch side of `query_attacks.py`: Square of torchattacks, in a process of its own.

It reads one JSON request a line and answers with one JSON line, as `attack_peers.py` does.
"""

from __future__ import annotations

import json
import sys
import time

import attack_peers
import torch
import torchattacks


class Peer(attack_peers.Peer):
    """A model with the images, and torchattacks' Square on them."""

    def square(self, norm: str, epsilon: float, queries: int, seed: int) -> dict:
        """torchattacks' Square, which leaves an image alone as soon as it is broken."""
        name = {"linf": "Linf", "l2": "L2"}[norm]
        attack = torchattacks.Square(self.model, norm=name, eps=epsilon, n_queries=queries, seed=seed)
        return {"standing": self.standing(attack(self.images, self.labels))}


def _answer(request: dict, held: dict) -> dict:
    do = request.pop("do")
    if do == "version":
        return {"torch": torch.__version__, "torchattacks": torchattacks.__version__}
    if do == "build":
        held["peer"] = Peer(**request)
        return {"standing": held["peer"].standing(held["peer"].images)}
    begin = time.perf_counter()
    found = getattr(held["peer"], do)(**request)
    return {**found, "seconds": time.perf_counter() - begin}


def main() -> None:
    """Answers requests until the input ends."""
    held: dict = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), held)), file=answers, flush=True)


if __name__ == "__main__":
    main()
