"""PGD, MI-FGSM and Auto-PGD take the steps of torchattacks: whole trajectories in float64, single steps in float32."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier
from robust_vit.attacks import evaluation, skeleton

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="the parity extra is not installed")
torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")

SHAPE = (8, 8, 3)
CLASSES = 10
COUNT = 48


def _weights():
    rng = np.random.default_rng(0)
    size = int(np.prod(SHAPE))
    return {"u": 3 * rng.normal(size=(size, 64)) / np.sqrt(size), "w": rng.normal(size=(64, CLASSES)) / 2}


def _ours(variables, images):
    return jnp.tanh(images.reshape(images.shape[0], -1) @ variables["u"]) @ variables["w"]


class _Theirs(torch.nn.Module):
    """The same network, which keeps the images that it was asked about."""

    def __init__(self):
        super().__init__()
        self.u, self.w = (torch.tensor(_weights()[name]) for name in "uw")
        self.seen = []

    def forward(self, images):
        images = images.permute(0, 2, 3, 1)
        self.seen.append(images.detach().numpy().copy())
        return torch.tanh(images.reshape(len(images), -1) @ self.u) @ self.w


def _examples(norm):
    # Their projection onto an L2 ball and the box ends at the nearest point of both only where the box does not matter.
    low, high = (0.3, 0.7) if norm == "l2" else (0.0, 1.0)
    images = np.random.default_rng(1).uniform(low, high, size=(COUNT, *SHAPE))
    hidden = np.tanh(images.reshape(COUNT, -1) @ _weights()["u"])
    return images, np.argmax(hidden @ _weights()["w"], axis=-1).astype(np.int32)


def _trajectory(name, epsilon, images, labels):
    """The images that torchattacks evaluates in one run; a targeted one goes for the class that is fourth on the clean image."""
    network = _Theirs()
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels).long()
    torch.manual_seed(0)
    kind, norm = name.split("-")
    norm = {"linf": "Linf", "l2": "L2"}[norm]
    if kind == "pgd":
        torchattacks.PGD(network, eps=epsilon, alpha=epsilon / 4, steps=20)(*given)
    elif kind == "mi_fgsm":
        torchattacks.MIFGSM(network, eps=epsilon, alpha=epsilon / 20, steps=20, decay=0.9)(*given)
    elif kind == "apgd_t":
        attack = torchattacks.APGDT(network, norm=norm, eps=epsilon, steps=40, n_classes=CLASSES)
        attack.target_class = 4
        alone = []
        # One image at a time: in L2 all of a batch move by the step size of its first.
        for index in range(COUNT):
            network.seen = []
            attack.attack_single_run(*(array[index : index + 1] for array in given))
            alone.append(np.stack(network.seen[1:]))  # Before that, the clean image, for the target.
        return list(np.concatenate(alone, axis=1))
    else:
        loss = kind.removeprefix("apgd_")
        torchattacks.APGD(network, norm=norm, eps=epsilon, steps=40, loss=loss).attack_single_run(*given)
    return network.seen


def _build(name, epsilon):
    kind, norm = name.split("-")
    options = {
        "pgd": {"steps": 20, "relative_step": 0.25},
        "mi_fgsm": {"steps": 20, "relative_step": 0.05, "momentum": 0.9},
    }.get(kind, {"steps": 40})
    return attacks.build(kind, epsilon=epsilon, norm=norm, stop_on_success=False, **options)


_NARROW = {"float64": np.float32, "int64": np.int32}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("name", "epsilon"),
    [
        ("pgd-linf", 0.03),
        ("mi_fgsm-linf", 0.03),
        ("apgd_ce-linf", 0.03),
        ("apgd_dlr-linf", 0.03),
        ("apgd_t-linf", 0.03),
        ("apgd_ce-l2", 0.2),
        ("apgd_t-l2", 0.4),
    ],
)
def test_steps_are_those_of_torchattacks(name, epsilon):
    """A run in float64 on its own, and in float32 each step of it from the same state, until an example falls.

    Beyond that the original throws steps away; the DLR loss is constant where the true class is the third, so that they
    follow the sign of rounding. In float32 a long run is no comparison: signs amplify what rounds differently.
    """
    images, labels = _examples(name.split("-")[1])
    theirs = _trajectory(name, epsilon, images, labels)
    keys, attack, step = attacks.example_keys(0, np.arange(COUNT)), _build(name, epsilon), jax.jit(skeleton.advance)
    states = []
    with jax.enable_x64(True):
        model = classifier.wrap(_ours, jax.tree.map(jnp.asarray, _weights()))
        state = attack.init(keys, jnp.asarray(images), jnp.asarray(labels))
        if not name.startswith("mi_fgsm"):  # That starts at the clean image; the others evaluate it and go to a start.
            state = step(state, 0, attack, model)
        if name.startswith("apgd_t"):
            state = state.replace(targets=jnp.roll(state.targets, -2, axis=1))
        state = state.replace(images=jnp.asarray(theirs[0]))
        for expected in theirs[1:]:
            states.append(jax.device_get(state.replace(keys=None)))
            state = step(state, 0, attack, model)
            standing = jax.device_get(~state.success)
            np.testing.assert_allclose(state.images[standing], expected[standing], rtol=0, atol=1e-7)
    states.append(jax.device_get(state.replace(keys=None)))
    assert 0.2 < standing.mean() < 0.95
    model = classifier.wrap(_ours, jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), _weights()))
    narrow = [jax.tree.map(lambda leaf: leaf.astype(_NARROW.get(leaf.dtype.name, leaf.dtype)), s) for s in states]
    once = jax.jit(_auto_step if name.startswith("apgd") else _step)
    away = []
    for (before, after), expected in zip(itertools.pairwise(narrow), theirs[1:], strict=True):
        moved = once(attack, model, before.replace(keys=keys), after)
        away.append(np.abs(np.asarray(moved) - expected)[~after.success])
    away = np.concatenate(away)
    assert (away > 1e-5).mean() <= 1e-5, (away > 1e-5).sum()


def _step(attack, model, before, after):
    del after
    return skeleton.advance(before, 0, attack, model).images


def _auto_step(attack, model, before, after):
    """Auto-PGD's step from the reference's iterate, or from its best one where it goes back there, at its step size.

    Both are looked at anew at checkpoints, where rounding says which of two iterates that have converged is the best.
    """
    run, place = jnp.divmod(before.count - 1, len(attack.course.index))
    found = evaluation.ascent(
        attack._objective, model, after.previous, before.keys, before.labels, before.targets, run, draw=before.count
    )
    return attack._move(before.replace(size=after.size), after.previous, found.gradients, attack._row(place, before))
