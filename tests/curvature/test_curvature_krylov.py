"""Lanczos: prescribed spectra, no ghosts, no NaN, residuals that bound the error, identities of the quadrature."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import curvature, errors, losses, trees
from robust_vit.curvature import eigenvalues, krylov, operators

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


@pytest.mark.parametrize(
    ("dtype", "block", "tolerance"),
    [(jnp.float32, 1, 3e-6), (jnp.float64, 1, 1e-14), (jnp.float32, 4, 3e-6), (jnp.float64, 5, 1e-14)],
)
@pytest.mark.parametrize("name", SPECTRA)
def test_at_full_rank_every_spectrum_is_exact_with_its_multiplicities(name, dtype, block, tolerance):
    """Of blocks too, also of those that 24 is no multiple of, and of those that hold more vectors than there are left."""
    options = {"rank": 100, "top": 24, "which": "smallest", "verify": True, "block": block}
    with _precision(dtype):
        found = curvature.lanczos(_operator(SPECTRA[name], dtype), KEY, **options)
    scale = np.abs(SPECTRA[name]).max()
    np.testing.assert_allclose(found.values, np.sort(SPECTRA[name]), atol=tolerance * scale)
    np.testing.assert_array_equal(found.values, found.ritz)
    assert (found.residuals <= 3 * tolerance * scale).all()
    assert found.converged.all()
    # Others break down on the way, and idle until they are revived; of 25 vectors in 24 dimensions one does.
    if name in ("spread", "negative", "huge", "tiny") and 24 % block == 0:
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
    assert set(expected) == set(eigenvalues.ORDERS)
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
        np.linalg.eigvalsh(np.diag(broken.alpha[:3, 0, 0]) + _couplings(broken.beta[:2, 0, 0])), [-2, 0.5, 3], atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.eigvalsh(krylov.projected(broken)[0]), [-2, 0.5, 3], atol=1e-5)
    revived = krylov.revive(broken)
    assert not bool(revived.broken)
    np.testing.assert_allclose(broken.basis @ revived.following[0], 0.0, atol=1e-6)
    full = krylov.extend(operator, revived, steps=9)
    assert int(full.size) == 5
    np.testing.assert_allclose(full.basis @ full.basis.T, np.eye(5), atol=1e-6)
    unbroken = krylov.start(operator, KEY, rank=5)
    np.testing.assert_array_equal(krylov.revive(unbroken).following, unbroken.following)


@pytest.mark.parametrize("block", [2, 4])
def test_a_block_has_the_residuals_of_its_vectors(block):
    """Against the matrix itself; the couplings are where the estimate comes from."""
    values = np.r_[np.random.default_rng(1).normal(size=200), [4.0, 6.0]]
    options = {"rank": 24, "top": 4, "which": "both ends", "vectors": True, "block": block}
    found = curvature.lanczos(_operator(values), KEY, **options)
    true = [np.linalg.norm(_matrix(values) @ y - t * y) for y, t in zip(found.vectors, found.values, strict=True)]
    np.testing.assert_allclose(found.residuals, true, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.weights.sum(), 1.0, rtol=1e-12)
    assert found.applications == 24
    assert found.residuals.max() > 0.1  # A Krylov space of degree 24 / block has not found all of them.


def test_a_block_finds_multiple_eigenvalues_at_once():
    """A single vector sees one copy of each; the others come only from rounding."""
    values = np.r_[[2.0] * 2, np.linspace(-1, 1, 98)]
    with jax.enable_x64(True):
        operator = _operator(values, jnp.float64)
        one, two = (curvature.lanczos(operator, KEY, rank=20, top=2, which="largest", block=b) for b in (1, 2))
    np.testing.assert_allclose(two.values, 2.0, rtol=1e-3)
    assert (one.values > 1.9).sum() == 1


@pytest.mark.parametrize("block", [1, 3])
def test_a_start_that_is_given(block):
    """In an invariant subspace it is found complete, and gone on from; a start that is none is refused."""
    rotation = np.linalg.eigh(_matrix(SPECTRA["spread"]))[1].T
    first = jnp.asarray(7.0 * rotation[:block], jnp.float32)
    operator = _operator(SPECTRA["spread"])
    found = curvature.lanczos(operator, KEY, rank=3 * block, top=block, which="smallest", block=block, first=first)
    assert np.isfinite(found.values).all()
    np.testing.assert_allclose(found.ritz.min(), -1.0, atol=1e-5)
    if block == 1:
        np.testing.assert_allclose(krylov.start(operator, KEY, rank=2, first=first).following, rotation[:1], atol=1e-6)
    for bad in (0.0 * first, first.at[-1].set(jnp.nan), first.at[-1].set(first[0] if block > 1 else 0.0)):
        with pytest.raises(errors.UserError, match="first vectors are zero, not finite, or not linearly independent"):
            curvature.lanczos(operator, KEY, rank=3 * block, top=1, block=block, first=bad)
    with pytest.raises(errors.UserError, match=f"expected .*, {block} like the operator's vectors"):
        curvature.lanczos(operator, KEY, rank=3 * block, top=1, block=block, first=first[0])


def test_both_ends_alternate():
    np.testing.assert_array_equal(
        eigenvalues.ORDERS["both ends"](np.array([3.0, -1.0, 7.0, 0.0, 2.0])), [2, 1, 0, 3, 4]
    )


def test_over_a_data_set_it_is_lanczos_over_the_batch_of_all():
    params, batch = _network(0, 8)
    parts = [jax.tree.map(lambda leaf, r=rows: leaf[r], batch) for rows in (slice(0, 5), slice(5, 8))]
    streamed = curvature.stream(functools.partial(curvature.hessian, _loss, params), parts)
    for block in (1, 4):
        options = {"rank": 32, "top": 3, "verify": True, "block": block}
        whole = curvature.lanczos(curvature.hessian(_loss, params, batch), KEY, **options)
        found = curvature.lanczos(streamed, KEY, **options)
        np.testing.assert_allclose(found.values, whole.values, atol=2e-6)
        assert found.residuals.max() < 3e-6
        assert found.applications == whole.applications


class _Killed(Exception):
    pass


@pytest.mark.parametrize("block", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, block, monkeypatch):
    params, batch = _network(0)
    operator = curvature.hessian(_loss, params, batch)
    options = {"rank": 24, "top": 5, "check_every": 4, "tolerance": 1e-9, "vectors": True, "block": block}
    whole = curvature.lanczos(operator, KEY, **options)
    folder = tmp_path / "lanczos"
    extend, looks = krylov.extend, []

    def killed(*arguments, **keywords):
        looks.append(1)
        if len(looks) == 3:
            raise _Killed
        return extend(*arguments, **keywords)

    monkeypatch.setattr(krylov, "extend", killed)
    with pytest.raises(_Killed):
        curvature.lanczos(operator, KEY, folder=folder, **options)
    monkeypatch.setattr(krylov, "extend", extend)
    found = curvature.lanczos(operator, KEY, folder=folder, **options)
    monkeypatch.setattr(krylov, "extend", killed)  # Whoever asks again is told without a step.
    looks[:] = [1, 1]
    again = curvature.lanczos(operator, KEY, folder=folder, **options)
    for result in (found, again):
        for name in ("values", "residuals", "ritz", "weights", "applications"):
            np.testing.assert_array_equal(getattr(result, name), getattr(whole, name), err_msg=name)
        jax.tree.map(np.testing.assert_array_equal, result.vectors, whole.vectors)
    # Another batch, other parameters, another key: not the same decomposition.
    moved = jax.tree.map(lambda leaf: leaf + 1e-6, params)
    reversed_batch = jax.tree.map(lambda leaf: leaf[::-1], batch)
    others = [(curvature.hessian(_loss, moved, batch), KEY), (curvature.hessian(_loss, params, reversed_batch), KEY)]
    for other, key in [*others, (operator, jax.random.key(1))]:
        with pytest.raises(errors.UserError, match="holds the decomposition of another operator"):
            curvature.lanczos(other, key, folder=folder, **options)


def _couplings(beta):
    return np.diag(beta, 1) + np.diag(beta, -1)


def test_the_quadrature_is_exact_for_the_first_moments():
    """Nodes and weights reproduce `v'A^k v` for k up to twice the steps less one."""
    with jax.enable_x64(True):
        operator = _operator(np.random.default_rng(2).normal(size=60), jnp.float64)
        found = curvature.lanczos(operator, KEY, rank=5, top=1)
        v = np.asarray(krylov.start(operator, KEY, rank=5).following[0])
        matrix = np.asarray(operator.matrix)
        for power in range(10):
            moment = v @ np.linalg.matrix_power(matrix, power) @ v
            np.testing.assert_allclose(found.weights @ found.ritz**power, moment, rtol=1e-10, atol=1e-12)
        assert not np.isclose(found.weights @ found.ritz**10, v @ np.linalg.matrix_power(matrix, 10) @ v, rtol=1e-6)


def test_a_run_cut_in_two_is_the_same_run():
    operator = _operator(SPECTRA["spread"])
    whole = krylov.extend(operator, krylov.start(operator, KEY, rank=24), steps=9)
    cut = krylov.extend(operator, krylov.extend(operator, krylov.start(operator, KEY, rank=24), steps=4), steps=5)
    for name in ("basis", "following", "alpha", "beta", "kept", "scale", "size", "broken"):
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
    [
        ({"which": "biggest"}, "largest"),
        ({"rank": 2, "top": 3}, "rank is 2"),
        ({"top": 0}, "rank is"),
        ({"block": 0}, "block is 0"),
    ],
)
def test_mistakes_say_what_to_do(options, message):
    with pytest.raises(errors.UserError, match=message):
        curvature.lanczos(_operator(SPECTRA["spread"]), KEY, **options)
