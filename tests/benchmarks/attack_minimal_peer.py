"""The torch side of `attack_minimal.py`: one attack of another library, in another environment than JAX's.

attack_minimal_peer.py weights.npz given.npz found.npy '{"name": ..., "norm": ..., "library": ..., "options": ...}'
"""

from __future__ import annotations

import inspect
import json
import sys

import adv_lib.attacks
import numpy as np
import peers
import torch
from autoattack import fab_pt

ADV_LIB = {
    "deep_fool": "df",
    "ddn": "ddn",
    "fmn": "fmn",
    "carlini_wagner": "carlini_wagner_l2",
}
ORDERS = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}
FAB_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Normalised(torch.nn.Module):
    """ResNet-20 of canonical pixels."""

    def __init__(self, weights: str):
        super().__init__()
        arrays = np.load(weights)
        self.network = peers.ResNet20()
        state = {name.removeprefix("module."): torch.from_numpy(arrays[name]) for name in arrays.files}
        self.network.load_state_dict(state, strict=False)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1))

    def forward(self, images):
        return self.network((images - self.mean) / self.std)


def fab(model, images, labels, *, name: str, norm: str, options: dict) -> torch.Tensor:
    """The nearest success over the targets: `perturb` itself would end at the first one."""
    found = fab_pt.FABAttack_PT(model, norm=FAB_NORMS[norm], targeted=name == "fab_t", device="cpu", **options)
    if name == "fab":
        return found.attack_single_run(images, labels)
    best, nearest = images.clone(), torch.full((len(images),), torch.inf)
    for target in range(2, options["n_target_classes"] + 2):
        found.target_class = target
        adversarial = found.attack_single_run(images, labels, is_targeted=True)
        distances = _distances(model, images, labels, adversarial, norm)
        nearer = distances < nearest
        best, nearest = torch.where(nearer[:, None, None, None], adversarial, best), torch.minimum(nearest, distances)
    return best


def _distances(model, images, labels, adversarial, norm: str) -> torch.Tensor:
    with torch.inference_mode():
        broken = model(adversarial).argmax(dim=1) != labels
        distances = torch.linalg.vector_norm((adversarial - images).flatten(1), ord=ORDERS[norm], dim=1)
        return torch.where(broken, distances, torch.inf)


def main() -> None:
    """Reads the request, runs the attack, writes distances (infinite without a success)."""
    weights, given, out, request = sys.argv[1:]
    request = json.loads(request)
    model = Normalised(weights).eval().requires_grad_(False)
    arrays = np.load(given)
    images = torch.from_numpy(arrays["images"].transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(arrays["labels"]).long()
    name, norm, options = request["name"], request["norm"], request["options"]
    if request["library"] == "autoattack":
        adversarial = fab(model, images, labels, name=name, norm=norm, options=options)
    else:
        attack = getattr(adv_lib.attacks, ADV_LIB[name])
        if "norm" in inspect.signature(attack).parameters:
            options = {**options, "norm": ORDERS[norm]}
        adversarial = attack(model, images, labels, **options)
    distances = _distances(model, images, labels, adversarial, norm)
    np.save(out, distances.numpy())


if __name__ == "__main__":
    main()
