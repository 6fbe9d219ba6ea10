"""Lanczos: prescribed spectra, no ghosts, no NaN, residuals that bound the error, identities of the quadrature."""

from __future__ import annotations

import contextlib

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import curvature, errors, losses, trees
from robust_vit.curvature import krylov, operators

KEY = jax.random.key(0)


def _matrix(values, seed: int = 0) -> np.ndarray:
    """A symmetric matrix of these eigenvalues, in float64."""
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return (rotation * np.asarray(values, np.float64)) @ rotation.T


def _operator(values, dtype=jnp.float32, seed: int = 0):
    return operators.Symmetric(jnp.asarray(_matrix(values, seed), dtype))


def _precision(dtype):
    return jax.enable_x64(True) if dtype == jnp.float64 else contextlib.nullcontext()


SPECTRA = {
    "spread": np.linspace(-1, 2, 24),
    "decaying": 0.7 ** np.arange(24),
    "plus and minus pairs": np.r_[np.arange(1, 13), -np.arange(1, 13)],
    "cluster at the top": np.r_[np.linspace(0, 0.5, 12), np.linspace(0.999, 1.0, 12)],
    "multiple": np.r_[[3.0] * 4, [-2.0] * 3, [0.5] * 17],
    "rank deficient": np.r_[[5.0, -4.0, 1.0], np.zeros(21)],
    "identity": np.ones(24),
    "zero": np.zeros(24),
    "negative": -np.linspace(1, 9, 24),
    "huge": 1e12 * np.linspace(-1, 2, 24),
    "tiny": 1e-12 * np.linspace(-1, 2, 24),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 3e-6), (jnp.float64, 1e-14)])
@pytest.mark.parametrize("name", SPECTRA)
def test_at_full_rank_every_spectrum_is_exact_with_its_multiplicities(name, dtype, tolerance):
    with _precision(dtype):
        found = curvature.lanczos(_operator(SPECTRA[name], dtype), KEY, rank=100, top=24, which="smallest", verify=True)
    scale = np.abs(SPECTRA[name]).max()
    np.testing.assert_allclose(found.values, np.sort(SPECTRA[name]), atol=tolerance * scale)
    np.testing.assert_array_equal(found.values, found.ritz)
    assert (found.residuals <= 3 * tolerance * scale).all()
    assert found.converged.all()
    if name in ("spread", "negative", "huge", "tiny"):  # Others break down on the way, and idle until they are revived.
        assert found.applications == 24 + 24
    np.testing.assert_allclose(found.weights.sum(), 1.0, rtol=1e-12)


@pytest.mark.parametrize("rank", [40, 80])
def test_no_ghosts(rank):
    """Five eigenvalues far above a bulk: without reorthogonalisation 46 Ritz values pile up on them in 80 steps."""
    values = np.r_[np.random.default_rng(0).uniform(0, 1, 395), [10, 20, 30, 40, 50]]
    operator = _operator(values)
    found = curvature.lanczos(operator, KEY, rank=rank, top=5)
    assert (found.ritz > 9).sum() == 5
    np.testing.assert_allclose(found.values, [50, 40, 30, 20, 10], rtol=1e-6)
    state = krylov.extend(operator, krylov.start(operator, KEY, rank=rank), steps=rank)
    overlap = np.asarray(state.basis, np.float64) @ np.asarray(state.basis, np.float64).T
    assert np.abs(overlap - np.eye(rank)).max() < 2e-6  # Measured: 3e-7.


def test_orders():
    values = np.r_[[9.0, 5.0, -7.0, -3.0], np.linspace(-1, 1, 26)]
    expected = {"magnitude": [9, -7, 5], "largest": [9, 5, 1], "smallest": [-7, -3, -1], "both ends": [9, -7, 5]}
    assert set(expected) == set(krylov.ORDERS)
    for which, top in expected.items():
        found = curvature.lanczos(_operator(values), KEY, rank=30, top=3, which=which)
        np.testing.assert_allclose(found.values, top, atol=1e-5)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("rank", [6, 12, 25])
def test_residuals_bound_the_error_and_decide_what_has_converged(rank, verify):
    values = np.r_[np.random.default_rng(1).normal(size=200), [4.0, 6.0]]
    operator = _operator(values)
    found = curvature.lanczos(
        operator, KEY, rank=rank, top=4, which="largest", verify=verify, vectors=True, tolerance=1e-4
    )
    nearest = np.abs(found.values[:, None] - values[None]).min(axis=1)
    assert (nearest <= found.residuals + found.noise).all()
    np.testing.assert_array_equal(
        found.converged, found.residuals <= np.maximum(1e-4 * np.abs(found.values), found.noise)
    )
    assert found.converged.all() == (rank == 25)
    true = [np.linalg.norm(_matrix(values) @ y - t * y) for y, t in zip(found.vectors, found.values, strict=True)]
    np.testing.assert_allclose(found.residuals, true, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1.0, rtol=1e-5)
    assert found.applications == rank + (4 if verify else 0)


def test_looking_every_few_steps_stops_when_the_top_has_converged():
    values = np.r_[np.random.default_rng(0).uniform(0, 1, 295), [10, 20, 30, 40, 50]]
    found = curvature.lanczos(_operator(values), KEY, rank=100, top=5, check_every=4)
    assert found.applications in (8, 12)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, [50, 40, 30, 20, 10], rtol=1e-4)
    # A spectrum that does not let go takes all it may, and says that it has not converged.
    flat = curvature.lanczos(_operator(np.linspace(0, 1, 300)), KEY, rank=10, top=5, check_every=4)
    assert flat.applications == 12  # Three looks at four steps each.
    assert len(flat.ritz) == 10
    assert not flat.converged.any()


def test_a_complete_invariant_subspace_does_not_stop_the_search():
    found = curvature.lanczos(_operator(SPECTRA["multiple"]), KEY, rank=24, top=7, check_every=3)
    np.testing.assert_allclose(found.values, [3] * 4 + [-2] * 3, atol=1e-5)


def test_steps_too_many_change_nothing_but_a_fresh_direction_does():
    operator = _operator(SPECTRA["multiple"])
    broken = krylov.extend(operator, krylov.start(operator, KEY, rank=5), steps=4)
    assert (int(broken.size), bool(broken.broken)) == (3, True)  # Three distinct eigenvalues: three steps.
    np.testing.assert_allclose(
        np.linalg.eigvalsh(np.diag(broken.alpha[:3]) + _couplings(broken.beta[:2])), [-2, 0.5, 3], atol=1e-5
    )
    revived = krylov.revive(broken)
    assert not bool(revived.broken)
    np.testing.assert_allclose(broken.basis @ revived.following, 0.0, atol=1e-6)
    full = krylov.extend(operator, revived, steps=9)
    assert int(full.size) == 5
    np.testing.assert_allclose(full.basis @ full.basis.T, np.eye(5), atol=1e-6)
    unbroken = krylov.start(operator, KEY, rank=5)
    np.testing.assert_array_equal(krylov.revive(unbroken).following, unbroken.following)


def _couplings(beta):
    return np.diag(beta, 1) + np.diag(beta, -1)


def test_the_quadrature_is_exact_for_the_first_moments():
    """Nodes and weights reproduce `v'A^k v` for k up to twice the steps less one."""
    with jax.enable_x64(True):
        operator = _operator(np.random.default_rng(2).normal(size=60), jnp.float64)
        found = curvature.lanczos(operator, KEY, rank=5, top=1)
        v = np.asarray(krylov.start(operator, KEY, rank=5).following)
        matrix = np.asarray(operator.matrix)
        for power in range(10):
            moment = v @ np.linalg.matrix_power(matrix, power) @ v
            np.testing.assert_allclose(found.weights @ found.ritz**power, moment, rtol=1e-10, atol=1e-12)
        assert not np.isclose(found.weights @ found.ritz**10, v @ np.linalg.matrix_power(matrix, 10) @ v, rtol=1e-6)


def test_a_run_cut_in_two_is_the_same_run():
    operator = _operator(SPECTRA["spread"])
    whole = krylov.extend(operator, krylov.start(operator, KEY, rank=24), steps=9)
    cut = krylov.extend(operator, krylov.extend(operator, krylov.start(operator, KEY, rank=24), steps=4), steps=5)
    for name in ("basis", "following", "alpha", "beta", "scale", "size", "broken"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name), err_msg=name)


def test_many_starts_under_one_map():
    operator = _operator(SPECTRA["spread"])
    keys = jax.random.split(KEY, 3)

    def tridiagonal(key):
        state = krylov.extend(operator, krylov.start(operator, key, rank=6), steps=6)
        return state.alpha, state.beta

    together = jax.jit(jax.vmap(tridiagonal))(keys)
    for row, key in enumerate(keys):
        for many, one in zip(together, tridiagonal(key), strict=True):
            np.testing.assert_allclose(many[row], one, rtol=2e-4, atol=1e-5)


def _loss(params, batch):
    _TRACES.append(1)
    return jnp.mean(losses.cross_entropy(jnp.tanh(batch["x"] @ params["u"]) @ params["w"], batch["y"]))


_TRACES: list[int] = []


def _network(seed: int, count: int = 8):
    rng = np.random.default_rng(seed)
    params = {"u": rng.normal(size=(5, 4)), "w": rng.normal(size=(4, 3))}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return params, {"x": jnp.asarray(rng.normal(size=(count, 5)), jnp.float32), "y": jnp.arange(count) % 3}


@pytest.mark.parametrize("microbatch", [None, 3])
def test_a_network_by_lanczos_is_its_dense_hessian(microbatch):
    params, batch = _network(0)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    dense = jax.jit(jax.hessian(lambda f: _loss(unravel(f), batch)))(flat)
    dense = np.linalg.eigvalsh(np.asarray(dense, np.float64))
    operator = curvature.hessian(_loss, params, batch, microbatch=microbatch)
    found = curvature.lanczos(operator, KEY, rank=100, top=100, which="smallest", vectors=True)
    np.testing.assert_allclose(found.values, dense, atol=2e-6)
    assert found.values[0] < -found.noise  # Not convex, and known to be so above the noise.
    assert jax.tree.structure(found.vectors) == jax.tree.structure(params)
    top = jax.tree.map(lambda rows: rows[-1], found.vectors)
    np.testing.assert_allclose(trees.dot(top, operator(top)), dense[-1], rtol=1e-5)


def test_new_batches_trace_nothing():
    counts = []
    for seed in range(3):
        _TRACES.clear()
        operator = curvature.hessian(_loss, *_network(seed, 7), weight_decay=0.1 * seed, separable=False)
        curvature.lanczos(operator, jax.random.key(seed), rank=9)
        counts.append(len(_TRACES))
    assert counts == [1, 0, 0]


def _convolutional_loss(params, batch):
    _TRACES.append(1)
    features = jax.lax.conv_general_dilated(
        batch["x"], params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(losses.cross_entropy(jnp.tanh(features).mean(axis=(1, 2)) @ params["w"], batch["y"]))


@pytest.mark.parametrize("microbatch", [None, 2])
def test_a_convolutional_network_too(microbatch):
    rng = np.random.default_rng(0)
    params = {"k": rng.normal(size=(3, 3, 1, 3)), "w": rng.normal(size=(3, 2))}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    batches = [{"x": jnp.asarray(rng.normal(size=(5, 4, 4, 1)), jnp.float32), "y": jnp.arange(5) % 2} for _ in range(2)]
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    counts = []
    for batch in batches:
        _TRACES.clear()
        operator = curvature.hessian(_convolutional_loss, params, batch, microbatch=microbatch, separable=False)
        found = curvature.lanczos(operator, KEY, rank=33, top=33, which="smallest")
        counts.append(len(_TRACES))
        dense = jax.jit(jax.hessian(lambda f, batch=batch: _convolutional_loss(unravel(f), batch)))(flat)
        np.testing.assert_allclose(found.values, np.linalg.eigvalsh(np.asarray(dense, np.float64)), atol=2e-6)
    assert counts == [1 if microbatch is None else 2, 0]  # The ragged rest is a second shape.


def _infinite(params, batch):
    return jnp.sum(jnp.sqrt(params["w"])) * jnp.mean(batch["x"])


def test_an_operator_that_is_not_finite_is_an_error():
    operator = curvature.hessian(_infinite, {"w": jnp.array([0.0, 1.0, 2.0])}, {"x": jnp.ones(2)})
    with pytest.raises(errors.UserError, match="not finite at application 1"):
        curvature.lanczos(operator, KEY, rank=3, top=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"which": "biggest"}, "largest"), ({"rank": 2, "top": 3}, "rank is 2"), ({"top": 0}, "rank is")],
)
def test_mistakes_say_what_to_do(options, message):
    with pytest.raises(errors.UserError, match=message):
        curvature.lanczos(_operator(SPECTRA["spread"]), KEY, **options)
