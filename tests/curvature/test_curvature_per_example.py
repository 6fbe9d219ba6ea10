"""Lanczos in lock-step: each example against its own dense matrix, alone and in any company."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import curvature, errors, losses
from robust_vit.curvature import eigenvalues, operators, per_example

CLASSES, SIDE = 4, (3, 4)
DIMENSION = 12


@pytest.fixture(autouse=True)
def _compiled_fast():
    """What is asked here is what is computed, not to which byte: most of the time would be that of XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)


def keys(count, seed=0):
    """Of an example by its number, so that they are the same in any batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(count))


def softmax_linear(inputs, labels, kernel):
    return losses.cross_entropy(inputs.reshape(len(inputs), -1) @ kernel, labels)


def make(count=5, dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    kernel = generator.normal(size=(DIMENSION, CLASSES)).astype(dtype)
    inputs = 0.3 * generator.normal(size=(count, *SIDE)).astype(dtype)
    return jnp.asarray(inputs), jnp.arange(count) % CLASSES, jnp.asarray(kernel)


def dense(inputs, kernel):
    """`W (diag p - pp') W'` of each example, in float64."""
    flat, kernel = np.asarray(inputs, np.float64).reshape(len(inputs), -1), np.asarray(kernel, np.float64)
    logits = flat @ kernel
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.stack([kernel @ (np.diag(one) - np.outer(one, one)) @ kernel.T for one in p])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 2e-6), pytest.param(np.float64, 1e-13, marks=pytest.mark.slow)]
)
def test_at_full_rank_every_example_has_its_own_dense_spectrum(dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        inputs, labels, kernel = make(dtype=dtype)
        operator = curvature.input_hessian(softmax_linear, inputs, labels, kernel)
        found = curvature.example_eigenvalues(
            operator, keys(5), rank=50, top=DIMENSION, which="smallest", verify=True, vectors=True
        )
        matrices = dense(inputs, kernel)
        exact = np.linalg.eigvalsh(matrices)
        scale = exact.max(axis=1, keepdims=True)
        # Three eigenvalues and a null space of nine, whose copies take a fresh direction each.
        assert (np.abs(found.values - exact) <= tolerance * scale).all()
        # What is left below the rounding of the arithmetic ends a subspace, and is left out of its couplings.
        assert (found.residuals <= found.noise[:, None]).all()
        assert found.converged.all()
        assert (found.steps == DIMENSION).all()
        vectors = np.asarray(found.vectors, np.float64).reshape(5, DIMENSION, DIMENSION)
        np.testing.assert_allclose(
            vectors @ vectors.transpose(0, 2, 1), np.broadcast_to(np.eye(DIMENSION), (5, 12, 12)), atol=10 * tolerance
        )
        true = np.linalg.norm(vectors @ matrices - found.values[:, :, None] * vectors, axis=2)
        assert (true <= 3 * tolerance * scale).all()


def test_both_ends_stop_when_each_example_has_them_and_a_flat_one_stays_zero():
    inputs, labels, kernel = make()
    inputs = inputs.at[2].multiply(1e4)  # So sure that its loss is flat to the last digit.
    operator = curvature.input_hessian(softmax_linear, inputs, labels, kernel)
    found = curvature.example_eigenvalues(operator, keys(5), top=2, which="both ends", check_every=1, vectors=True)
    exact = np.linalg.eigvalsh(dense(inputs, kernel))
    np.testing.assert_allclose(found.values[:, 0], exact[:, -1], rtol=2e-6)
    np.testing.assert_allclose(found.values[:, 1], exact[:, 0], atol=2e-6 * exact.max())
    assert found.converged.all()
    # Two steps, of which the first finds nothing; the others have three eigenvalues and zero in their subspaces.
    assert found.steps[2] == 2
    assert (np.delete(found.steps, 2) <= CLASSES).all()
    assert found.applications == CLASSES
    assert (found.values[2] == 0).all()
    assert found.noise[2] == 0
    assert np.isfinite(found.vectors).all()


def rectified(inputs, labels, kernel):
    return losses.cross_entropy(jax.nn.relu(inputs.reshape(len(inputs), -1) @ kernel), labels)


def test_rectified_networks_take_no_more_applications_than_asked_for():
    """Whose input Hessians have the rank of the classes at most."""
    inputs, labels, kernel = make()
    operator = curvature.input_hessian(rectified, inputs, labels, kernel)
    found = curvature.example_eigenvalues(operator, keys(5), rank=10, top=3)
    assert found.applications == 10
    assert (found.steps == 10).all()
    each = [jax.hessian(lambda x, i=i: rectified(x[None], labels[i : i + 1], kernel)[0])(inputs[i]) for i in range(5)]
    exact = np.linalg.eigvalsh(np.asarray(each, np.float64).reshape(5, DIMENSION, DIMENSION))
    np.testing.assert_allclose(found.values, exact[:, ::-1][:, :3], atol=2e-6 * exact.max())
    looked = curvature.example_eigenvalues(operator, keys(5), rank=10, top=2, which="largest", check_every=5)
    np.testing.assert_allclose(looked.values, exact[:, ::-1][:, :2], atol=2e-6 * exact.max())
    assert looked.applications <= 10


def test_an_examples_result_is_its_own_in_any_company():
    inputs, labels, kernel = make(6)
    options = {"rank": 9, "top": 2, "which": "both ends", "check_every": 2, "tolerance": 1e-1}

    def solve(rows):
        rows = np.asarray(rows)
        operator = curvature.input_hessian(bent, inputs[rows], labels[rows], kernel)
        return curvature.example_eigenvalues(operator, keys(6)[rows], **options)

    whole = solve(range(6))
    assert len(set(whole.steps.tolist())) > 1  # Some go on after others are done.
    rows = [5, 2, 1, 1]
    part = solve(rows)
    # Measured: 4e-7 of the largest.
    np.testing.assert_allclose(part.values, whole.values[rows], atol=4e-6 * np.abs(whole.values).max())
    np.testing.assert_array_equal(part.steps, whole.steps[rows])


def bent(inputs, labels, kernel):
    """Indefinite, and of full rank."""
    hidden = jnp.tanh(2.0 * inputs.reshape(len(inputs), -1)) @ kernel
    return losses.cross_entropy(hidden, labels) + 0.3 * jnp.sum(jnp.sin(inputs), axis=(1, 2))


@pytest.mark.slow
def test_it_is_what_lanczos_finds_of_one_example_alone():
    inputs, labels, kernel = make(3)
    found = curvature.example_eigenvalues(
        curvature.input_hessian(bent, inputs, labels, kernel), keys(3), rank=6, top=2, which="both ends"
    )
    for index in range(3):
        one = curvature.input_hessian(bent, inputs[index : index + 1], labels[index : index + 1], kernel)
        # The starting vector is drawn for the shape of an example, so that both start from the same.
        alone = curvature.lanczos(Row(one, inputs[index]), keys(3)[index], rank=6, top=2, which="both ends")
        np.testing.assert_allclose(found.values[index], alone.values, rtol=2e-5)
        np.testing.assert_allclose(found.residuals[index], alone.residuals, rtol=2e-3, atol=1e-6)


class Row(operators.Scaled):
    """One row of a batched operator."""

    @property
    def like(self):
        return self.scale

    def __call__(self, vector):
        return self.operator(vector[None])[0]


def test_residuals_bound_the_error_before_convergence():
    inputs, labels, kernel = make(4)
    operator = curvature.input_hessian(bent, inputs, labels, kernel)
    exact = curvature.example_eigenvalues(operator, keys(4), rank=12, top=12, which="smallest").values
    found = curvature.example_eigenvalues(operator, keys(4, 1), rank=4, top=2, which="both ends")
    true = curvature.example_eigenvalues(operator, keys(4, 1), rank=4, top=2, which="both ends", verify=True)
    np.testing.assert_allclose(found.residuals, true.residuals, rtol=1e-3, atol=2e-6)
    assert (found.residuals > 1e-3).all()
    assert not found.converged.all()
    distance = np.abs(found.values[:, :, None] - exact[:, None]).min(axis=2)
    assert (distance <= found.residuals + found.noise[:, None]).all()
    assert true.applications == 4 + 2


def test_both_ends_is_an_order_of_lanczos_too():
    values = np.asarray([5.0, 4.0, -1.0, -2.0, 0.5])
    found = curvature.lanczos(
        operators.Symmetric(jnp.diag(jnp.asarray(values))), jax.random.key(0), rank=5, top=5, which="both ends"
    )
    np.testing.assert_allclose(found.values, [5, -2, 4, -1, 0.5], atol=1e-5)
    np.testing.assert_array_equal(eigenvalues.ORDERS["both ends"](np.asarray([1.0, 3.0])), [1, 0])
    np.testing.assert_array_equal(eigenvalues.ORDERS["both ends"](np.asarray([7.0])), [0])


def linear_map(inputs, kernel):
    return inputs.reshape(len(inputs), -1) @ kernel * (1.0 + jnp.arange(len(inputs)))[:, None]


@pytest.mark.parametrize("outputs", [CLASSES, 30])  # Fewer and more than the inputs: JJ' and J'J.
def test_singular_values_of_linear_maps_with_their_vectors(outputs):
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(DIMENSION, outputs)).astype(np.float32)
    inputs = jnp.zeros((3, *SIDE))
    found = curvature.example_singular_values(
        linear_map, inputs, jnp.asarray(kernel), keys=keys(3), top=4, vectors=True
    )
    left, exact, _ = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(found.values, np.outer(1.0 + np.arange(3), exact[:4]), rtol=2e-6)
    assert found.converged.all()
    assert (found.steps == min(outputs, DIMENSION)).all()
    overlap = np.asarray(found.vectors).reshape(3, 4, DIMENSION) @ left[:, :4]
    np.testing.assert_allclose(np.abs(overlap), np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-5)
    early = curvature.example_singular_values(linear_map, inputs, jnp.asarray(kernel), keys=keys(3), rank=2)
    assert (np.abs(early.values - found.values[:, :1]) <= early.residuals).all() or outputs == 30
    nearest = np.abs(early.values - np.outer(1.0 + np.arange(3), exact).reshape(3, -1)).min(axis=1)
    assert (nearest[:, None] <= early.residuals).all()


def test_squaring_takes_half_of_the_digits_of_a_small_singular_value():
    """Which `noise` says: 1e-5 of the largest is told from zero in float64 and not in float32."""
    kernel = np.linalg.qr(np.random.default_rng(0).normal(size=(DIMENSION, 3)))[0] * np.asarray([1.0, 0.1, 1e-5])
    for dtype, resolved in ((np.float32, False), (np.float64, True)):
        with jax.enable_x64(resolved):
            inputs = jnp.zeros((1, *SIDE), dtype)
            found = curvature.example_singular_values(
                linear_map, inputs, jnp.asarray(kernel, dtype), keys=keys(1), top=3
            )
            assert (found.values[0, 2] > found.noise[0]) == resolved
            np.testing.assert_allclose(found.values[0, :2], [1.0, 0.1], rtol=1e-4)
            if resolved:
                np.testing.assert_allclose(found.values[0, 2], 1e-5, rtol=1e-5)


def test_gradient_norms():
    inputs, labels, kernel = make()
    gradient = jax.grad(lambda inputs: softmax_linear(inputs, labels, kernel).sum())(inputs)
    expected = np.linalg.norm(np.asarray(gradient).reshape(5, -1), axis=1)
    np.testing.assert_allclose(curvature.gradient_norms(softmax_linear, inputs, labels, kernel), expected, rtol=1e-6)


TRACES = []


def counted(inputs, labels, kernel):
    TRACES.append(None)
    return softmax_linear(inputs, labels, kernel)


def test_new_images_and_weights_compile_nothing():
    counts = []
    for seed in range(3):
        inputs, labels, kernel = make(3, seed=seed)
        operator = curvature.input_hessian(counted, inputs, labels, kernel)
        curvature.example_eigenvalues(operator, keys(3, seed), rank=4, top=2, which="both ends", check_every=2)
        counts.append(len(TRACES))
    assert counts[0] == counts[2] > 0


def infinite_for_the_second(inputs, labels, kernel):
    return softmax_linear(inputs, labels, kernel) * jnp.where(jnp.arange(len(inputs)) == 1, jnp.inf, 1.0)


def summed(inputs):
    return inputs.sum()


def test_what_is_refused():
    inputs, labels, kernel = make(3)
    operator = curvature.input_hessian(softmax_linear, inputs, labels, kernel)
    for options, message in (
        ({"which": "middle"}, "unknown order of eigenvalues 'middle'"),
        ({"rank": 1, "top": 2}, "rank is 1 for 2 eigenvalues"),
        ({"top": 0}, "for 0 eigenvalues"),
    ):
        with pytest.raises(errors.UserError, match=message):
            curvature.example_eigenvalues(operator, keys(3), **options)
    with pytest.raises(errors.UserError, match="give one typed key an example"):
        curvature.example_eigenvalues(operator, keys(2))
    bad = curvature.input_hessian(infinite_for_the_second, inputs, labels, kernel)
    with pytest.raises(errors.UserError, match="not finite for example 1"):
        curvature.example_eigenvalues(bad, keys(3), rank=3)
    with pytest.raises(errors.UserError, match="expected a row for each example"):
        curvature.example_singular_values(summed, inputs, keys=keys(3))
    with pytest.raises(errors.UserError, match="needs float32 or float64"):
        curvature.example_singular_values(linear_map, inputs.astype(jnp.bfloat16), kernel, keys=keys(3))
    assert per_example.ExampleValues is curvature.ExampleValues


def batch_loss(params, batch):
    return jnp.mean(jnp.log1p(jnp.exp(-batch["y"] * (jnp.tanh(batch["x"] @ params["u"]) @ params["w"]))))


def mini_batches(count, examples=6):
    rng = np.random.default_rng(3)
    params = {"u": rng.normal(size=(4, 3)), "w": rng.normal(size=3)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    draws = [(rng.normal(size=(examples, 4)), rng.choice([-1, 1], examples)) for _ in range(count)]
    return params, [{"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)} for x, y in draws]


@pytest.mark.parametrize("microbatch", [None, 4])
def test_mini_batches_in_lock_step_are_those_one_by_one(microbatch):
    params, batches = mini_batches(3)
    options = {"microbatch": microbatch, "weight_decay": 0.1}
    each = [curvature.hessian(batch_loss, params, batch, **options) for batch in batches]
    solve = {"rank": 15, "top": 3, "check_every": 5, "tolerance": 1e-5}
    found = curvature.example_eigenvalues(curvature.together(each), keys(3), **solve)
    for index, operator in enumerate(each):
        one = curvature.lanczos(operator, keys(3)[index], **solve)
        np.testing.assert_allclose(found.values[index], one.values, atol=1e-6)
        assert found.steps[index] == one.applications
    assert found.converged.all()
    assert np.ptp(found.values[:, 0]) > 1e-2


def test_operators_that_are_no_mini_batches_of_one_loss_are_not_taken_together():
    params, batches = mini_batches(2)
    first = curvature.hessian(batch_loss, params, batches[0])
    moved = jax.tree.map(lambda leaf: leaf + 1.0, params)
    smaller = jax.tree.map(lambda leaf: leaf[:3], batches[1])
    others = [
        curvature.hessian(batch_loss, moved, batches[1]),
        curvature.hessian(batch_loss, params, batches[1], weight_decay=0.1),
        curvature.hessian(batch_loss, params, batches[1], mode="finite difference"),
        curvature.hessian(batch_loss, params, smaller),
    ]
    for other in others:
        with pytest.raises(errors.UserError, match="differ in more than their batches"):
            curvature.together([first, other])
    with pytest.raises(errors.UserError, match="no operators"):
        curvature.together([])
