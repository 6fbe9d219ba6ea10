"""Traces, diagonals and norms against matrices that are known, and their standard errors against the spread of repeats."""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import curvature, errors
from robust_vit.curvature import bases, operators, probes, traces

KEY = jax.random.key(0)


def _matrix(size: int = 60, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).normal(size=(size, size))
    return (draws + draws.T) / np.sqrt(size) + np.diag(np.arange(size) / size)


def _operator(matrix) -> operators.Symmetric:
    return operators.Symmetric(jnp.asarray(matrix, jnp.float32))


def test_signs_are_fair_and_their_own():
    like = {"a": jnp.zeros((40, 50)), "b": jnp.zeros(()), "c": jnp.zeros(2000)}
    drawn = probes.signs(KEY, like)
    for leaf in (drawn["a"], drawn["c"]):
        np.testing.assert_array_equal(np.unique(leaf), [-1, 1])
        assert abs(leaf.mean()) < 0.1  # Four standard errors of 2,000 draws: 0.09.
    assert abs(float(jnp.mean(drawn["a"].reshape(-1) * drawn["c"]))) < 0.1
    assert drawn["b"].dtype == jnp.float32


@pytest.mark.parametrize("method", traces.METHODS)
def test_the_trace_and_its_error(method):
    """Over 40 repeats the errors are spread as they say: the root mean square of error over standard error is near one."""
    matrix = _matrix()
    found = [curvature.trace(_operator(matrix), jax.random.key(seed), samples=48, method=method) for seed in range(40)]
    scores = [(one.value - np.trace(matrix)) / one.standard_error for one in found]
    assert 0.7 < np.sqrt(np.mean(np.square(scores))) < 1.4
    assert abs(np.mean(scores)) < 0.6
    assert {one.applications for one in found} == {48}


def test_a_diagonal_matrix_needs_one_sample():
    values = np.linspace(-1, 3, 30)
    found = curvature.trace(_operator(np.diag(values)), KEY, samples=8)
    np.testing.assert_allclose(found.value, values.sum(), rtol=1e-5)
    assert found.standard_error < 1e-5


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_it_is_exact_below_the_rank_of_its_span_and_better_where_the_spectrum_falls(method):
    draws = np.random.default_rng(0).normal(size=(60, 6))
    found = curvature.trace(_operator(draws @ draws.T), KEY, samples=24, method=method)
    np.testing.assert_allclose(found.value, np.trace(draws @ draws.T), rtol=1e-5)
    assert curvature.trace(_operator(np.zeros((20, 20))), KEY, samples=24, method=method).value == 0.0
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(200, 200)))[0]
    falling = (basis * 0.7 ** np.arange(200)) @ basis.T
    plain, better = (curvature.trace(_operator(falling), KEY, samples=48, method=m) for m in ("hutchinson", method))
    assert better.standard_error < plain.standard_error / 20
    assert abs(better.value - np.trace(falling)) < abs(plain.value - np.trace(falling)) / 5


def test_leaving_a_sample_out_is_as_if_it_had_not_been_drawn():
    """XTrace's estimates one by one, each with the span of the other samples computed anew."""
    with jax.enable_x64(True):
        matrix = _matrix(40)
        operator = operators.Symmetric(jnp.asarray(matrix))
        found = curvature.trace(operator, KEY, samples=12, method="xtrace", block=3)
        starts = (0, 3)
        samples = np.concatenate([traces._signs(jax.random.fold_in(KEY, start), operator.like, 3) for start in starts])
    values = []
    for index, sample in enumerate(samples):
        span = np.linalg.qr(matrix @ np.delete(samples, index, axis=0).T)[0]
        rest = sample - span @ (span.T @ sample)
        values.append(np.trace(span.T @ matrix @ span) + rest @ matrix @ rest)
    np.testing.assert_allclose(found.value, np.mean(values), rtol=1e-10)
    np.testing.assert_allclose(found.standard_error, np.std(values, ddof=1) / np.sqrt(6), rtol=1e-8)


def test_it_stops_at_the_precision_that_was_asked_for():
    """Positive definite, with a trace of 60 and an off-diagonal norm of 6: eight samples have an error of 5 %."""
    draws = np.random.default_rng(0).normal(size=(60, 60))
    matrix = np.eye(60) + 0.05 * (draws + draws.T)
    loose, tight, never = (
        curvature.trace(_operator(matrix), KEY, samples=400, tolerance=tolerance) for tolerance in (0.1, 0.01, 1e-6)
    )
    assert loose.samples == 16  # Looked at after two blocks.
    assert loose.converged
    assert 16 < tight.samples < 400
    assert tight.standard_error <= 0.01 * tight.value
    assert abs(tight.value - np.trace(matrix)) < 4 * tight.standard_error
    assert never.samples == 400
    assert not never.converged


class _Diagonal(flax.struct.PyTreeNode):
    """A diagonal matrix of any size."""

    like: jax.Array

    def __call__(self, vector):
        return self.like * vector


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_many_small_eigenvalues_below_the_rounding_of_few_large_ones_are_counted(method):
    """Five of 1 and 200,000 of 1e-8: no image is told from the span of five others in float32, and they sum to 0.002."""
    operator = _Diagonal(jnp.concatenate([jnp.ones(5), jnp.full(200_000, 1e-8)]))
    for seed in range(3):
        found = curvature.trace(operator, jax.random.key(seed), samples=48, method=method)
        assert 0 < found.standard_error < 1e-5  # Measured: 2e-6 and 6e-7, rounding.
        assert abs(found.value - 5.002) < 4 * found.standard_error  # Measured: 0.6 at most.


def test_fewer_dimensions_than_a_block_are_counted_as_they_are_multiplied():
    found = curvature.trace(_Diagonal(jnp.arange(1.0, 6.0)), KEY, method="xtrace", block=8)
    assert found.value == pytest.approx(15.0, rel=1e-6)
    assert (found.samples, found.applications) == (8, 16)
    assert 0 < found.standard_error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), [("hutch++", 0.02), ("xtrace", 0.01)])
def test_a_span_doubles_until_it_has_the_precision_that_was_asked_for(method, precision):
    """Eigenvalues 1/k: the larger the span, the less is left outside. What was multiplied is not multiplied again."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(150, 150)))[0]
    values = 1 / np.arange(1.0, 151)
    counted = _Counting(_operator((basis * values) @ basis.T).matrix)
    options = {"samples": 96, "method": method, "block": 4}
    loose, tight, never = (curvature.trace(counted, KEY, tolerance=t, **options) for t in (0.2, precision, 1e-9))
    assert loose.applications == 24
    assert loose.converged
    assert loose.applications < tight.applications < never.applications
    assert tight.standard_error <= precision * tight.value
    assert abs(tight.value - values.sum()) < 4 * tight.standard_error
    assert not never.converged
    assert never.applications == {"hutch++": 96 + 24, "xtrace": 96}[method]
    assert sum(counted.counts) == loose.applications + tight.applications + never.applications
    # The span that grew is the one that is drawn at once.
    fixed = curvature.trace(counted, KEY, **options)
    assert fixed.applications == 96
    assert never.value == pytest.approx(fixed.value, rel=1e-5)


@dataclasses.dataclass(frozen=True)
class _Counting:
    """A symmetric matrix that the host applies, and counts the vectors of."""

    matrix: jax.Array
    counts: list[int] = dataclasses.field(default_factory=list)

    @property
    def like(self):
        return self.matrix[0]

    def block(self, vectors):
        self.counts.append(len(vectors))
        return jnp.matmul(vectors, self.matrix, precision="highest")


def test_the_frobenius_norm():
    matrix = _matrix()
    found = curvature.frobenius(_operator(matrix), KEY, samples=400)
    assert abs(found.value - np.linalg.norm(matrix)) < 4 * found.standard_error
    assert found.standard_error < 0.02 * found.value
    assert curvature.frobenius(_operator(np.zeros((4, 4))), KEY, samples=8).value == 0.0
    loose, never = (curvature.frobenius(_operator(matrix), KEY, samples=400, tolerance=t) for t in (0.03, 1e-6))
    assert 16 <= loose.samples < 400
    assert loose.standard_error <= 0.03 * loose.value
    assert loose.converged
    assert (never.samples, never.converged) == (400, False)


def test_the_diagonal_and_its_error():
    matrix = _matrix()
    values, error = curvature.diagonal(_operator(matrix), KEY, samples=800)
    expected = np.sqrt((np.square(matrix).sum(axis=1) - np.diag(matrix) ** 2) / 800)
    np.testing.assert_allclose(error, expected, rtol=0.2)
    scores = (np.asarray(values) - np.diag(matrix)) / np.asarray(error)
    assert 0.7 < np.sqrt(np.mean(scores**2)) < 1.4


def test_the_diagonal_stops_at_the_precision_that_was_asked_for():
    counted = _Counting(_operator(_matrix() + 4 * np.eye(60)).matrix)
    values, error = curvature.diagonal(counted, KEY, samples=4000, tolerance=0.05)
    taken = sum(counted.counts)
    assert np.linalg.norm(error) <= 0.05 * np.linalg.norm(values)
    assert 16 <= taken < 200
    fewer = curvature.diagonal(counted, KEY, samples=taken - 8)
    assert np.linalg.norm(fewer[1]) > 0.05 * np.linalg.norm(fewer[0])
    assert np.isnan(curvature.diagonal(counted, KEY, samples=1, block=1)[1]).all()  # One sample has no spread.


def _quartic(params, batch):
    return jnp.mean(batch["x"]) * (params["a"] ** 3 + jnp.sum(params["b"] ** 2) * params["a"])


def test_of_a_hessian_on_a_pytree_of_a_batch_and_of_a_stream():
    """At a = 1, b = (1, 2): the diagonal is (6, 2, 2) times the mean of x."""
    params = {"a": jnp.float32(1.0), "b": jnp.array([1.0, 2.0])}
    parts = [{"x": jnp.ones(4)}, {"x": jnp.full(2, 4.0)}]
    whole = curvature.hessian(_quartic, params, {"x": jnp.concatenate([part["x"] for part in parts])})
    streamed = curvature.stream(functools.partial(curvature.hessian, _quartic, params), parts)
    for operator in (whole, streamed):
        found = curvature.trace(operator, KEY, samples=64)
        assert abs(found.value - 20.0) < 4 * found.standard_error
        values, error = curvature.diagonal(operator, KEY, samples=64)
        assert jax.tree.structure(values) == jax.tree.structure(params)
        assert (np.abs(values["b"] - 4.0) < 4 * error["b"]).all()


def test_an_orthonormal_basis_leaves_out_what_is_spanned():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 7)).astype(np.float32)
    rows = np.stack([rows[0], 2 * rows[0], rows[1], rows[0] - 3 * rows[1], rows[2]])
    basis = bases.orthonormal({"a": jnp.asarray(rows[:, :4]), "b": jnp.asarray(rows[:, 4:])})
    flat = np.concatenate([basis["a"], basis["b"]], axis=1)
    np.testing.assert_allclose(flat @ flat.T, np.diag([1.0, 0, 1, 0, 1]), atol=1e-6)


def _not_finite(params, batch):
    return jnp.mean(batch["x"]) * jnp.sum(jnp.abs(params["w"]) ** 1.5)  # Its second derivative at zero is infinite.


@pytest.mark.parametrize("solve", [curvature.trace, curvature.frobenius, curvature.diagonal])
def test_mistakes_say_what_to_do(solve):
    operator = curvature.hessian(_not_finite, {"w": jnp.zeros(3)}, {"x": jnp.ones(2)})
    with pytest.raises(errors.UserError, match="not finite"):
        solve(operator, KEY, samples=8)
    for options in ({"samples": 0}, {"block": 0}):
        methods = [{"method": method} for method in traces.METHODS] if solve is curvature.trace else [{}]
        for method in methods:
            with pytest.raises(errors.UserError, match=f"{next(iter(options))} is 0"):
                solve(_operator(np.eye(3)), KEY, **options, **method)
    with pytest.raises(errors.UserError, match=r"hutch\+\+"):
        curvature.trace(_operator(np.eye(3)), KEY, method="hutch+")
