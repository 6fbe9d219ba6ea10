"""Sharpness against exact maxima of quadratics, its units, its invariance, and what it refuses."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from robust_vit import curvature, errors, losses, trees
from robust_vit.curvature import operators, sharpness

KEY = jax.random.key(0)
NUMBERS = 8


@pytest.fixture(autouse=True)
def _compiled_fast():
    """What is asked here is what is computed, not to which byte: most of the time would be that of XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)


def quadratic(params, batch):
    """`g'w + w'Aw / 2`, the same of each example, in two leaves."""
    w = jnp.concatenate([params["a"].ravel(), params["b"]])
    return jnp.mean(batch["slope"] @ w + 0.5 * jnp.einsum("eij,i,j->e", batch["matrix"], w, w))


def make_quadratic(seed=0, *, slope=1.0, point=0.0, values=None, dtype=jnp.float64):
    generator = np.random.default_rng(seed)
    rotation = np.linalg.qr(generator.normal(size=(NUMBERS, NUMBERS)))[0]
    values = np.linspace(0.2, 4.0, NUMBERS) if values is None else np.asarray(values)
    matrix = (rotation * values) @ rotation.T
    # Examples differ, and their mean is what is meant.
    noise = generator.normal(size=(4, NUMBERS, NUMBERS))
    noise = noise + noise.transpose(0, 2, 1)
    at = point * generator.normal(size=NUMBERS)
    g = slope * generator.normal(size=NUMBERS)
    batch = {
        "matrix": jnp.asarray(matrix + noise - noise.mean(axis=0), dtype),
        "slope": jnp.asarray(np.broadcast_to(g, (4, NUMBERS)), dtype),
    }
    params = {"a": jnp.asarray(at[:6].reshape(2, 3), dtype), "b": jnp.asarray(at[6:], dtype)}
    return params, batch, matrix, g + matrix @ at, at


def flat(tree):
    return np.concatenate([np.asarray(tree["a"]).ravel(), np.asarray(tree["b"])])


def trust_region(matrix, slope, radius):
    """`max g'd + d'Ad / 2` over the ball, by the secular equation."""
    values, vectors = np.linalg.eigh(matrix)
    parts = vectors.T @ slope
    if np.allclose(parts, 0):
        return 0.5 * radius**2 * max(values[-1], 0.0)

    def excess(shift):
        return np.linalg.norm(parts / (shift - values)) - radius

    low = max(values[-1], 0.0)
    shift = scipy.optimize.brentq(excess, low + 1e-12, low + 10 * np.linalg.norm(slope) / radius, xtol=1e-15)
    inner = parts / (shift - values)
    return parts @ inner + 0.5 * values @ inner**2


@pytest.mark.parametrize(
    "adaptive", [None, "elementwise", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tensor", "global"))]
)
def test_the_worst_case_of_a_quadratic_is_that_of_the_trust_region(adaptive):
    with jax.enable_x64(True):
        params, batch, matrix, slope, _ = make_quadratic(point=1.0)
        unit = flat(sharpness.scales(params, adaptive))
        scaled, steepest = unit[:, None] * matrix * unit[None], unit * slope
        for radius in (0.05, 0.5, 3.0):
            options = {"radius": radius, "adaptive": adaptive}
            found = curvature.worst_case(quadratic, params, batch, steps=100, **options)
            exact = trust_region(scaled, steepest, radius)
            np.testing.assert_allclose(found.sharpness, exact, rtol=1e-6)
            assert found.sharpness <= exact * (1 + 1e-12)
            # Twenty steps, as published, are within 2 % here.
            assert curvature.worst_case(quadratic, params, batch, **options).sharpness > 0.98 * exact
            direction = radius * steepest / np.linalg.norm(steepest)
            np.testing.assert_allclose(found.one_step, steepest @ direction + 0.5 * direction @ scaled @ direction)
            single = curvature.worst_case(quadratic, params, batch, steps=1, **options)
            np.testing.assert_allclose(single.one_step, found.one_step, rtol=1e-12)
            np.testing.assert_allclose(flat(single.perturbation), unit * direction, rtol=1e-12)
            np.testing.assert_allclose(found.slope, np.linalg.norm(steepest))
            # What is returned is there: in the neighbourhood, and as high as said.
            moved = flat(found.perturbation) / unit
            assert np.linalg.norm(moved) <= radius * (1 + 1e-12)
            np.testing.assert_allclose(steepest @ moved + 0.5 * moved @ scaled @ moved, found.sharpness, rtol=1e-9)
    assert np.ptp(unit) == 0 or adaptive in ("elementwise", "tensor")


def test_at_a_minimum_it_is_half_the_largest_eigenvalue_and_needs_a_start():
    with jax.enable_x64(True):
        params, batch, *_ = make_quadratic(slope=0.0)
        stuck = curvature.worst_case(quadratic, params, batch, radius=0.5)
        assert (stuck.sharpness, stuck.slope) == (0.0, 0.0)
        found = curvature.worst_case(quadratic, params, batch, radius=0.5, key=KEY, steps=200)
        np.testing.assert_allclose(found.sharpness, 0.5 * 0.25 * 4.0, rtol=1e-6)


def test_indefinite_and_negative_curvature():
    with jax.enable_x64(True):
        params, batch, matrix, slope, _ = make_quadratic(values=np.linspace(-5.0, 2.0, NUMBERS), slope=0.3)
        found = curvature.worst_case(quadratic, params, batch, radius=1.0, steps=200)
        np.testing.assert_allclose(found.sharpness, trust_region(matrix, slope, 1.0), rtol=1e-6)
        # At a maximum nothing is higher, wherever the ascent starts, and one step is downhill.
        params, batch, *_ = make_quadratic(values=-np.linspace(1.0, 5.0, NUMBERS), slope=0.0)
        top = curvature.worst_case(quadratic, params, batch, radius=1.0, key=KEY)
        assert top.sharpness == 0.0
        assert trees.norm(top.perturbation) == 0


def test_in_the_cube_the_worst_corner_of_a_diagonal_and_never_more_than_the_worst_of_all():
    with jax.enable_x64(True):
        params, batch, matrix, slope, _ = make_quadratic(3)
        corners = 0.25 * np.asarray(list(itertools.product((-1, 1), repeat=NUMBERS)))
        exact = np.max(corners @ slope + 0.5 * np.einsum("ci,ij,cj->c", corners, matrix, corners))
        found = curvature.worst_case(quadratic, params, batch, radius=0.25, norm="linf")
        assert 0.9 * exact < found.sharpness <= exact * (1 + 1e-12)
        np.testing.assert_allclose(found.slope, np.abs(slope).sum())
        diagonal = {**batch, "matrix": jnp.broadcast_to(jnp.diag(jnp.arange(1.0, 9.0)), (4, NUMBERS, NUMBERS))}
        found = curvature.worst_case(quadratic, params, diagonal, radius=0.25, norm="linf", steps=5)
        np.testing.assert_allclose(found.sharpness, 0.25 * np.abs(slope).sum() + 0.5 * 0.0625 * 36, rtol=1e-9)


@pytest.mark.parametrize(("norm", "share"), [("l2", 1 / NUMBERS), ("linf", 1 / 3)])
def test_the_average_case_of_a_quadratic_is_a_trace(norm, share):
    with jax.enable_x64(True):
        params, batch, matrix, *_ = make_quadratic(point=1.0, slope=100.0)
        for adaptive in (None, "elementwise"):
            unit = flat(sharpness.scales(params, adaptive))
            found = curvature.average_case(
                quadratic, params, batch, key=KEY, radius=0.5, norm=norm, adaptive=adaptive, pairs=400
            )
            exact = 0.5 * 0.25 * share * np.trace(unit[:, None] * matrix * unit[None])
            # The gradient, a hundred times larger, cancels in each pair.
            assert abs(found.value - exact) < 4 * found.standard_error
            assert found.standard_error < 0.1 * exact
            assert found.applications == 801
        gaussian = curvature.average_case(quadratic, params, batch, key=KEY, radius=0.5, norm=norm, pairs=400)
        # Of z'Az, 2 |A|_F^2 for Gaussian entries; 4/5 of the diagonal's square and the rest for uniform ones.
        squares, diagonal = (matrix**2).sum(), (np.diag(matrix) ** 2).sum()
        spread = 2 * squares if norm == "l2" else 2 * (squares - diagonal) + 0.8 * diagonal
        expected = 0.5 * 0.25 * share * np.sqrt(spread / 400)
        np.testing.assert_allclose(gaussian.standard_error, expected, rtol=0.15)


def test_nothing_moves_nothing_and_microbatches_and_subsets_are_what_they_say():
    with jax.enable_x64(True):
        params, batch, matrix, slope, _ = make_quadratic(point=1.0)
        assert curvature.worst_case(quadratic, params, batch, radius=0.0).sharpness == 0.0
        assert curvature.average_case(quadratic, params, batch, key=KEY, radius=0.0, pairs=2).value == 0.0
        whole = curvature.worst_case(quadratic, params, batch, radius=0.5)
        parts = curvature.worst_case(quadratic, params, batch, radius=0.5, microbatch=3)
        np.testing.assert_allclose(parts.sharpness, whole.sharpness, rtol=1e-12)
        found = curvature.worst_case(quadratic, params, batch, radius=0.5, subset="^b$", steps=60)
        np.testing.assert_allclose(found.sharpness, trust_region(matrix[6:, 6:], slope[6:], 0.5), rtol=1e-6)
        assert found.perturbation["a"] is None
        average = curvature.average_case(quadratic, params, batch, key=KEY, radius=0.5, subset="^b$", pairs=200)
        assert abs(average.value - 0.5 * 0.25 * np.trace(matrix[6:, 6:]) / 2) < 4 * average.standard_error


def test_m_sharpness_is_the_mean_of_each_group_and_larger_for_smaller_groups():
    with jax.enable_x64(True):
        params, batch, *_ = make_quadratic(point=1.0)
        options = {"radius": 0.5, "steps": 60}
        values = []
        for index in range(2):
            part = jax.tree.map(lambda leaf, i=index: leaf[2 * i : 2 * i + 2], batch)
            values.append(curvature.worst_case(quadratic, params, part, **options).sharpness)
        found = curvature.m_sharpness(quadratic, params, batch, group=2, **options)
        np.testing.assert_allclose(found.value, np.mean(values), rtol=1e-12)
        np.testing.assert_allclose(found.standard_error, np.std(values, ddof=1) / np.sqrt(2), rtol=1e-12)
        whole = curvature.m_sharpness(quadratic, params, batch, group=4, **options).value
        single = curvature.m_sharpness(quadratic, params, batch, group=1, **options).value
        # The largest of a mean is at most the mean of the largest.
        assert whole < found.value < single


def network_loss(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["first"] + params["bias"][None])
    logits = jax.nn.relu(hidden @ params["second"]) @ params["third"]
    return losses.cross_entropy(logits, batch["y"]).mean()


def make_network():
    generator = np.random.default_rng(0)
    shapes = {"first": (5, 6), "bias": (6,), "second": (6, 4), "third": (4, 3)}
    params = {name: jnp.asarray(generator.normal(size=shape)) for name, shape in shapes.items()}
    return params, {"x": jnp.asarray(generator.normal(size=(16, 5))), "y": jnp.arange(16) % 3}


@pytest.mark.parametrize(
    ("kind", "by", "norm", "invariant"),
    [
        ("elementwise", "neuron", "l2", True),
        (None, "neuron", "l2", False),
        pytest.param("elementwise", "layer", "linf", True, marks=pytest.mark.slow),
        pytest.param("tensor", "layer", "l2", True, marks=pytest.mark.slow),
        pytest.param("tensor", "neuron", "linf", False, marks=pytest.mark.slow),
        pytest.param(None, "layer", "linf", False, marks=pytest.mark.slow),
    ],
)
def test_adaptive_sharpness_survives_a_rescaling_that_raw_sharpness_does_not(kind, by, norm, invariant):
    """One layer times c and the next by 1 / c, a factor for each neuron, leave a ReLU network as it is (Dinh et al. 2017)."""
    with jax.enable_x64(True):
        params, batch = make_network()
        if by == "neuron":
            factors = np.exp(np.random.default_rng(1).normal(size=6))
            first, bias = params["first"] * factors[None], params["bias"] * factors
            other = {**params, "first": first, "bias": bias, "second": params["second"] / factors[:, None]}
        else:
            other = {**params, "second": 8.0 * params["second"], "third": params["third"] / 8.0}
        np.testing.assert_allclose(network_loss(other, batch), network_loss(params, batch), rtol=1e-12)

        def measures(params):
            options = {"radius": 0.125, "adaptive": kind, "norm": norm}
            found = curvature.worst_case(network_loss, params, batch, **options)
            average = curvature.average_case(network_loss, params, batch, key=KEY, pairs=3, **options)
            operator = operators.Scaled(curvature.hessian(network_loss, params, batch), sharpness.scales(params, kind))
            top = curvature.lanczos(operator, KEY, rank=40, top=1, which="largest").values[0]
            return np.asarray([found.sharpness, found.one_step, found.slope, average.value, top])

        before, after = measures(params), measures(other)
        if invariant:
            # Measured: 2e-11 for the ascents, whose path amplifies rounding.
            np.testing.assert_allclose(after, before, rtol=1e-7)
        else:
            assert (np.abs(after / before - 1) > 0.01).all()


def test_the_scaled_hessian_is_dense_and_its_small_radius_limit_is_the_sharpness():
    with jax.enable_x64(True):
        params, batch, matrix, _, at = make_quadratic(point=1.0)
        unit = np.abs(at)
        operator = operators.Scaled(curvature.hessian(quadratic, params, batch), sharpness.scales(params))
        found = curvature.lanczos(operator, KEY, rank=NUMBERS, top=NUMBERS, which="smallest")
        expected = np.linalg.eigvalsh(unit[:, None] * matrix * unit[None])
        np.testing.assert_allclose(found.values, expected, atol=1e-12)
        assert curvature.asymmetry(operator, KEY) < 1e-14
        everything = operators.Scaled(curvature.hessian(quadratic, params, batch), sharpness.scales(params, "global"))
        top = curvature.lanczos(everything, KEY, rank=NUMBERS, top=1).values[0]
        np.testing.assert_allclose(top, 4.0 * (at @ at), rtol=1e-10)


def test_units():
    params = {"a": jnp.asarray([[3.0, -4.0]]), "b": jnp.asarray([0.0, 12.0])}
    assert flat_list(sharpness.scales(params)) == [3, 4, 0, 12]
    assert flat_list(sharpness.scales(params, "tensor")) == [5, 5, 12, 12]
    assert flat_list(sharpness.scales(params, "global")) == [13] * 4
    assert flat_list(sharpness.scales(params, None)) == [1] * 4
    assert flat_list(sharpness.scales(params, stabiliser=0.5)) == [3.5, 4.5, 0.5, 12.5]


def flat_list(tree):
    return [float(value) for leaf in jax.tree.leaves(tree) for value in np.ravel(leaf)]


TRACES = []


def counted(params, batch):
    TRACES.append(None)
    return quadratic(params, batch)


def test_a_new_radius_and_a_new_batch_compile_nothing():
    count = 0
    for radius, seed in ((0.5, 0), (1.0, 1), (0.25, 2)):
        params, batch, *_ = make_quadratic(seed, point=1.0, dtype=jnp.float32)
        curvature.worst_case(counted, params, batch, radius=radius, steps=3, adaptive="elementwise")
        curvature.average_case(counted, params, batch, key=KEY, radius=radius, pairs=2)
        count = count if seed else len(TRACES)
    assert len(TRACES) == count > 0


def infinite(params, batch):
    return jnp.mean(batch["slope"] @ params["b"]) / jnp.sum(jnp.abs(params["a"] - params["a"]))


def test_what_is_refused():
    params, batch, *_ = make_quadratic(dtype=jnp.float32)
    for options, message in (
        ({"radius": -1.0}, "radius is -1"),
        ({"radius": float("nan")}, "radius is nan"),
        ({"radius": 1.0, "norm": "l3"}, "unknown norm 'l3'"),
        ({"radius": 1.0, "adaptive": "layer"}, "unknown kind of scale 'layer'"),
        ({"radius": 1.0, "steps": 0}, "steps is 0"),
        ({"radius": 1.0, "subset": "nothing"}, "matches no parameter"),
    ):
        with pytest.raises(errors.UserError, match=message):
            curvature.worst_case(quadratic, params, batch, **options)
    with pytest.raises(errors.UserError, match="pairs is 0"):
        curvature.average_case(quadratic, params, batch, key=KEY, radius=1.0, pairs=0)
    with pytest.raises(errors.UserError, match="not finite"):
        curvature.worst_case(infinite, params, {"slope": batch["slope"][:, :2]}, radius=1.0)
    with pytest.raises(errors.UserError, match="choose a divisor of 4"):
        curvature.m_sharpness(quadratic, params, batch, group=3, radius=1.0)
