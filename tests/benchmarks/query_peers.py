"""The torch side of `query_attacks.py`: Square of torchattacks, HopSkipJump of foolbox, in a process of their own.

It reads one JSON request a line and answers with one JSON line, as `attack_peers.py` does.
"""

from __future__ import annotations

import json
import sys
import time

import attack_peers
import foolbox
import numpy as np
import torch
import torchattacks


class Peer(attack_peers.Peer):
    """A model with the images, and the attacks by queries of two libraries on them."""

    def square(self, norm: str, epsilon: float, queries: int, seed: int) -> dict:
        """torchattacks' Square, which leaves an image alone as soon as it is broken."""
        name = {"linf": "Linf", "l2": "L2"}[norm]
        attack = torchattacks.Square(self.model, norm=name, eps=epsilon, n_queries=queries, seed=seed)
        return {"standing": self.standing(attack(self.images, self.labels))}

    def hop_skip_jump(self, norm: str, steps: int, seed: int) -> dict:
        """foolbox's HopSkipJump from its own start; distances, and the queries of each image."""
        asked = 0

        def counted(images):
            nonlocal asked
            asked += len(images)
            return self.model(images)

        counted_model = torch.nn.Module()
        counted_model.forward = counted
        torch.manual_seed(seed)
        np.random.seed(seed)
        wrapped = foolbox.PyTorchModel(counted_model.eval(), bounds=(0, 1))
        attack = foolbox.attacks.HopSkipJumpAttack(steps=steps, constraint=norm)
        found = attack.run(wrapped, self.images, self.labels)
        apart = (found - self.images).flatten(1)
        distances = apart.abs().amax(1) if norm == "linf" else apart.norm(dim=1)
        standing = self.standing(found)
        return {"distances": distances.tolist(), "standing": standing, "queries": asked / len(self.images)}


def _answer(request: dict, held: dict) -> dict:
    do = request.pop("do")
    if do == "version":
        return {"torch": torch.__version__, "foolbox": foolbox.__version__, "torchattacks": torchattacks.__version__}
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
