"""The torch side of `attacks.py`: foolbox and torchattacks, in a process of their own that is idle while the other side runs.

It reads one JSON request a line and answers with one JSON line, as `peers.py` does.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata

import numpy as np
import peers
import torch
import torchattacks

STEPS = 40
STEP = 0.25  # In units of epsilon.


class Normalised(torch.nn.Module):
    """Canonical pixels in, logits out."""

    def __init__(self, network: torch.nn.Module, mean: tuple, std: tuple):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1))

    def forward(self, images):
        return self.network((images - self.mean) / self.std)


class PostNormViT(torch.nn.Module):
    """The ViT of smmk47 under the names of its weights."""

    def __init__(self):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 128))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 65, 128))
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Conv2d(3, 128, 4, 4)
        layer = torch.nn.TransformerEncoderLayer(128, 8, 256, batch_first=True)
        self.transformer = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.mlp_head = torch.nn.Sequential(torch.nn.LayerNorm(128), torch.nn.Linear(128, 10))

    def forward(self, x):
        tokens = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1) + self.pos_embed
        return self.mlp_head(self.transformer(tokens)[:, 0])


def build(model: str, weights: str) -> torch.nn.Module:
    """The network with its weights, canonical pixels in."""
    arrays = np.load(weights)
    state = {name.removeprefix("module."): torch.from_numpy(arrays[name]) for name in arrays.files}
    if model == "resnet20":
        network, mean, std = peers.ResNet20(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    else:
        network, mean, std = PostNormViT(), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    network.load_state_dict(state, strict=False)
    return Normalised(network, mean, std).eval().requires_grad_(False)


class Peer:
    """A model with the images, and the attacks of two libraries on them."""

    def __init__(self, model: str, weights: str, images: str, labels: str):
        self.model = build(model, weights)
        self.images = torch.from_numpy(np.load(images).transpose(0, 3, 1, 2).copy())
        self.labels = torch.from_numpy(np.load(labels)).long()

    def standing(self, images: torch.Tensor) -> list[bool]:
        """Which of the images are classified as their labels."""
        with torch.no_grad():
            found = torch.cat([self.model(part).argmax(1) for part in images.split(128)])
        return (found == self.labels[: len(found)]).tolist()

    def pgd(self, library: str, epsilon: float, size: int, count: int, start: bool) -> torch.Tensor:
        """PGD of 40 steps, `size` images at a time."""
        if library == "torchattacks":
            attack = torchattacks.PGD(self.model, eps=epsilon, alpha=STEP * epsilon, steps=STEPS, random_start=start)
        else:
            import foolbox

            wrapped = foolbox.PyTorchModel(self.model, bounds=(0, 1))
            chosen = foolbox.attacks.LinfPGD(rel_stepsize=STEP, steps=STEPS, random_start=start)

            def attack(images, labels):
                return chosen(wrapped, images, labels, epsilons=epsilon)[1]

        parts = zip(self.images[:count].split(size), self.labels[:count].split(size), strict=True)
        return torch.cat([attack(images, labels) for images, labels in parts])

    def auto_attack(self, epsilon: float, size: int, count: int) -> torch.Tensor:
        """AutoAttack `standard` from torchattacks' members with seed 0 and the published budgets.

        Its own `AutoAttack` gives APGD and FAB 10 steps (version 3.5.1), where the authors' gives them 100.
        """
        ball = {"norm": "Linf", "eps": epsilon, "seed": 0, "n_restarts": 1}
        attack = torchattacks.MultiAttack(
            [
                torchattacks.APGD(self.model, **ball, steps=100, loss="ce"),
                torchattacks.APGDT(self.model, **ball, steps=100, n_classes=10),
                torchattacks.FAB(self.model, **ball, steps=100, multi_targeted=True, n_classes=10),
                torchattacks.Square(self.model, **ball, n_queries=5000),
            ]
        )
        parts = zip(self.images[:count].split(size), self.labels[:count].split(size), strict=True)
        return torch.cat([attack(images, labels) for images, labels in parts])


def _answer(request: dict, held: dict) -> dict:
    do = request.pop("do")
    if do == "version":
        versions = {name: metadata.version(name) for name in ("torch", "foolbox", "torchattacks")}
        return {**versions, "threads": torch.get_num_threads()}
    if do == "build":
        held["peer"] = Peer(**request)
        return {"standing": held["peer"].standing(held["peer"].images)}
    torch.manual_seed(0)
    begin = time.perf_counter()
    found = getattr(held["peer"], do)(**request)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "standing": held["peer"].standing(found)}


def main() -> None:
    """Answers requests until the input ends."""
    held: dict = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), held)), file=answers, flush=True)


if __name__ == "__main__":
    main()
