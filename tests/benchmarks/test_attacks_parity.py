"""AutoAttack leaves what the original leaves: 16 exact CIFAR-10 images on the trained ResNet-20 at 1/255."""

from __future__ import annotations

import numpy as np
import pytest

from robust_vit import attacks

COUNT, EPSILON = 16, 1 / 255

pytestmark = [pytest.mark.parity, pytest.mark.needs_data]
pytest.importorskip("torchattacks", reason="torchattacks is not installed")


def test_auto_attack_leaves_what_the_original_leaves(data_dir, tmp_path):
    import attack_peers
    import real_models

    examples = real_models.images(data_dir, rows=COUNT)
    assert len(examples["label"]) == COUNT
    for name in ("image", "label"):
        np.save(tmp_path / f"{name}.npy", examples[name])
    weights = str(data_dir / "weights" / "resnet20-12fca82f.npz")
    peer = attack_peers.Peer("resnet20", weights, str(tmp_path / "image.npy"), str(tmp_path / "label.npy"))
    theirs = np.asarray(peer.standing(peer.auto_attack(EPSILON, COUNT, COUNT)))
    found = attacks.auto_attack(real_models.resnet20(data_dir), examples, epsilon=EPSILON, slots=COUNT)
    assert 0 < theirs.sum() < COUNT
    assert abs(int(found.robust.sum()) - int(theirs.sum())) <= 1, examples["row"][found.robust != theirs]
