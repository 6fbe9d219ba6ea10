"""AutoAttack: no weaker than any member, the same by parts and after a kill, closed form on affine models, few classes."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors
from robust_vit.attacks import norms, suites

SHAPE, COUNT = (3, 3, 2), 17
OPTIONS = {"slots": 6, "stride": 7}


def _bent(variables, images):
    return jnp.tanh(images.reshape(images.shape[0], -1) @ variables["u"]) @ variables["w"]


def _model(classes: int = 5, seed: int = 0):
    rng = np.random.default_rng(seed)
    size = int(np.prod(SHAPE))
    variables = {"u": 2 * rng.normal(size=(size, 16)) / np.sqrt(size), "w": rng.normal(size=(16, classes))}
    return classifier.wrap(_bent, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), variables))


def _examples(model, seed: int = 1, count: int = COUNT):
    images = np.random.default_rng(seed).uniform(size=(count, *SHAPE)).astype(np.float32)
    labels = np.array(jax.jit(lambda m, x: m(x))(model, images).argmax(axis=-1), np.int32)
    labels[::6] = (labels[::6] + 1) % 2
    return {"image": images, "label": labels, "row": np.arange(100, 100 + count)}


def _small(epsilon: float = 0.05, steps: int = 12) -> dict[str, attacks.Attack]:
    """The members of the standard version with budgets of a test."""
    return {
        "apgd_ce": attacks.build("apgd_ce", epsilon=epsilon, steps=steps),
        "apgd_t": attacks.build("apgd_t", epsilon=epsilon, steps=steps, targets=3),
        "fab_t": attacks.build("fab_t", epsilon=epsilon, norm="linf", steps=steps, targets=3),
        "square": attacks.build("square", epsilon=epsilon, queries=40),
    }


def _assert_same(found: attacks.SuiteResult, expected: attacks.SuiteResult) -> None:
    for name, array in expected.records().items():
        np.testing.assert_array_equal(found.records()[name], array, err_msg=name)


@pytest.fixture(scope="module")
def examples():
    return _examples(_model())


@pytest.fixture(scope="module")
def whole(examples):
    return attacks.auto_attack(_model(), examples, epsilon=0.05, attacks=_small(), **OPTIONS)


def test_it_is_no_weaker_than_any_member_and_the_bits_say_so(examples, whole):
    alone = attacks.auto_attack(_model(), examples, epsilon=0.05, attacks=_small(), individual=True, **OPTIONS)
    assert 0 < whole.robust.sum() < whole.correct.sum() < COUNT
    for column in range(4):
        assert not (whole.robust & alone.success[:, column]).any()
    # The union over attacks that each met every image is what the sequence finds; each of its own bits is the same.
    np.testing.assert_array_equal(alone.robust, whole.robust)
    np.testing.assert_array_equal(alone.success[whole.attempted], whole.success[whole.attempted])
    np.testing.assert_array_equal(alone.attempted, np.tile(whole.correct[:, None], (1, 4)))
    # An attack is tried on what those before it left.
    before = np.cumsum(whole.success, axis=1) - whole.success
    np.testing.assert_array_equal(whole.attempted, whole.correct[:, None] & (before == 0))
    assert np.isnan(whole.distance[~whole.attempted]).all()
    assert (whole.distance[whole.success] <= 0.05 * (1 + 1e-5)).all()
    assert [line["fell"] for line in whole.log] == whole.success.sum(axis=0).tolist()
    assert whole.log[-1]["robust_accuracy"] == whole.robust.mean()
    assert all(line["useful"] <= line["executed"] for line in whole.log)


@pytest.mark.parametrize(
    ("count", "slots", "devices", "expected", "on_accelerator"),
    [
        (128, 16, 1, 16, 16),
        (25, 16, 1, 16, 16),
        (17, 16, 1, 6, 12),  # Three rounds of 6 are 18 passes, two of 12 are 24.
        (49, 16, 1, 8, 16),
        (3, 64, 1, 1, 4),
        (1, 8, 1, 1, 1),
        (1, 64, 8, 8, 8),
        (33, 32, 8, 8, 32),
        (7, 50, 1, 8, 8),
        (2, 3, 8, 3, 3),
    ],
)
def test_slots_follow_what_is_left(monkeypatch, count, slots, devices, expected, on_accelerator):
    """On a CPU idle slots cost time; on an accelerator rounds do. The devices divide the slots."""
    assert suites._shared(count, slots, devices) == expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert suites._shared(count, slots, devices) == on_accelerator


@pytest.mark.parametrize(("slots", "devices", "most"), [(64, 1, 11), (64, 8, 5), (50, 1, 10), (16, 1, 7)])
def test_slots_are_of_few_sizes_which_each_compile(slots, devices, most):
    sizes = {suites._shared(count, slots, devices) for count in range(1, 257)}
    assert len(sizes) <= most
    assert max(sizes) == slots


def test_the_same_from_a_stream_with_padding(examples, whole):
    def part(start, stop, padding):
        batch = {name: array[start:stop] for name, array in examples.items()}
        batch = {
            name: np.concatenate([array, np.zeros_like(array[:1]).repeat(padding, 0)]) for name, array in batch.items()
        }
        return {**batch, "mask": np.arange(stop - start + padding) < stop - start}

    stream = [part(0, 9, 2), part(9, COUNT, 3)]
    _assert_same(attacks.auto_attack(_model(), stream, epsilon=0.05, attacks=_small(), **OPTIONS), whole)
    with pytest.raises(errors.UserError, match="iterator, which can be read only once"):
        attacks.auto_attack(_model(), iter(stream), epsilon=0.05, attacks=_small(), **OPTIONS)


def test_a_killed_suite_goes_on_where_it_was(examples, whole, tmp_path):
    class Killed(Exception):
        pass

    class Dying:
        """Batches of which the second cannot be read any more at the third attack."""

        reads = 0

        def __iter__(self):
            self.reads += 1
            yield {name: array[:9] for name, array in examples.items()}
            if self.reads > 3:
                raise Killed
            yield {name: array[9:] for name, array in examples.items()}

    options = {**OPTIONS, "epsilon": 0.05, "attacks": _small(), "directory": tmp_path}
    with pytest.raises(Killed):
        attacks.auto_attack(_model(), Dying(), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0_apgd_ce", "1_apgd_t", "2_fab_t", "clean"]
    _assert_same(attacks.auto_attack(_model(), examples, **options), whole)
    with pytest.raises(errors.UserError, match="another model"):
        attacks.auto_attack(_model(seed=3), examples, **options)


def _beside_a_plane(variables, images):
    distance = variables["scale"] * jnp.sum(images - 0.75, axis=(1, 2, 3))
    return jnp.stack([distance, -distance], axis=-1)


def test_a_small_ball_is_not_lost_in_the_rounding_of_pixels():
    """Near 1 a float32 pixel is rounded by more than a hundred-thousandth of such a radius: successes at the border count."""
    epsilon = 0.05 / 255
    model = classifier.wrap(_beside_a_plane, {"scale": jnp.float32(100.0)})
    images = (0.75 + 0.5 * epsilon * np.random.default_rng(4).uniform(-1, 1, size=(COUNT, *SHAPE))).astype(np.float32)
    labels = np.array(jax.jit(lambda m, x: m(x))(model, images).argmax(axis=-1), np.int32)
    examples = {"image": images, "label": labels}
    attack = attacks.build("apgd_ce", epsilon=epsilon, steps=12)
    alone = attacks.run(attack, model, examples, **OPTIONS)
    assert alone.success.all()
    assert (alone.distance[alone.success] > epsilon * (1 + 1e-5)).any()
    found = attacks.auto_attack(model, examples, epsilon=epsilon, attacks={"apgd_ce": attack}, **OPTIONS)
    np.testing.assert_array_equal(found.success[:, 0], alone.success)


def test_affine_models_break_at_the_exact_distance():
    """The published suite: nothing below the distance in the box, everything 1 % above it."""
    model = closed_forms.model(3, SHAPE, 4)
    images = np.random.default_rng(1).uniform(size=(5, *SHAPE)).astype(np.float32)
    labels = np.array(model(jnp.asarray(images)).argmax(axis=-1), np.int32)
    exact = closed_forms.distances("linf", model, images, labels)
    nearest = np.argsort(exact)[2]
    for factor, expected in ((0.99, exact < 0.99 * exact[nearest]), (1.01, exact < 1.01 * exact[nearest])):
        found = attacks.auto_attack(model, {"image": images, "label": labels}, epsilon=factor * exact[nearest], slots=5)
        np.testing.assert_array_equal(~found.robust, expected)
        assert not found.notes


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_few_classes_are_told_and_attacked(classes, version):
    given = {"epsilon": 0.1, "norm": norms.LINF, "classes": classes}
    found, notes = suites.members(version, **given)
    assert len(found) == (4 if version == "standard" else 6)
    assert any("apgd_t needs 4" in note for note in notes)
    assert any("apgd_dlr needs 3" in note for note in notes) == (version == "plus" and classes == 2)
    with pytest.raises(errors.UserError, match="set exact=False"):
        suites.members(version, **given, exact=True)
    if version == "standard" and classes == 2:
        model = _model(classes)
        short = {
            name: attack.replace(steps=5) if hasattr(attack, "steps") else attack.replace(queries=20)
            for name, attack in found.items()
        }
        assert attacks.auto_attack(
            model, _examples(model, count=6), epsilon=0.1, attacks=short, **OPTIONS
        ).success.any()


def test_the_published_budgets():
    given = {"epsilon": 8 / 255, "classes": 10}
    found, notes = suites.members("standard", norm=norms.LINF, **given)
    assert list(found) == ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert not notes
    assert (found["apgd_ce"].steps, found["apgd_ce"].restarts) == (100, 1)
    assert (found["apgd_t"].steps, found["apgd_t"].targets) == (100, 9)
    assert (found["fab_t"].steps, found["fab_t"].targets) == (100, 9)
    assert (found["square"].queries, found["square"].rescale) == (5000, False)
    found, _ = suites.members("plus", norm=norms.L2, **given)
    assert list(found) == ["apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"]
    assert found["apgd_ce"].restarts == found["apgd_dlr"].restarts == found["fab"].restarts == 5
    found, notes = suites.members("standard", norm=norms.L1, **given)
    assert (found["apgd_ce"].restarts, found["apgd_t"].targets, found["fab_t"].targets) == (5, 5, 9)
    assert "Square is not defined for L1 here: it is left out" in notes
    found, notes = suites.members("plus", norm=norms.L1, **given)
    assert list(found) == ["apgd_ce", "apgd_dlr", "fab", "apgd_t", "fab_t"]
    assert found["apgd_t"].targets == 9
    assert "Square is not defined for L1 here: it is left out" in notes
    with pytest.raises(errors.UserError, match="standrad.*standard"):
        suites.members("standrad", norm=norms.L2, **given)


def test_exact_is_the_published_suite_or_refused():
    given = {"epsilon": 0.25, "norm": norms.L2, "classes": 100, "exact": True}
    found, notes = suites.members("plus", **given)
    assert not notes
    assert not any(found[name].stop_on_success for name in ("apgd_ce", "apgd_dlr", "apgd_t"))
    assert not found["fab"].end_early
    assert not found["fab_t"].end_early
    # Random starts at half of epsilon, and the boundaries of all classes.
    assert (found["fab"].epsilon, found["fab"].candidates) == (0.25, 100)
    assert suites.members("plus", **{**given, "exact": False})[0]["fab"].candidates == 10
    with pytest.raises(errors.UserError, match="Square is not defined for L1.*set exact=False"):
        suites.members("standard", **{**given, "norm": norms.L1})
    with pytest.raises(errors.UserError, match="give one of them"):
        attacks.auto_attack(_model(), {}, epsilon=0.1, attacks=_small(), exact=True)


def test_fab_that_does_not_end_early_seeks_on_from_starts_at_half_of_epsilon(examples):
    given = {key: examples[key] for key in ("image", "label")}
    options = {"norm": "l2", "steps": 8, "restarts": 2, "candidates": 5}
    ending, seeking, free = (
        attacks.run(attacks.build("fab", **options, **more), _model(), given, slots=6)
        for more in ({"epsilon": 0.5}, {"epsilon": 0.5, "end_early": False}, {})
    )
    right = examples["label"] == np.asarray(jax.jit(lambda m, x: m(x))(_model(), examples["image"])).argmax(axis=-1)
    assert (seeking.backward_passes[right] == 2 * 8 * 4).all()
    assert (ending.backward_passes[right] < 2 * 8 * 4).any()
    assert (seeking.distance <= ending.distance + 1e-6).all()
    assert (seeking.distance[right] != free.distance[right]).any()


def _beside_an_offset(variables, images):
    far = variables["offset"] + 10.0 * (jnp.max(images, axis=(1, 2, 3)) - 0.6)
    return jnp.stack([jnp.full_like(far, variables["offset"]), far], axis=-1)


@pytest.mark.parametrize("share", [1.0, 0.999])
def test_no_stretch_takes_a_success_out_of_epsilon(share):
    """The margin at epsilon is within the rounding of logits near 1,000, where a longer way would be tried."""
    model, epsilon = classifier.wrap(_beside_an_offset, {"offset": jnp.float32(1000.0)}), np.float32(0.1003)
    clean = jnp.full((2, *SHAPE), 0.5)
    attack = attacks.build("fab", norm="linf", epsilon=epsilon)
    found = clean + share * jnp.asarray([epsilon, 2 * epsilon])[:, None, None, None]
    keys = attacks.example_keys(0, np.arange(2))
    state = attack.init(keys, clean, jnp.zeros(2, jnp.int32))
    state = attack.record(state.replace(images=found), found, jnp.ones(2, bool))
    result = attack.finish(model, state)
    assert result.success.all()
    np.testing.assert_array_equal(norms.within(result.distance, epsilon), [True, False])
    # Farther away than epsilon it is stretched as ever, and here at once certain.
    np.testing.assert_array_equal(result.images[1], found[1])


def _noisy(variables, images, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys)
    return _bent(variables, images + 0.02 * noise)


def test_a_stochastic_model_is_attacked_through_its_mean():
    plain = _model()
    model = classifier.wrap(_noisy, plain.variables, stochastic=True)
    examples = _examples(plain, count=6)
    with pytest.raises(errors.UserError, match="version='standard' for a deterministic one"):
        attacks.auto_attack(plain, examples, epsilon=0.1, version="rand")
    found = attacks.auto_attack(model, examples, epsilon=0.2, version="rand", slots=6)
    assert found.names == ("apgd_ce", "apgd_dlr")
    assert found.success.sum() >= 0.8 * found.correct.sum()
    # 20 draws an evaluation, and as many to judge.
    assert (found.forward_passes[found.attempted] % suites.SAMPLES == 0).all()
