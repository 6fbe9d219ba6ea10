"""Threat models: names and sizes are each other's inverse."""

from __future__ import annotations

import pytest

from robust_vit import attacks, errors
from robust_vit.attacks import norms

ROWS = {
    "mnist/linf-0.3": ("linf", 0.3, 10_000),
    "fashion_mnist/linf-0.1": ("linf", 0.1, 10_000),
    "cifar10/linf-8": ("linf", 8 / 255, 10_000),
    "cifar10/l2-0.5": ("l2", 0.5, 10_000),
    "cifar10/l1-12.0": ("l1", 12.0, 1_000),
    "cifar100/linf-8": ("linf", 8 / 255, 10_000),
    "imagenet/linf-4": ("linf", 4 / 255, 5_000),
    "imagenet/l2-3.0": ("l2", 3.0, 5_000),
}


def test_every_threat_model_has_a_row():
    assert set(ROWS) == set(attacks.THREATS)


@pytest.mark.parametrize("name", ROWS)
def test_registered_names_mean_what_the_papers_mean(name):
    found = attacks.threat(name)
    assert (found.norm.name, found.epsilon, found.examples) == ROWS[name]
    assert found.name == name
    assert found.source


@pytest.mark.parametrize(
    ("name", "norm", "epsilon", "canonical"),
    [
        ("cifar10/linf-16", norms.LINF, 16 / 255, "cifar10/linf-16"),
        ("cifar10/linf-8/255", norms.LINF, 8 / 255, "cifar10/linf-8"),
        ("textured_shapes/linf-0.05", norms.LINF, 0.05, "textured_shapes/linf-0.05"),
        ("imagenet/l2-3", norms.L2, 3.0, "imagenet/l2-3.0"),
        ("cifar10/l1-12", norms.L1, 12.0, "cifar10/l1-12.0"),
        ("cifar10/linf-0.5/255", norms.LINF, 0.5 / 255, None),
        ("cifar10/linf-1.0", norms.LINF, 1.0, "cifar10/linf-255"),
    ],
)
def test_any_size_can_be_named(name, norm, epsilon, canonical):
    found = attacks.threat(name)
    assert found.norm is norm
    assert found.epsilon == pytest.approx(epsilon, rel=1e-12)
    assert found.name == (canonical or found.name)
    assert found is attacks.THREATS.get(found.name, found)
    again = attacks.threat(found.name)
    assert (again.norm, again.epsilon) == (found.norm, pytest.approx(found.epsilon, rel=1e-12))


@pytest.mark.parametrize(
    "name", ["cifar10/linf8", "cifar10", "cifar10/l7-8", "cifar10/linf-8/0", "cifar10/linf-1.2.3", ""]
)
def test_a_name_that_means_nothing_lists_the_known(name):
    with pytest.raises(errors.UserError, match="cifar10/linf-8"):
        attacks.threat(name)
