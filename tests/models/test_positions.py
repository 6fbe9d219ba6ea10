"""Position tables: what their inner products depend on, and what resizing keeps."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import errors, models
from robust_vit.models import positions


def test_sincos1d_entries():
    table = positions.sincos1d(7, 8)
    assert table.shape == (7, 8)
    for position, index in itertools.product(range(7), range(4)):
        angle = position / 10_000 ** (index / 4)
        np.testing.assert_allclose(table[position, [index, 4 + index]], [np.sin(angle), np.cos(angle)], atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_sincos2d_inner_products_depend_on_the_offset_alone(grid):
    table = positions.sincos2d(grid, 16).reshape(*grid, 16)
    np.testing.assert_allclose(np.sum(table**2, axis=-1), 8.0, rtol=1e-5)
    for down, right in itertools.product(range(grid[0] - 1), range(grid[1] - 1)):
        products = np.sum(table[: grid[0] - down, : grid[1] - right] * table[down:, right:], axis=-1)
        np.testing.assert_allclose(products, products[0, 0], rtol=1e-4, atol=1e-4)
    assert len(np.unique(table.reshape(-1, 16).round(4), axis=0)) == grid[0] * grid[1]


@pytest.mark.parametrize("class_token", [False, True])
def test_relative_offsets_index_pairs_by_offset(class_token):
    grid = (2, 3)
    index, length = positions.relative_offsets(grid, class_token=class_token)
    assert length == 3 * 5 + 3 * class_token
    assert set(index.reshape(-1)) == set(range(length))
    patches = index[1:, 1:] if class_token else index
    rows, columns = np.divmod(np.arange(6), 3)
    rows_seen: dict[tuple[int, int], set[int]] = {}
    for i, j in itertools.product(range(6), range(6)):
        rows_seen.setdefault((rows[i] - rows[j], columns[i] - columns[j]), set()).add(int(patches[i, j]))
    assert all(len(found) == 1 for found in rows_seen.values())
    assert len({next(iter(found)) for found in rows_seen.values()}) == len(rows_seen) == 15


def test_resizing_a_table_keeps_constants_ramps_and_the_class_token():
    ramp = jnp.repeat(jnp.arange(4.0), 4)[:, None] * jnp.ones((1, 2))
    table = jnp.concatenate([jnp.full((1, 2), 9.0), ramp])
    np.testing.assert_array_equal(positions.resize_table(table, old=(4, 4), new=(4, 4)), table)
    doubled = positions.resize_table(table, old=(4, 4), new=(8, 8))
    assert doubled.shape == (65, 2)
    np.testing.assert_array_equal(doubled[0], 9.0)
    # Half-pixel centres: row i of 8 sits at (i + 1/2) / 2 - 1/2 of the old rows; beyond the border it is constant.
    expected = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    np.testing.assert_allclose(doubled[1:].reshape(8, 8, 2)[:, 3, 0], expected, atol=1e-6)
    back = positions.resize_table(jnp.ones((16, 2)), old=(4, 4), new=(3, 5))
    np.testing.assert_allclose(back, jnp.ones((15, 2)), atol=1e-6)


def test_resizing_a_relative_table_keeps_its_centre_and_extra_rows():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((9 + 3, 2)), jnp.float32)
    resized = positions.resize_relative(table, old=(2, 2), new=(4, 4))
    assert resized.shape == (49 + 3, 2)
    np.testing.assert_array_equal(resized[-3:], table[-3:])
    np.testing.assert_allclose(resized[24], table[4], atol=1e-6)


@pytest.mark.parametrize("position", ["learned", "relative"])
@pytest.mark.parametrize("scan", [False, True])
def test_a_resized_model_has_the_shapes_of_the_new_grid(position, scan, random_variables):
    module = models.build("vit", num_classes=2, width=8, depth=2, heads=2, patch=4, position=position, scan=scan)
    resized = models.resize_positions(random_variables(module, (1, 8, 8, 1)), (2, 2), (3, 3))
    expected = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 12, 12, 1)))
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, expected)
    with pytest.raises(errors.UserError, match="no grid of 5 x 5"):
        models.resize_positions(resized, (5, 5), (3, 3))


def test_another_image_size_names_the_remedy(random_variables):
    module = models.build("vit", num_classes=2, width=8, depth=1, heads=2, patch=4)
    with pytest.raises(errors.UserError, match="resize_positions"):
        module.apply(random_variables(module, (1, 8, 8, 1)), jnp.zeros((1, 12, 12, 1)))
