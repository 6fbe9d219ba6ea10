"""Findings from spectra: closed forms of every number, exact traces of blocks, invariance of overlaps."""

from __future__ import annotations

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, curvature, errors, models, trees
from robust_vit.curvature import operators, subsets

KEY = jax.random.key(0)


def _with_spectrum(values, seed: int = 0) -> operators.Symmetric:
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return operators.Symmetric(jnp.asarray(basis * values @ basis.T, jnp.float32))


def test_negative_shares_and_positive_means_of_known_values():
    values, noise = np.array([[4.0, -1.0, 1e-9], [2.0, -3.0, -1.0]]), np.full(2, 1e-6)
    np.testing.assert_array_equal(curvature.negative_share(values, noise=noise), [1 / 3, 2 / 3])
    np.testing.assert_array_equal(curvature.negative_share(values, noise=np.array([2.0, 2.0])), [0, 1 / 3])
    assert curvature.negative_share(values[1]) == 2 / 3
    assert curvature.positive_mean(values, noise=noise) == 3.0
    assert curvature.positive_mean(values) == pytest.approx((4 + 2 + 1e-9) / 3)
    assert curvature.positive_mean(-np.abs(values)) == 0.0


def _deep(params, batch):
    """The scalar deep linear net `(a b x - y)^2`, mean over a batch: its Hessian is 2 x 2 and known."""
    return jnp.mean((params["a"] * params["b"] * batch["x"] - batch["y"]) ** 2)


def test_a_deep_linear_network_has_one_negative_eigenvalue_at_its_saddle():
    """At the origin the Hessian is `[[0, -2xy], [-2xy, 0]]`: eigenvalues ±2 mean(xy), share 1/2, condition number 1."""
    batch = {"x": jnp.full(4, 2.0), "y": jnp.full(4, 3.0)}
    operator = curvature.hessian(_deep, {"a": jnp.float32(0.0), "b": jnp.float32(0.0)}, batch)
    found = curvature.lanczos(operator, KEY, rank=2, top=2)
    np.testing.assert_allclose(np.sort(found.values), [-12.0, 12.0], rtol=1e-5)
    assert curvature.negative_share(found.values, noise=found.noise) == 0.5
    assert curvature.positive_mean(found.values, noise=found.noise) == pytest.approx(12.0, rel=1e-5)
    assert curvature.condition_number(found.values, found.residuals, noise=found.noise) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.slow
def test_the_condition_number_is_a_lower_bound_that_full_rank_attains():
    values = np.r_[-8.0, np.linspace(0.5, 4.0, 30)]
    operator = _with_spectrum(values)
    bounds = []
    for rank in (3, 8, 31):
        found = curvature.lanczos(operator, KEY, rank=rank, top=rank)
        bounds.append(curvature.condition_number(found.values, found.residuals, noise=found.noise))
    assert max(bounds[:2]) <= 16.0
    assert bounds[2] == pytest.approx(16.0, rel=1e-5)
    # What is within the noise has no reciprocal, and a residual only makes the bound smaller.
    assert curvature.condition_number(np.array([5.0, -1.0, 1e-9]), noise=1e-6) == 5.0
    assert curvature.condition_number(np.array([5.0, -1.0]), np.array([0.0, 1.0])) == 2.5
    assert curvature.condition_number(np.array([3.0]), np.array([9.0])) == 1.0
    assert curvature.condition_number(np.zeros(3), noise=1e-6) == float("inf")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full(40, -2.5), 40.0),
        (np.r_[np.full(5, 3.0), np.full(5, -3.0), np.zeros(30)], 10.0),
        (np.r_[4.0, 2.0, 1.0, np.zeros(37)], 49 / 21),
    ],
)
def test_the_effective_rank_of_equal_eigenvalues_among_zeros_is_their_number(values, expected):
    found = curvature.effective_rank(curvature.density(_with_spectrum(values), KEY, rank=8, probes=30))
    assert abs(found.value - expected) < max(4 * found.standard_error, 1e-4 * expected)
    assert found.standard_error < 0.25 * expected
    nothing = curvature.effective_rank(curvature.density(operators.Symmetric(jnp.zeros((6, 6))), KEY, rank=4, probes=2))
    assert nothing.value == nothing.standard_error == 0.0


@pytest.mark.slow
def test_the_error_of_the_effective_rank_is_that_of_repetitions():
    operator = _with_spectrum(np.r_[np.linspace(1, 3, 10), np.zeros(20)])
    found = [
        curvature.effective_rank(curvature.density(operator, jax.random.key(seed), rank=12, probes=12))
        for seed in range(25)
    ]
    spread = np.std([one.value for one in found], ddof=1)
    assert 0.5 < np.mean([one.standard_error for one in found]) / spread < 2.0


def test_a_floor_counts_what_lies_beyond_it():
    values = np.repeat([-1.0, -0.01, 1.0], (10, 10, 20))
    found = curvature.density(_with_spectrum(values), KEY, rank=6, probes=40)
    for floor, share, mass in ((None, 0.5, 10.1 / 30.1), (0.1, 0.25, 10 / 30.1), (2.0, 0.0, 0.0)):
        for estimate, expected in ((found.negative(floor), share), (found.negative_mass(floor), mass)):
            assert abs(estimate.value - expected) <= 4 * estimate.standard_error
    assert abs(found.positive(0.1).value - 0.5) < 4 * found.positive(0.1).standard_error
    assert found.positive(2.0).value == 0.0


def _split(vectors):
    """Rows `[k, 12]` as a pytree of a matrix, a vector and a scalar: none of them is the whole space."""
    return {
        "a": jnp.asarray(vectors[:, :6].reshape(-1, 2, 3)),
        "b": jnp.asarray(vectors[:, 6:11]),
        "c": jnp.asarray(vectors[:, 11]),
    }


def test_overlaps_of_known_angles():
    """Two planes that share a line and stand at an angle otherwise: `(1 + cos² θ) / 2`."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0].astype(np.float32)
    first = rotation[:2]
    for angle in (0.0, 0.3, np.pi / 2):
        second = np.stack([rotation[0], np.cos(angle) * rotation[1] + np.sin(angle) * rotation[2]])
        value = curvature.overlap(_split(first), _split(second))
        assert value == pytest.approx((1 + np.cos(angle) ** 2) / 2, abs=1e-6)
        # The span counts: not its basis, their lengths or their order.
        mixed = np.array([[3.0, -1.0], [0.5, 2.0]], np.float32) @ second
        assert curvature.overlap(_split(first), _split(mixed)) == pytest.approx(value, abs=1e-6)
    assert curvature.overlap(_split(first), _split(rotation[2:4])) == pytest.approx(0.0, abs=1e-6)
    assert curvature.overlap(_split(first), _split(rotation)) == pytest.approx(1.0, abs=1e-6)
    assert curvature.overlap(_split(np.stack([first[0], first[0]])), _split(first)) == pytest.approx(1.0, abs=1e-6)


def test_random_subspaces_overlap_by_their_share_of_the_dimension():
    generator = np.random.default_rng(1)
    draws = generator.normal(size=(60, 2, 2, 12)).astype(np.float32)
    values = [curvature.overlap(_split(first), _split(second)) for first, second in draws]
    assert abs(np.mean(values) - 2 / 12) < 4 * np.std(values) / np.sqrt(60)


def test_vectors_of_different_spaces_are_refused():
    with pytest.raises(errors.UserError, match="of different spaces"):
        curvature.overlap({"a": jnp.ones((2, 3))}, {"b": jnp.ones((2, 3))})
    with pytest.raises(errors.UserError, match="of different spaces"):
        curvature.overlap(jnp.ones((2, 3)), jnp.ones((2, 4)))


SMALL = {
    "vit": {"width": 4, "depth": 2, "heads": 1, "mlp_width": 4, "patch": 4},
    "resnet": {"depth": 8, "width": 1},
}
NAMES = {
    "vit": ["stem", "block00/attention", "block00/mlp", "block01/attention", "block01/mlp", "head"],
    "resnet": ["stem", "stage1/block00", "stage2/block00", "stage3/block00", "head"],
}


def _shapes(name, **options):
    module = models.build(name, num_classes=3, **{**SMALL[name], **options})
    spec = classifier.ImageSpec(size=(8, 8), channels=1, mean=(0.5,), std=(0.5,))
    return jax.eval_shape(lambda: models.init(module, spec, jax.random.key(0)))["params"]


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_of_a_network_is_in_one_block(name):
    params = _shapes(name)
    expressions = curvature.parameter_blocks(params)
    assert list(expressions) == NAMES[name]
    if name == "vit":  # Each branch with its norm.
        assert "block00/mlp_norm/scale" in trees.paths(subsets.select(params, expressions["block00/mlp"])[0])
    masks = [trees.mask(params, subset) for subset in expressions.values()]
    assert all(sum(found) == 1 for found in zip(*map(jax.tree.leaves, masks), strict=True))


def _small_net(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["embedding"]["kernel"])
    hidden = hidden + jnp.tanh(hidden @ params["block00"]["project"]) @ params["block00"]["mlp"]["contract"]
    return jnp.mean((hidden @ params["head"] - batch["y"]) ** 2)


@pytest.mark.slow
def test_traces_of_blocks_sum_to_the_trace_and_their_eigenvalues_are_those_of_the_dense_blocks():
    generator = np.random.default_rng(0)
    shapes = {
        "embedding": {"kernel": (3, 2)},
        "block00": {"project": (2, 2), "mlp": {"contract": (2, 2)}},
        "head": (2,),
    }
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda shape: jnp.asarray(generator.normal(size=shape)),
            shapes,
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )
        batch = {"x": jnp.asarray(generator.normal(size=(6, 3))), "y": jnp.asarray(generator.normal(size=6))}
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        dense = np.asarray(jax.hessian(lambda vector: _small_net(unravel(vector), batch))(flat))
        whole = curvature.hessian(_small_net, params, batch)
        expressions = curvature.parameter_blocks(params)
        assert list(expressions) == ["stem", "block00/attention", "block00/mlp", "head"]
        total = own_total = 0.0
        for name, subset in expressions.items():
            mask = jax.tree.map(lambda chosen, leaf: jnp.full(leaf.shape, chosen), trees.mask(params, subset), params)
            chosen = np.flatnonzero(jax.flatten_util.ravel_pytree(mask)[0])
            assert len(chosen) == trees.count(subsets.select(params, subset)[0])
            block = dense[np.ix_(chosen, chosen)]
            total += np.trace(block)
            own = curvature.hessian(_small_net, params, batch, subset=subset)
            own_flat, own_unravel = jax.flatten_util.ravel_pytree(own.like)
            own_total += sum(trees.dot(unit, own(unit)) for unit in map(own_unravel, jnp.eye(own_flat.size)))
            expected = np.linalg.eigvalsh(block)
            expected = expected[np.argmax(np.abs(expected))]
            found = curvature.lanczos(curvature.within(whole, subset), KEY, rank=len(flat), top=1)
            np.testing.assert_allclose(found.values, [expected], rtol=1e-10)
            if name == "block00/mlp":
                np.testing.assert_allclose(curvature.lanczos(own, KEY, rank=4, top=1).values, [expected], rtol=1e-10)
    np.testing.assert_allclose(total, np.trace(dense), rtol=1e-12)
    np.testing.assert_allclose(own_total, np.trace(dense), rtol=1e-12)


def test_blocks_of_scanned_and_of_foreign_parameters():
    shapes = _shapes("vit", scan=True, head="map")
    expressions = curvature.parameter_blocks(shapes)
    assert list(expressions) == ["stem", "blocks/attention", "blocks/mlp", "head"]
    masks = [trees.mask(shapes, subset) for subset in expressions.values()]
    assert all(sum(found) == 1 for found in zip(*map(jax.tree.leaves, masks), strict=True))
    foreign = {"w": jnp.ones(2), "w2": jnp.ones(3), "mlp.block": {"w": jnp.ones(1)}}
    expressions = curvature.parameter_blocks(foreign)
    assert set(expressions) == set(foreign)
    assert trees.count(subsets.select(foreign, expressions["w"])[0]) == 2
    assert curvature.parameter_blocks(jnp.ones(3)).keys() == {"all"}
    with pytest.raises(errors.UserError, match="pytree is empty"):
        curvature.parameter_blocks({})
    with pytest.raises(errors.UserError, match="matches no parameter"):
        curvature.within(curvature.hessian(_deep, {"a": 1.0, "b": 1.0}, {"x": jnp.ones(2), "y": jnp.ones(2)}), "c")


def test_another_block_compiles_nothing():
    traces = []

    def loss(params, batch):
        traces.append(None)
        return jnp.mean(batch["x"]) * sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(params))

    operator = curvature.hessian(loss, {"a": jnp.ones(3), "b": jnp.full(2, 2.0)}, {"x": jnp.ones(2)})
    found = [curvature.lanczos(curvature.within(operator, "^a$"), KEY, rank=3, top=1).values[0]]
    count = len(traces)
    found += [curvature.lanczos(curvature.within(operator, "^b$"), KEY, rank=3, top=1).values[0]]
    np.testing.assert_allclose(found, [6.0, 12.0], rtol=1e-5)
    assert len(traces) == count
