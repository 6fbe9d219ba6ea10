"""What holds for every registered attack: closed forms in the box, ball and box, identity, draws, refilling, slots, restarts.

The default run takes each attack in its first norm, the closed forms and draws of four, and PGD alone for the restarts, a batch
of one, a model that draws; `-m slow` the others.
"""

from __future__ import annotations

import attack_table
import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, losses

SHAPE = (3, 3, 2)
ROWS = attack_table.ROWS


def _case(*values, default: bool):
    return pytest.param(*values, id="-".join(map(str, values)), marks=() if default else pytest.mark.slow)


# One of each kind of state: a ball with restarts, a minimal attack, queries, a search on a grid.
KINDS = ("pgd", "fmn", "square", "roto_translation")
EACH = [_case(name, norm, default=norm == row.norms[0]) for name, row in ROWS.items() for norm in row.norms]
CLOSED = [
    _case(name, norm, goal, classes, 7, default=name in KINDS and norm == row.exact[0] and goal == "untargeted")
    for name, row in ROWS.items()
    for norm in row.exact
    for goal, classes in (*(("untargeted", count) for count in row.classes), ("targeted", 2))
    if goal in row.goals
]
DRAWS = [
    _case(name, norm, default=name in KINDS and norm == row.norms[0])
    for name, row in ROWS.items()
    for norm in row.norms
]
EXACT = [(name, row.exact[0], row.classes[0]) for name, row in ROWS.items() if row.exact]
CLOSED += [_case(name, norm, "untargeted", classes, 1, default=name == "pgd") for name, norm, classes in EXACT]
PADDED = [_case(*row, default=row[0] in ("pgd", "fmn")) for row in EXACT]
SLOTS = [_case(name, row.norms[0], default=False) for name, row in ROWS.items()]
LUCK = [_case(name, row.norms[0], default=name == "pgd") for name, row in ROWS.items() if row.kind != "minimal"]
RESTARTS = [
    _case(name, norm, default=name == "pgd" and norm == row.norms[0])
    for name, row in ROWS.items()
    if row.restarts
    for norm in row.norms
]


def test_every_attack_has_a_row():
    assert set(ROWS) == set(attacks.ATTACKS)


def _build(name: str, norm: str, *, epsilon=None, sharp: bool = False, **options):
    row = ROWS[name]
    options = {**row.options, **(row.sharp if sharp else {}), **options, "norm": norm}
    if row.goals == ("untargeted",):
        options.pop("goal", None)
    if row.kind == "bounded":
        options["epsilon"] = epsilon
    return attacks.build(name, **options)


def _bent(variables, images):
    return jnp.tanh(images.reshape(images.shape[0], -1) @ variables["u"]) @ variables["w"]


def _model(seed: int = 0, classes: int = 4):
    rng = np.random.default_rng(seed)
    size = int(np.prod(SHAPE))
    variables = {"u": 2 * rng.normal(size=(size, 16)) / np.sqrt(size), "w": rng.normal(size=(16, classes))}
    return classifier.wrap(_bent, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), variables))


@jax.jit
def _logits(model, images):
    return model(images)


def _predict(model, images):
    return np.array(_logits(model, jnp.asarray(images)).argmax(axis=-1), np.int32)


def _images(seed: int, count: int):
    return np.random.default_rng(seed).uniform(size=(count, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize(("name", "norm", "goal", "classes", "count"), CLOSED)
def test_affine_models_break_just_where_the_box_lets_them(name, norm, goal, classes, count):
    """Bounded: at 1.01 times the exact distance and not at 0.99. Minimal: within 2 %, and never nearer than possible."""
    model, images = closed_forms.model(3, SHAPE, classes), _images(1, count)
    labels = _predict(model, images)
    targets = None if goal == "untargeted" else 1 - labels
    exact = closed_forms.distances(norm, model, images, labels, targets)
    assert np.isfinite(exact).all()
    given = labels if targets is None else targets
    keys = attacks.example_keys(0, np.arange(count))
    if ROWS[name].kind == "minimal":
        result = _build(name, norm, sharp=True, goal=goal)(model, keys, images, given)
        assert np.asarray(result.success).all()
        ratio = np.asarray(result.distance) / exact
        assert ratio.min() > 1 - 1e-4, ratio
        assert ratio.max() < 1.02, ratio
        return
    attack = _build(name, norm, epsilon=0.1, sharp=True, goal=goal)
    broken = {}
    for factor in (0.99, 1.01):
        broken[factor] = np.zeros(count, bool)
        for row, size in enumerate(exact):
            # Every example at its own radius: epsilon is a number, so nothing compiles anew.
            result = attack.replace(epsilon=np.float32(factor * size))(model, keys, images, given)
            broken[factor][row] = result.success[row]
    assert not broken[0.99].any()
    assert broken[1.01].all(), exact[~broken[1.01]]


@pytest.mark.parametrize(("name", "norm", "classes"), PADDED)
def test_so_they_do_in_padded_batches(name, norm, classes):
    """Through the runner, with padding that no attack could take; the radius is far from every exact distance."""
    count, size = 7, 3
    model, images = closed_forms.model(3, SHAPE, classes), _images(1, count)
    labels = _predict(model, images)
    exact = closed_forms.distances(norm, model, images, labels, None)
    rising = np.sort(exact)
    widest = int(np.argmax(rising[1:] / rising[:-1]))
    epsilon = float(np.sqrt(rising[widest] * rising[widest + 1]))
    assert rising[widest + 1] > 1.02 * rising[widest]

    def batches():
        for start in range(0, count, size):
            mask = np.arange(start, start + size) < count
            chosen = np.minimum(np.arange(start, start + size), count - 1)
            batch = {"image": images[chosen], "label": labels[chosen], "mask": mask}
            batch["image"][~mask], batch["label"][~mask] = np.nan, -1
            yield batch

    found = attacks.run(_build(name, norm, epsilon=epsilon, sharp=True), model, batches(), slots=4)
    if ROWS[name].kind == "minimal":
        assert found.success.all()
        np.testing.assert_allclose(found.distance, exact, rtol=0.02)
    else:
        np.testing.assert_array_equal(found.success, exact < epsilon)


@pytest.mark.parametrize(("name", "norm"), EACH)
def test_the_result_is_what_it_says(name, norm):
    model, images = _model(), _images(5, 12)
    labels = _predict(model, images)
    labels[:2] = (labels[:2] + 1) % 4
    keys = attacks.example_keys(1, np.arange(12))
    bounded = ROWS[name].kind == "bounded"
    sizes = (0.0, {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]) if bounded else (None,)
    for size in sizes:
        attack = _build(name, norm, epsilon=size)
        result = attack(model, keys, images, labels)
        found = np.asarray(result.images)
        assert found.min() >= 0.0
        assert found.max() <= 1.0
        exact = np.asarray(attack.norm.measure(jnp.asarray(found - images)))
        np.testing.assert_allclose(result.distance, exact, rtol=1e-6)
        np.testing.assert_array_equal(result.prediction, _predict(model, found))
        np.testing.assert_array_equal(result.success, np.asarray(result.prediction) != labels)
        assert np.asarray(result.success)[:2].all()
        np.testing.assert_array_equal(found[:2], images[:2])
        if bounded:
            assert exact.max() <= size * (1 + 1e-5) + 1e-7
        if size == 0:
            np.testing.assert_array_equal(found, images)
            np.testing.assert_array_equal(np.asarray(result.success), np.arange(12) < 2)
        if size != 0:
            assert np.asarray(result.success).mean() > 0.4


@pytest.mark.parametrize(("name", "norm"), DRAWS)
def test_draws_and_bytes_belong_to_the_row_alone(name, norm):
    """The same bytes in any order, beside other examples, with and without refilling, at the end of a padded batch."""
    model, images = _model(2), _images(7, 7)
    labels = _predict(model, images)
    examples = {"image": images, "label": labels, "row": np.arange(40, 47, dtype=np.int32)}
    attack = _build(name, norm, epsilon=0.05 if norm == "linf" else 0.3)
    options = {"slots": 4, "stride": 3, "keep_images": True}
    whole = attacks.run(attack, model, examples, **options)
    order = np.random.default_rng(2).permutation(7)
    shuffled = attacks.run(attack, model, {k: v[order] for k, v in examples.items()}, refill=False, **options)
    for field, array in whole.records().items():
        np.testing.assert_array_equal(getattr(shuffled, field), array[order], err_msg=field)
    np.testing.assert_array_equal(shuffled.images, whole.images[order])


@pytest.mark.parametrize(("name", "norm"), SLOTS)
def test_decisions_are_those_of_any_number_of_slots(name, norm):
    """Rounding differs between compiled shapes: it may decide only where the margin is within 1 % of that at the clean image."""
    model, images = _model(2), _images(7, 21)
    labels = _predict(model, images)
    attack = _build(name, norm, epsilon=0.05 if norm == "linf" else 0.3)
    few, many = (
        attacks.run(attack, model, {"image": images, "label": labels}, slots=slots, keep_images=True)
        for slots in (3, 7)
    )
    clean, *reached = (np.asarray(losses.margin(_logits(model, x), labels)) for x in (images, few.images, many.images))
    near = np.abs(np.stack(reached)).min(axis=0) <= 0.01 * np.abs(clean)
    np.testing.assert_array_equal(few.success[~near], many.success[~near])
    assert near.mean() < 0.2 or ROWS[name].kind == "minimal"


def _drawing(variables, images, keys):
    logits = _bent(variables, images)
    return logits + jax.vmap(lambda key: 4.0 * jax.random.normal(key, logits.shape[1:]))(keys)


@pytest.mark.parametrize(("name", "norm"), LUCK)
def test_no_lucky_draw_ends_an_example(name, norm):
    """Labels that the model hardly ever gives, under noise that is larger than its logits: every image takes all steps."""
    model, images = classifier.wrap(_drawing, _model(6).variables, stochastic=True), _images(11, 6)
    labels = (_predict(_model(6), images) + 1) % 4
    attack = _build(name, norm, epsilon=0.05)
    result = attack(model, attacks.example_keys(0, np.arange(6)), images, labels)
    all_steps = attack.evaluations * attack.step_passes[0] + attack.against(model).judge_passes
    np.testing.assert_array_equal(result.forward_passes, all_steps)


@pytest.mark.parametrize(("name", "norm"), RESTARTS)
def test_more_restarts_are_no_weaker(name, norm):
    model, images = _model(4), _images(9, 24)
    labels = _predict(model, images)
    keys = attacks.example_keys(0, np.arange(24))
    found = []
    for restarts in (1, 3):
        attack = _build(name, norm, epsilon=0.03, restarts=restarts)
        result = attack(model, keys, images, labels)
        found.append(np.where(result.success, result.distance, np.inf))
    if ROWS[name].kind == "bounded":
        found = [~np.isfinite(size) for size in found]
    assert (found[1] <= found[0]).all()
