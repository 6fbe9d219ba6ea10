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
from robust_vit.curvature import eigenvalues, growth, krylov, operators

KEY = jax.random.key(0)


def _matrix(values, seed: int = 0) -> np.ndarray:
    """A symmetric matrix of these eigenvalues, in float64."""
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return (rotation * np.asarray(values, np.float64)) @ rotation.T


def _operator(values, dtype=jnp.float32, seed: int = 0):
    return operators.Symmetric(jnp.asarray(_matrix(values, seed), dtype))


def _precision(dtype):
    return jax.enable_x64(True) if dtype == jnp.float64 else contextlib.nullcontext()


def _spectra(size: int) -> dict[str, np.ndarray]:
    half = size // 2
    return {
        "spread": np.linspace(-1, 2, size),
        "decaying": 0.7 ** np.arange(size),
        "plus and minus pairs": np.r_[np.arange(1, half + 1), -np.arange(1, half + 1)],
        "cluster at the top": np.r_[np.linspace(0, 0.5, half), np.linspace(0.999, 1.0, half)],
        "multiple": np.r_[[3.0] * 4, [-2.0] * 3, [0.5] * (size - 7)],
        "rank deficient": np.r_[[5.0, -4.0, 1.0], np.zeros(size - 3)],
        "identity": np.ones(size),
        "zero": np.zeros(size),
        "negative": -np.linspace(1, 9, size),
        "huge": 1e12 * np.linspace(-1, 2, size),
        "tiny": 1e-12 * np.linspace(-1, 2, size),
        "of squares that overflow": 1e25 * np.linspace(-1, 2, size),
        "of squares that underflow": 1e-25 * np.linspace(-1, 2, size),
    }


SPECTRA = _spectra(24)


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
    assert found.applications == -(-24 // block) * block + 24
    np.testing.assert_allclose(found.weights.sum(), 1.0, rtol=1e-12)


def test_large_matrices_at_full_rank_in_float32_have_their_dense_eigenvalues():
    """Measured: 5e-6 of the largest and less."""
    for name, values in {**_spectra(200), "slowly decaying": 0.9 ** np.arange(200)}.items():
        operator = _operator(values)
        found = curvature.lanczos(operator, KEY, rank=200, top=200, which="smallest")
        dense = np.linalg.eigvalsh(np.asarray(operator.matrix, np.float64))
        np.testing.assert_allclose(found.values, dense, atol=1e-5 * np.abs(values).max(), err_msg=name)
        assert found.applications == 200


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


_LOW_RANK = np.r_[[5.0, -4.0, 3.0, 2.0, 1.0], np.zeros(145)]


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("check_every", [None, 12])
def test_low_rank_takes_no_more_applications_than_asked_for(block, check_every):
    """Each step after the range is complete takes a fresh direction at once; a look sees that none of them finds anything."""
    options = {"rank": 100, "top": 5, "check_every": check_every, "block": block, "verify": True}
    found = curvature.lanczos(_operator(_LOW_RANK), KEY, **options)
    np.testing.assert_allclose(found.values, [5, -4, 3, 2, 1], atol=2e-5)
    assert found.converged.all()
    # A block is complete when all of its vectors are.
    assert found.applications <= 5 + (100 if check_every is None else 12 if block == 1 else 24)
    state = krylov.extend(_operator(_LOW_RANK), krylov.start(_operator(_LOW_RANK), KEY, rank=24), steps=30)
    np.testing.assert_allclose(state.basis @ state.basis.T, np.eye(24), atol=2e-6)


@pytest.mark.slow
def test_gauss_newton_of_two_examples_takes_its_rank_of_applications():
    params, batch = _network(0, 2)
    operator = curvature.gauss_newton(_logits, params, batch)
    found = curvature.lanczos(operator, KEY, rank=30, top=6)
    assert found.applications == 30
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    dense = np.stack(
        [jax.flatten_util.ravel_pytree(operator(unravel(row)))[0] for row in np.eye(flat.size, dtype="f4")]
    )
    exact = np.linalg.eigvalsh(np.asarray(dense, np.float64))[::-1]
    np.testing.assert_allclose(found.values, exact[:6], atol=1e-5 * exact[0])
    looked = curvature.lanczos(operator, KEY, rank=30, top=3, check_every=5)
    assert looked.applications <= 10
    np.testing.assert_allclose(looked.values, exact[:3], atol=1e-5 * exact[0])


def _logits(params, batch):
    return jnp.tanh(batch["x"] @ params["u"]) @ params["w"]


@pytest.mark.parametrize("check_every", [1, 2, 4, 5])
def test_looks_in_the_middle_of_a_fresh_subspace_wait_for_it(check_every):
    """All copies of both ends, whatever the looks fall on."""
    found = curvature.lanczos(_operator(SPECTRA["multiple"]), KEY, rank=24, top=7, check_every=check_every)
    np.testing.assert_allclose(found.values, [3] * 4 + [-2] * 3, atol=1e-5)
    assert found.applications < 24


def test_a_start_in_an_invariant_subspace_says_nothing_of_what_is_outside():
    rotation = np.linalg.eigh(_matrix(SPECTRA["spread"]))[1].T
    first = jnp.asarray(rotation[:1], jnp.float32)
    options = {"rank": 24, "top": 1, "which": "largest", "first": first}
    for check_every in (None, 1):
        found = curvature.lanczos(_operator(SPECTRA["spread"]), KEY, check_every=check_every, **options)
        np.testing.assert_allclose(found.values, [2.0], atol=2e-6 if check_every is None else 1e-3)
        assert found.applications <= 24


def test_eigenvalues_whose_squares_underflow_are_found():
    operator = operators.Symmetric(jnp.diag(jnp.asarray([3e-23, 1e-23, 0.0], jnp.float32)))
    found = curvature.lanczos(operator, KEY, rank=3, top=3, verify=True)
    np.testing.assert_allclose(found.values, [3e-23, 1e-23, 0.0], atol=3e-28)
    assert 1e-28 < found.noise < 1e-27
    assert found.converged.all()
    early = curvature.lanczos(operator, KEY, rank=1, top=1)
    assert early.residuals[0] > 1e-24
    assert not early.converged.any()


def test_a_fresh_direction_follows_a_subspace_that_is_complete():
    operator = _operator(SPECTRA["multiple"])
    complete = krylov.extend(operator, krylov.start(operator, KEY, rank=5), steps=3)
    assert (int(complete.size), bool(complete.broken)) == (3, False)  # Three distinct eigenvalues: three steps.
    assert complete.beta[2, 0, 0] == 0
    np.testing.assert_allclose(
        np.linalg.eigvalsh(np.diag(complete.alpha[:3, 0, 0]) + _couplings(complete.beta[:2, 0, 0])),
        [-2, 0.5, 3],
        atol=1e-5,
    )
    np.testing.assert_allclose(np.linalg.eigvalsh(krylov.projected(complete)[0]), [-2, 0.5, 3], atol=1e-5)
    np.testing.assert_allclose(trees.norm(complete.following), 1.0, atol=1e-6)
    np.testing.assert_allclose(complete.basis @ complete.following[0], 0.0, atol=1e-6)
    full = krylov.extend(operator, complete, steps=9)
    assert int(full.size) == 5
    np.testing.assert_allclose(full.basis @ full.basis.T, np.eye(5), atol=1e-6)
    alone = krylov.extend(
        operators.Symmetric(jnp.eye(3)), krylov.start(operators.Symmetric(jnp.eye(3)), KEY, rank=5), steps=5
    )
    assert (int(alone.size), bool(alone.broken)) == (3, True)  # Nothing is left.


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


@pytest.mark.slow
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


def _ten_times(params, batch):
    return 10 * _loss(params, batch)


def _decaying(rate):
    def loss(params, batch):
        return _loss(params, batch) + rate / 2 * trees.dot(params, params)

    return loss


@pytest.mark.slow
def test_another_operator_on_the_same_arrays_is_not_gone_on_with(tmp_path, monkeypatch):
    """By name, by settings, and, where these say nothing, by what it makes of the first vector."""
    params, batch = _network(0)
    parts = [jax.tree.map(lambda leaf, r=rows: leaf[r], batch) for rows in (slice(0, 5), slice(5, 8))]

    def streamed(batches, **options):
        return curvature.stream(functools.partial(curvature.hessian, _loss, params), batches, **options)

    moved = [{**part, "x": part["x"] + 1.0} for part in parts]
    cases = [
        (curvature.hessian(_loss, params, batch), curvature.hessian(_ten_times, params, batch)),
        (curvature.hessian(_loss, params, batch), curvature.gauss_newton(_logits, params, batch)),
        (curvature.hessian(_decaying(0.0), params, batch), curvature.hessian(_decaying(3.0), params, batch)),
        (streamed(parts), streamed(moved)),
        (streamed(parts), streamed(parts, weight_decay=1e-5)),
        (streamed(parts), streamed(moved, weight_decay=3.0)),
    ]
    options = {"rank": 12, "top": 2, "check_every": 4, "tolerance": 1e-9}
    for number, (one, other) in enumerate(cases):
        whole = curvature.lanczos(one, KEY, folder=tmp_path / str(number), **options)
        with pytest.raises(errors.UserError, match="holds the decomposition of another operator"):
            curvature.lanczos(other, KEY, folder=tmp_path / str(number), **options)
        again = curvature.lanczos(one, KEY, folder=tmp_path / str(number), **options)
        np.testing.assert_array_equal(again.values, whole.values)
    # How a batch is cut up is no other operator.
    cut = curvature.lanczos(
        curvature.hessian(_loss, params, batch, microbatch=3), KEY, folder=tmp_path / "0", **options
    )
    assert cut.applications == 12
    assert " at 0x" not in (tmp_path / "0" / "identity.json").read_text()


def test_a_folder_is_saved_to_on_the_way_without_an_end_before_the_last(tmp_path, monkeypatch):
    values = np.r_[np.linspace(0, 1, 95), [10, 20, 30, 40, 50]]
    saves, save = [], growth.Saved.save
    monkeypatch.setattr(growth.Saved, "save", lambda *given: (saves.append(given[-1]), save(*given)))
    found = curvature.lanczos(_operator(values), KEY, rank=28, top=1, folder=tmp_path)
    assert saves == [10, 20, 30]
    assert (len(found.ritz), found.applications) == (28, 30)
    whole = curvature.lanczos(_operator(values), KEY, rank=28, top=1)
    np.testing.assert_allclose(found.ritz, whole.ritz, atol=1e-5 * 50)


def test_over_a_data_set_no_pass_is_idle():
    params, batch = _network(0, 8)
    streamed = curvature.stream(functools.partial(curvature.hessian, _loss, params), [batch])
    found = curvature.lanczos(streamed, KEY, rank=10, top=5, check_every=4, tolerance=1e-12)
    assert (len(found.ritz), found.applications) == (10, 10)


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
