"""What is particular to each minimal attack: its step against plain NumPy in float64, its ends, its costs."""

from __future__ import annotations

import itertools

import bent_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors, losses
from robust_vit.attacks import boundaries, minimal, norms

SHAPE = bent_models.SHAPE
KEYS = bent_models.KEYS


# A success is recorded where it is nearest, and ends what has nothing left to seek.


def test_the_nearest_success_is_kept_and_the_clean_image_ends_the_search():
    attack = attacks.build("fmn", norm="l2")
    clean = jnp.full((3, *SHAPE), 0.5)
    state = attack.init(KEYS[:3], clean, jnp.zeros(3, jnp.int32))
    far, near = clean + 0.2, clean - 0.1
    state = attack.record(state, far, jnp.array([True, True, False]))
    state = attack.record(state, near, jnp.array([True, False, False]))
    state = attack.record(state, far, jnp.array([True, False, False]))
    np.testing.assert_allclose(state.nearest, np.sqrt(18) * np.array([0.1, 0.2, np.inf]), rtol=1e-5)
    np.testing.assert_array_equal(state.best, np.stack([near[0], far[1], clean[2]]))
    np.testing.assert_array_equal(state.success, [True, True, False])
    assert not state.done.any()
    np.testing.assert_array_equal(
        attack.record(state, clean, jnp.array([False, True, False])).done, [False, True, False]
    )


@pytest.mark.parametrize("name", ["ddn", "fmn", "fab_t"])
def test_an_epsilon_ends_at_the_first_success_within_it(name):
    """The same decision at that size as the whole search, for fewer passes; another size compiles nothing."""
    model, images = bent_models.model(), bent_models.images()
    labels = bent_models.predict(model, images)
    options = {"norm": "l2", "steps": 30}
    whole = attacks.build(name, **options)(model, KEYS, images, labels)
    sizes = np.quantile(np.asarray(whole.distance), [0.3, 0.7])
    traces, total = [], 0
    for size in sizes:
        result = attacks.build(name, **options, epsilon=size)(model, KEYS, images, labels)
        found = np.asarray(result.success & (result.distance <= size * (1 + 1e-5)))
        np.testing.assert_array_equal(found, np.asarray(whole.distance) <= size)
        saved = np.asarray(whole.forward_passes - result.forward_passes)
        assert (saved[found] >= 0).all()
        assert (saved[~found] == 0).all()
        total += saved.sum()
        traces.append(len(bent_models.TRACES))
    assert total > 0
    assert traces[0] == traces[1]


def test_a_success_that_rounding_undoes_is_stretched_until_it_holds():
    """The boundary is where the sum of the values is 9: a success that is short of it, on it, past it, and not to be mended."""
    variables = {"w": jnp.stack([jnp.zeros(18), jnp.ones(18)], axis=1), "b": jnp.array([9.0, 0.0])}
    model = classifier.wrap(_affine, variables)
    attack = attacks.build("fmn", norm="l2")
    clean = jnp.full((4, *SHAPE), 0.25)
    exact = 0.25
    moves = exact * jnp.array([1 - 1e-3, 1.0, 1.2, 0.5])
    state = attack.init(KEYS[:4], clean, jnp.zeros(4, jnp.int32))
    state = state.replace(best=clean + moves[:, None, None, None], success=jnp.ones(4, bool), images=clean)
    result = attack.finish(model, state)
    stretches = np.asarray((result.images - clean).mean(axis=(1, 2, 3)) / moves)
    np.testing.assert_allclose(stretches, [1.003, 1.0003, 1.0, 1.03], rtol=1e-5)
    np.testing.assert_array_equal(result.success, [True, True, True, False])


def _affine(variables, images):
    return images.reshape(images.shape[0], -1) @ variables["w"] + variables["b"][None]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_slope_of_a_norm_is_its_dual(norm):
    gradients = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    exact = np.linalg.norm(gradients.reshape(5, -1), ord=dual, axis=1)
    np.testing.assert_allclose(minimal.slope(norms.find(norm), gradients), exact, rtol=1e-6)


# Boundaries made linear.


def test_boundaries_are_the_jacobian_and_a_gradient_that_is_not_finite_is_none():
    with jax.enable_x64(True):
        model, images = bent_models.model(dtype=np.float64), bent_models.images(dtype=np.float64)
        labels = bent_models.predict(model, images)
        jacobian = jax.vmap(jax.jacobian(lambda image: model(image[None])[0]))(jnp.asarray(images))
        logits = np.asarray(model(images))
        choose = lambda logits: boundaries.most_likely_rivals(logits, jnp.asarray(labels), 2)  # noqa: E731
        found = boundaries.linearise(model, jnp.asarray(images), KEYS, jnp.asarray(labels), choose)
        for row, label in enumerate(labels):
            rivals = [k for k in np.argsort(-logits[row]) if k != label][:2]
            np.testing.assert_allclose(found.gaps[row], logits[row, label] - logits[row, rivals], rtol=1e-12)
            wanted = np.asarray(jacobian)[row, rivals] - np.asarray(jacobian)[row, label]
            np.testing.assert_allclose(found.normals[row], wanted, rtol=1e-9, atol=1e-12)
        assert not found.vanished.any()

    broken = classifier.wrap(lambda images: jnp.sqrt(images.reshape(len(images), -1)[:, :4]))
    images = bent_models.images()
    images[1, 0, 0, 0] = 0.0
    found = boundaries.linearise(broken, jnp.asarray(images), KEYS, jnp.zeros(6, jnp.int32), choose)
    np.testing.assert_array_equal(found.vanished, np.arange(6) == 1)
    assert np.isfinite(found.normals).all()


# DDN and FMN.


def test_ddn_turns_by_steps_and_its_radius_follows_success():
    with jax.enable_x64(True):
        model, images = bent_models.model(dtype=np.float64), bent_models.images(dtype=np.float64)
        labels = bent_models.predict(model, images)
        attack = attacks.build("ddn", steps=8, start_radius=0.7, radius_change=0.1)
        states = bent_models.walk(attack, model, KEYS, images, labels, 8)
        radius, current = np.full(6, 0.7), images.astype(np.float64)
        for count in range(8):
            gradients = jax.grad(lambda x: losses.cross_entropy(model(x), labels).sum())(jnp.asarray(current))
            achieved = bent_models.predict(model, current) != labels
            step = 0.01 + 0.99 * (1 + np.cos(np.pi * count / 8)) / 2
            difference = current - images + step * _unit(np.asarray(gradients))
            radius = radius * np.where(achieved, 0.9, 1.1)
            current = np.clip(images + radius[:, None, None, None] * _unit(difference), 0, 1)
            np.testing.assert_allclose(states[count + 1].images, current, atol=1e-12)
        assert achieved.any()


def _unit(array):
    return array / np.sqrt((array**2).sum(axis=(1, 2, 3), keepdims=True))


def test_ddn_returns_values_of_an_eight_bit_image():
    model, images = bent_models.model(), np.round(bent_models.images() * 255) / np.float32(255)
    labels = bent_models.predict(model, images)
    result = attacks.build("ddn", steps=30, levels=256)(model, KEYS, images, labels)
    assert np.asarray(result.success).all()
    found = np.asarray(result.images, np.float64) * 255
    np.testing.assert_allclose(found, np.round(found), atol=1e-4)


def test_ddn_leaves_a_plateau_in_directions_of_each_example():
    """Logits that do not change within 0.1 of the clean image: each example steps by its own draw, the same with any other."""
    model = classifier.wrap(_plateau)
    images = np.full((3, *SHAPE), 0.5, np.float32)
    attack = attacks.build("ddn", steps=20, start_radius=0.5)
    labels = np.zeros(3, np.int32)
    states = bent_models.walk(attack, model, KEYS[:3], images, labels, 1)
    moved = np.asarray(states[1].images) - images
    assert np.abs(moved[0] - moved[1]).max() > 0.01
    np.testing.assert_allclose(np.sqrt((moved**2).sum(axis=(1, 2, 3))), 0.5 * 1.05, rtol=1e-5)
    np.testing.assert_array_equal(states[1].vanished, 1)
    alone = bent_models.walk(attack, model, KEYS[1:2], images[1:2], labels[1:2], 1)
    np.testing.assert_allclose(alone[1].images[0], states[1].images[1], rtol=1e-6)
    assert np.asarray(attack(model, KEYS[:3], images, labels).success).all()


def _plateau(images):
    distance = jnp.maximum(jnp.abs(images - 0.5).max(axis=(1, 2, 3)) - 0.1, 0.0)
    return jnp.stack([0.05 - distance, distance], axis=-1)


def test_the_ball_of_fmn_ends_at_the_boundary_then_follows_success():
    with jax.enable_x64(True):
        model, images = bent_models.model(dtype=np.float64), bent_models.images(dtype=np.float64)
        labels = bent_models.predict(model, images)
        attack = attacks.build("fmn", norm="linf", steps=12, loss="margin")
        states = bent_models.walk(attack, model, KEYS, images, labels, 12)
        seen = np.zeros(6, bool)
        for count, (before, after) in enumerate(itertools.pairwise(states)):
            gradients = jax.grad(lambda x: losses.margin(model(x), labels).sum())(before.images)
            margin = np.asarray(losses.margin(model(before.images), labels))
            size = np.abs(before.images - images).max(axis=(1, 2, 3))
            estimate = (size + np.abs(margin) / np.abs(gradients).sum(axis=(1, 2, 3))) * 1.001
            change = 0.001 + 0.049 * (1 + np.cos(np.pi * count / 12)) / 2
            shrunk = np.minimum(np.asarray(before.radius) * (1 - change), after.nearest)
            grown = np.where(seen, np.asarray(before.radius) * (1 + change), estimate)
            radius = np.where(margin > 0, shrunk, grown)
            np.testing.assert_allclose(after.radius, np.minimum(radius, np.maximum(images, 1 - images).max((1, 2, 3))))
            length = 0.01 + 0.99 * (1 + np.cos(np.pi * count / 12)) / 2
            moved = before.images + length * _unit(np.asarray(gradients))
            wide = np.asarray(after.radius)[:, None, None, None]
            np.testing.assert_allclose(after.images, np.clip(np.clip(moved, images - wide, images + wide), 0, 1))
            seen |= margin > 0
        assert seen.any()


@pytest.mark.parametrize(
    ("norm", "sizes"), [("linf", (0.02, 0.05, 0.1)), ("l2", (0.1, 0.2, 0.4)), ("l1", (0.3, 0.8, 1.5))]
)
def test_one_run_of_fmn_lies_on_or_below_the_curve_of_pgd(norm, sizes):
    count = 40
    model, images = bent_models.model(3), bent_models.images(2, count)
    labels, keys = bent_models.predict(model, images), attacks.example_keys(0, np.arange(count))
    distances = np.asarray(attacks.build("fmn", norm=norm, steps=60)(model, keys, images, labels).distance)
    attack = attacks.build("pgd", norm=norm, epsilon=0.1, steps=20)
    for size in sizes:
        bounded = np.asarray(attack.replace(epsilon=np.float32(size))(model, keys, images, labels).success)
        assert 0.05 < bounded.mean() < 0.95
        assert (distances <= size).mean() >= bounded.mean()


def _far_and_near(images):
    """Class 1 is likelier at the clean image 0, and 0.5 away along the first value; class 2 is 0.2 away along the second."""
    first, second = images[:, 0, 0, 0], images[:, 0, 1, 0]
    return jnp.stack([jnp.zeros_like(first), 2 * first - 1, 10 * second - 2], axis=-1)


@pytest.mark.parametrize(("loss", "distance"), [("margin", 0.5), ("cross_entropy", 0.2), ("both", 0.2)])
def test_fmn_that_starts_on_the_cross_entropy_sees_a_class_that_is_nearer_and_less_likely(loss, distance):
    attack = attacks.build("fmn", norm="linf", loss=loss)
    found = attack(classifier.wrap(_far_and_near), KEYS[:1], jnp.zeros((1, 1, 2, 1)), jnp.zeros(1, jnp.int32))
    assert found.success.all()
    np.testing.assert_allclose(found.distance, distance, rtol=0.01)


def _confident(variables, images):
    return 1e4 * _affine(variables, images)


def test_fmn_on_both_losses_finds_its_way_where_the_softmax_saturates():
    """The cross-entropy of these logits has no slope anywhere: the margin of the second half has, and ends on the boundary."""
    variables = {"w": jnp.stack([jnp.zeros(18), jnp.ones(18)], axis=1), "b": jnp.array([9.0, 0.0])}
    clean, labels = jnp.full((1, *SHAPE), 0.25), jnp.zeros(1, jnp.int32)
    model = classifier.wrap(_confident, variables)
    found = attacks.build("fmn", norm="l2")(model, KEYS[:1], clean, labels)
    assert found.success.all()
    np.testing.assert_allclose(found.distance, 0.25 * np.sqrt(18), rtol=0.01)
    assert not attacks.build("fmn", norm="l2", loss="cross_entropy")(model, KEYS[:1], clean, labels).success.any()


# DeepFool and FAB.


def test_deep_fool_steps_to_the_nearest_of_all_boundaries():
    with jax.enable_x64(True):
        model, images = bent_models.model(dtype=np.float64), 0.3 + 0.4 * bent_models.images(dtype=np.float64)
        labels = bent_models.predict(model, images)
        jacobian = jax.vmap(jax.jacobian(lambda image: model(image[None])[0]))
        for norm, order in (("l2", 2), ("linf", 1)):
            attack = attacks.build("deep_fool", norm=norm, overshoot=0.02, candidates=4)
            states = bent_models.walk(attack, model, KEYS, images, labels, 3)
            assert not states[1].done.any()
            totals = np.zeros_like(images)
            for before, after in itertools.pairwise(states):
                slopes, logits = np.asarray(jacobian(before.images)), np.asarray(model(before.images))
                for row, label in enumerate(labels):
                    if before.done[row] or after.done[row]:
                        continue
                    others = [k for k in range(4) if k != label]
                    normals = slopes[row, others] - slopes[row, label]
                    sizes = np.linalg.norm(normals.reshape(3, -1), ord=order, axis=1)
                    distances = (logits[row, label] - logits[row, others]) / sizes
                    nearest = distances.argmin()
                    direction = normals[nearest] / sizes[nearest] if norm == "l2" else np.sign(normals[nearest])
                    totals[row] += (distances[nearest] + 1e-6) * direction
                    wanted = np.clip(images[row] + 1.02 * totals[row], 0, 1)
                    np.testing.assert_allclose(after.images[row], wanted, atol=1e-9)


def test_fab_moves_between_the_ways_of_the_image_and_of_the_clean_one():
    """Away from the box a way to a hyperplane is along its normal; each example is biased by its own two lengths."""
    with jax.enable_x64(True):
        model = bent_models.model(dtype=np.float64)
        rng = np.random.default_rng(8)
        clean = 0.5 + 0.02 * rng.normal(size=(6, *SHAPE))
        images = clean + 0.02 * rng.normal(size=clean.shape) * np.array([0, 0.1, 0.3, 1, 2, 3])[:, None, None, None]
        labels = bent_models.predict(model, clean)
        attack = attacks.build("fab_t", norm="l2", targets=1, bias=0.4)
        state = attack.init(KEYS, jnp.asarray(clean), jnp.asarray(labels)).replace(images=jnp.asarray(images))
        choose = lambda logits: attack._choose(state, logits)  # noqa: E731
        found = boundaries.linearise(model, state.images, KEYS, state.labels, choose)
        moved = attack._move(state, found)
        for row in range(6):
            normal, gap = np.asarray(found.normals[row, 0]), float(found.gaps[row, 0])
            ways = [
                (gap + float((normal * (images[row] - start)).sum())) / (normal**2).sum() * normal
                for start in (images[row], clean[row])
            ]
            lengths = [np.linalg.norm(way) for way in ways]
            share = min(lengths[0] / sum(lengths), 0.4)
            wanted = (1 - share) * (images[row] + 1.05 * ways[0]) + share * (clean[row] + 1.05 * ways[1])
            assert 0 < wanted.min() < wanted.max() < 1
            np.testing.assert_allclose(moved[row], wanted, atol=1e-12)


def test_random_starts_of_fab_lie_at_half_the_radius():
    for norm, radius in (("linf", 0.3), ("l2", 1.0), ("l1", 5.0)):
        for epsilon in (None, 0.2):
            attack = attacks.build("fab", norm=norm, epsilon=epsilon, restarts=3)
            state = attack.init(KEYS, jnp.full((6, *SHAPE), 0.5), jnp.zeros(6, jnp.int32))
            starts = [attack._start(state, jnp.full(6, run)) for run in range(3)]
            distances = np.stack([attack.norm.measure(start - state.clean) for start in starts])
            np.testing.assert_allclose(distances[0], 0)
            wanted = 0.5 * (radius if epsilon is None else epsilon)
            # Half of five in L1 may leave the box at a value.
            assert np.median(distances[1:]) == pytest.approx(wanted, rel=0.2 if radius == 5.0 else 1e-5)
            assert np.abs(starts[1] - starts[2]).max() > 1e-3


def test_fab_targeted_visits_each_class_in_turn_and_ends_where_there_are_no_more():
    model, images = bent_models.model(5), bent_models.images(4)
    labels = bent_models.predict(model, images)
    attack = attacks.build("fab_t", norm="l2", steps=3, restarts=2, targets=9)
    result = attack(model, KEYS, images, labels)
    np.testing.assert_array_equal(result.backward_passes, 3 * 2 * 3)
    np.testing.assert_array_equal(result.forward_passes, 2 * 3 * 2 * 3 + attack.judge_passes)
    order = np.argsort(-np.asarray(model(jnp.asarray(images))), axis=1)[:, 1:]
    states = bent_models.walk(attack, model, KEYS, images, labels, 1)
    np.testing.assert_array_equal(states[1].rivals[:, :3], order)
    for count, rank in ((0, 0), (3, 0), (6, 1), (17, 2)):
        state = states[1].replace(count=jnp.full(6, count))
        np.testing.assert_array_equal(attack._choose(state, model(jnp.asarray(images)))[:, 0], order[:, rank])


def test_a_success_of_fab_goes_back_towards_the_clean_image():
    model, images = bent_models.model(6), bent_models.images(5)
    labels = bent_models.predict(model, images)
    attack = attacks.build("fab", norm="linf", candidates=4, retreat=0.8)
    states = bent_models.walk(attack, model, KEYS, images, labels, 12)
    gained = 0
    for before, after in itertools.pairwise(states):
        nearer = np.asarray(after.nearest < before.nearest) & np.asarray(after.success)
        retreat = 0.8 * np.asarray(after.best) + 0.2 * images
        close = np.abs(np.asarray(after.images) - retreat).max(axis=(1, 2, 3)) < 1e-6
        gained += int(close[nearer].sum())
    assert gained >= 6


# What bad input gets.


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ddn", {"norm": "linf"}, "minimises l2"),
        ("deep_fool", {"norm": "l1"}, "fab and fmn"),
        ("carlini_wagner", {"threat": "cifar10/linf-8"}, "minimises l2"),
        ("carlini_wagner", {"confidence": -0.5}, "confidence"),
        ("fmn", {"norm": "linf", "epsilon": 8}, "8/255"),
        ("fmn", {"steps": 0}, "whole number"),
        ("fmn", {"radius_change": 1.0}, "between 0 and 1"),
        ("ddn", {"radius_change": 0.0}, "between 0 and 1"),
        ("fab", {"retreat": float("nan")}, "between 0 and 1"),
        ("ddn", {"levels": 1}, "from 2"),
        ("fab", {"candidates": 1}, "from 2"),
        ("fab_t", {"targets": 0}, "whole number"),
        ("fab", {"goal": "target"}, "targeted"),
    ],
)
def test_a_mistake_is_told_before_any_step(name, options, words):
    with pytest.raises(errors.UserError, match=words):
        attacks.build(name, **options)
