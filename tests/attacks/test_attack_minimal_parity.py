"""Minimal attacks beside their references in torch: FAB step by step from the iterates of torchattacks, medians of foolbox."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier
from robust_vit.attacks import boundaries

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="the parity extra is not installed")
torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")

SHAPE = (6, 6, 3)
CLASSES = 5
ORDERS = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}
NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def _bent(variables, images):
    return jnp.tanh(images.reshape(images.shape[0], -1) @ variables["u"]) @ variables["w"]


@pytest.fixture(scope="module")
def pair():
    """One model on both sides, images that it classifies, and their labels. Torch sees the axes in our order."""
    rng = np.random.default_rng(0)
    size = int(np.prod(SHAPE))
    variables = {"u": 2 * rng.normal(size=(size, 24)) / np.sqrt(size), "w": rng.normal(size=(24, CLASSES))}
    variables = {name: array.astype(np.float32) for name, array in variables.items()}
    ours = classifier.wrap(_bent, jax.tree.map(jnp.asarray, variables))
    u, w = torch.from_numpy(variables["u"]), torch.from_numpy(variables["w"])

    class Theirs(torch.nn.Module):
        """The same network; it keeps the images that it was asked about, and whether for a gradient."""

        seen = ()

        def forward(self, images):
            self.seen = (*self.seen, (images.requires_grad, images.detach().numpy().copy()))
            return torch.tanh(images.flatten(1) @ u) @ w

    images = rng.uniform(size=(40, *SHAPE)).astype(np.float32)
    images[:20] = np.round(images[:20])  # Values at the ends of the box.
    labels = np.array(ours(jnp.asarray(images)).argmax(axis=1), np.int32)
    return ours, Theirs().eval(), images, labels


@pytest.mark.parametrize("targets", [0, 3])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_each_step_of_fab_from_the_iterate_of_the_reference(pair, norm, targets):
    """The pixels that differ by more than 1e-5 are at most 1e-5 of them. Its code in torchattacks is AutoAttack's own."""
    ours, theirs, images, labels = pair
    reference = torchattacks.FAB(theirs, norm=NAMES[norm], steps=12, multi_targeted=targets > 0, n_classes=CLASSES)
    given = torch.from_numpy(images), torch.from_numpy(labels).long()
    attack = (
        attacks.build("fab_t", norm=norm, targets=3) if targets else attacks.build("fab", norm=norm, candidates=CLASSES)
    )
    state = attack.init(attacks.example_keys(0, np.arange(40)), jnp.asarray(images), jnp.asarray(labels))
    state = attack.step(ours, state)
    for target in range(max(1, targets)):
        theirs.seen = ()
        reference.target_class = target + 2
        (reference.attack_single_run_targeted if targets else reference.attack_single_run)(*given)
        starts = [index for index, (differentiated, _) in enumerate(theirs.seen) if differentiated]
        assert len(starts) == 12
        differing = []
        for index in starts:
            at = state.replace(images=jnp.asarray(theirs.seen[index][1]), count=jnp.full(40, 1 + 100 * target))
            choose = lambda logits, at=at: attack._choose(at, logits)  # noqa: E731
            moved = attack._move(at, boundaries.linearise(ours, at.images, at.keys, at.labels, choose))
            differing.append(np.abs(np.asarray(moved) - theirs.seen[index + 1][1]))
        differing = np.stack(differing)
        assert (differing > 1e-5).mean() <= 1e-5, differing.max()


class _EuclideanFMN(foolbox.attacks.L2FMNAttack):
    """That of foolbox 3.3.4, whose projection divides a norm by itself so that its radius has no effect, with one that has."""

    def project(self, x, x0, epsilon):
        norms = foolbox.devutils.flatten(x - x0).norms.l2(axis=-1)
        return x0 + (x - x0) * foolbox.devutils.atleast_kd((epsilon / norms).minimum(1.0), x.ndim)


@pytest.mark.parametrize(
    ("name", "norm", "options", "reference"),
    [
        ("ddn", "l2", {}, foolbox.attacks.DDNAttack),
        ("fmn", "linf", {"loss": "margin"}, foolbox.attacks.LInfFMNAttack),
        ("fmn", "l2", {"loss": "margin"}, _EuclideanFMN),
        ("fmn", "l1", {"loss": "margin"}, foolbox.attacks.L1FMNAttack),
    ],
    ids=["ddn-l2", "fmn-linf", "fmn-l2", "fmn-l1"],
)
def test_medians_are_within_a_hundredth_of_the_reference(pair, name, norm, options, reference):
    ours, theirs, images, labels = pair
    keys = attacks.example_keys(0, np.arange(40))
    result = attacks.build(name, norm=norm, steps=100, **options)(ours, keys, images, labels)
    assert np.asarray(result.success).all()
    found = np.asarray(result.distance)
    model = foolbox.PyTorchModel(theirs, bounds=(0, 1), device="cpu")
    given = torch.from_numpy(images)
    moved = reference(steps=100).run(model, given, torch.from_numpy(labels).long())
    distances = torch.linalg.vector_norm((moved - given).flatten(1), ord=ORDERS[norm], dim=1).numpy()
    # Of the reference some end on the boundary itself, without a success.
    succeeded = theirs(moved).argmax(dim=1).numpy() != labels
    assert succeeded.sum() >= 12
    assert np.median(found[succeeded]) == pytest.approx(np.median(distances[succeeded]), rel=0.01)
