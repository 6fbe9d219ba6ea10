"""On the trained ViT of the quickstart: a stronger attack leaves no more images right, within one point."""

from __future__ import annotations

import attack_order
import numpy as np
import pytest

from robust_vit import attacks

COUNT, POINT = 200, 0.01
NAMES = ("FGSM", "PGD-40", "APGD-CE-100", "FMN-100")
SIZES = np.asarray([0.5, 1.0, 1.5, 2.0]) / 255


@pytest.mark.slow
def test_stronger_attacks_leave_less(tmp_path):
    """FGSM >= PGD >= APGD in robust accuracy at every size within a point, and FMN's curve on PGD's or below."""
    subject = attack_order.quickstart(tmp_path)
    left = {}
    for label in NAMES:
        name, options = attack_order.ATTACKS[label]
        left[label] = attack_order.standing(attacks.build(name, **options), subject, SIZES, COUNT)
    pgd = left["PGD-40"]
    assert 0.05 < pgd.min() < pgd.max() < 0.95
    assert (left["FGSM"] >= pgd - POINT).all(), left
    assert (pgd >= left["APGD-CE-100"] - POINT).all(), left
    assert (left["FMN-100"] <= pgd + POINT).all(), left
