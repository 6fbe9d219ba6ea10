"""Transfer on linear models: what one model's closed-form step does to another is known to the image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors
from robust_vit.attacks import evaluation, transfer

SHAPE = (3, 3, 2)


def _two_sides(variables, images):
    score = (images.reshape(len(images), -1) - 0.5) @ variables
    return jnp.stack([-score, score], axis=1)


def test_the_matrix_of_linear_models_is_known_in_advance():
    rng = np.random.default_rng(0)
    first = rng.normal(size=18)
    mixed = 0.5 * first + rng.normal(size=18)
    weights = {"first": first, "mixed": mixed, "against": -first}
    models = {name: classifier.wrap(_two_sides, jnp.asarray(w, jnp.float32)) for name, w in weights.items()}
    images = rng.uniform(0.4, 0.6, (64, *SHAPE))
    flat = images.reshape(64, -1) - 0.5
    labels = (flat @ first > 0).astype(np.int32)
    signs, epsilon = 2 * labels - 1, 0.03
    attack = attacks.build("fgsm", epsilon=epsilon, stop_on_success=False)
    keys = attacks.example_keys(0, np.arange(64))
    found = transfer.matrix(models, attack, keys, jnp.asarray(images, jnp.float32), labels)
    right = {name: np.sign(flat @ w) == signs for name, w in weights.items()}
    assert right["first"].all()
    assert not right["against"].any()
    for i, source in enumerate(weights):
        moved = flat - epsilon * signs[:, None] * np.sign(weights[source])[None, :]
        for j, target in enumerate(weights):
            np.testing.assert_array_equal(found.success[i, j], np.sign(moved @ weights[target]) != signs)
            np.testing.assert_array_equal(found.both[i, j], right[source] & right[target])
    both = right["first"] & right["mixed"]
    assert found.rates[0, 1] == found.success[0, 1][both].mean()
    assert found.raw[0, 1] == found.success[0, 1].mean()
    assert np.isnan(found.rates[0, 2])
    assert 0 < found.rates[0, 1] < found.rates[1, 1] <= 1
    assert found.names == ("first", "mixed", "against")


def test_stopping_at_the_sources_boundary_fools_fewer_others():
    rng = np.random.default_rng(1)
    base = rng.normal(size=18)
    models = {
        name: classifier.wrap(_two_sides, jnp.asarray(base + 0.7 * rng.normal(size=18), jnp.float32))
        for name in ("one", "other")
    }
    images = rng.uniform(0.4, 0.6, (64, *SHAPE)).astype(np.float32)
    labels = ((images.reshape(64, -1) - 0.5) @ base > 0).astype(np.int32)
    keys = attacks.example_keys(0, np.arange(64))
    rates = {}
    for stops in (True, False):
        attack = attacks.build("pgd", epsilon=0.05, steps=5, random_start=False, stop_on_success=stops)
        rates[stops] = transfer.matrix(models, attack, keys, jnp.asarray(images), labels).rates
    assert (rates[True].diagonal() == rates[False].diagonal()).all()
    assert rates[False][0, 1] > rates[True][0, 1] + 0.1


def _by_chance(images, keys):
    """Heads or tails, whatever the image."""
    del images
    return jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)


def test_a_stochastic_target_is_judged_by_draws_that_the_attack_has_not_seen():
    """An attack that keeps what the first draw lets through has success on its own model no more often than that draws again."""
    count = 400
    model = classifier.wrap(_by_chance, stochastic=True)
    keys, labels = attacks.example_keys(0, np.arange(count)), jnp.zeros(count, jnp.int32)
    images = jnp.full((count, *SHAPE), 0.5)
    attack = attacks.build("pgd", epsilon=0.05, steps=1, random_start=False)
    result, (found,) = transfer.row(model, [model], attack, keys, images, labels)
    np.testing.assert_array_equal(found, result.prediction)
    seen = np.asarray(evaluation.logits(model, images, keys)).argmax(axis=1)
    assert 0.4 < np.mean(np.asarray(found) != seen) < 0.6


def test_a_targeted_attack_is_refused():
    model = classifier.wrap(_two_sides, jnp.ones(18))
    attack = attacks.build("fgsm", epsilon=0.1, goal="targeted")
    keys = attacks.example_keys(0, np.arange(2))
    with pytest.raises(errors.UserError, match="untargeted"):
        transfer.matrix({"a": model}, attack, keys, jnp.full((2, *SHAPE), 0.5), np.zeros(2, np.int32))
