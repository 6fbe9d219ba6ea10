"""Leaves that are alike lie in one array, come back as they were, and change no eigenvalue."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import curvature, errors, trees
from robust_vit.curvature import krylov, layouts

KEY = jax.random.key(0)
SHAPES = {"a": {"kernel": (3, 2), "bias": (2,)}, "b": {"kernel": (3, 2), "bias": (2,)}, "head": (2, 5), "scale": ()}


def _tree(*axes):
    draw = np.random.default_rng(0)

    def make(shape):
        return jnp.asarray(draw.normal(size=(*axes, *shape)), jnp.float32)

    return jax.tree.map(make, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize("axes", [(), (4,), (4, 3)])
def test_what_is_put_together_comes_apart_as_it_was(axes):
    tree, layout = _tree(*axes), layouts.of(_tree())
    arrays = layout.together(tree, len(axes))
    assert sorted(array.shape for array in arrays) == sorted(
        (*axes, *shape) for shape in ((2, 3, 2), (2, 2), (1, 2, 5), (1,))
    )
    jax.tree.map(np.testing.assert_array_equal, layout.apart(arrays, len(axes)), tree)


def test_leaves_of_other_dtypes_are_no_members_and_a_tree_without_likeness_stays_as_it_is():
    assert len(layouts.of({"a": jnp.zeros(3), "b": jnp.zeros(3, jnp.bfloat16), "c": jnp.ones(3)}).groups) == 2
    alone = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    layout = layouts.of(alone)
    assert layout.together(alone) is alone
    assert layout.apart(alone) is alone
    assert layouts.of(jnp.zeros(3)).groups == ()


class _Diagonal(flax.struct.PyTreeNode):
    """A diagonal operator: `scale` squared."""

    scale: dict

    @property
    def like(self):
        return self.scale

    def __call__(self, vector):
        return jax.tree.map(lambda s, v: s * s * v, self.scale, vector)


@pytest.mark.parametrize("block", [1, 2])
def test_eigenvalues_and_vectors_are_those_of_the_operator_on_its_own_pytree(block):
    scale = _tree()
    operator, size = _Diagonal(scale=scale), trees.count(scale)
    found = curvature.lanczos(operator, KEY, rank=size + 1, top=4, vectors=True, verify=True, block=block)
    entries = np.sort(np.concatenate([np.ravel(leaf) ** 2 for leaf in jax.tree.leaves(scale)]))[::-1]
    np.testing.assert_allclose(found.values, entries[:4], rtol=1e-5)
    assert jax.tree.map(jnp.shape, found.vectors) == jax.tree.map(lambda leaf: (4, *leaf.shape), scale)
    assert found.residuals.max() < 1e-5 * entries[0]
    state = krylov.extend(operator, krylov.start(operator, KEY, rank=4), steps=4)
    assert len(state.basis) == 4


def test_first_vectors_are_given_and_refused_in_the_operators_own_shapes():
    scale = _tree()
    first = jax.tree.map(lambda leaf: jnp.ones((1, *leaf.shape)), scale)
    found = curvature.lanczos(_Diagonal(scale=scale), KEY, rank=8, top=1, first=first)
    # The quadratic form of the start: the mean of the diagonal.
    mean = np.mean(np.concatenate([np.ravel(leaf) ** 2 for leaf in jax.tree.leaves(scale)]))
    np.testing.assert_allclose(np.sum(found.weights * found.ritz), mean, rtol=1e-5)
    with pytest.raises(errors.UserError, match=r"'head': \(2, 2, 5\).*expected.*'head': \(1, 2, 5\)"):
        curvature.lanczos(
            _Diagonal(scale=scale), KEY, rank=8, top=1, first=jax.tree.map(lambda v: jnp.repeat(v, 2, 0), first)
        )
