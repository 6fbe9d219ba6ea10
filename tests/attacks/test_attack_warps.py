"""Warps: the identity to the byte, whole turns and shifts, parity with SciPy, perspective, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.ndimage

from robust_vit import errors
from robust_vit.attacks import warps

IDENTITY = np.eye(3, dtype=np.float32)
affine = jax.jit(warps.affine, static_argnames=("padding", "out_shape"))
MODES = {"zeros": "grid-constant", "edge": "nearest", "reflect": "mirror"}


def _images(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


def _plain(image, matrix, shape, padding):
    """The definition in the module's docstring, one image in NumPy and SciPy."""
    height, width = image.shape[:2]
    y, x = ((2 * np.arange(size) + 1) / size - 1 for size in shape)
    points = np.stack([*np.meshgrid(x, y), np.ones(shape)])
    seen = np.einsum("ij,jyx->iyx", matrix, points)
    if len(matrix) == 3:
        seen = seen[:2] / seen[2]
    columns, rows = ((seen[0] + 1) * width - 1) / 2, ((seen[1] + 1) * height - 1) / 2
    return np.stack(
        [
            scipy.ndimage.map_coordinates(image[..., c], [rows, columns], order=1, mode=MODES[padding])
            for c in range(image.shape[-1])
        ],
        axis=-1,
    )


@pytest.mark.parametrize("padding", warps.PADDINGS)
@pytest.mark.parametrize("shape", [(2, 32, 30, 3), (2, 1, 3, 2)])
@pytest.mark.parametrize("rows", [2, 3])
def test_the_identity_returns_the_same_bytes(padding, shape, rows):
    images = _images(shape)
    matrices = np.broadcast_to(IDENTITY[:rows], (len(images), rows, 3))
    np.testing.assert_array_equal(affine(images, matrices, padding=padding), images)


@pytest.mark.parametrize("padding", warps.PADDINGS)
@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("out_shape", [None, (4, 9)])
def test_every_map_is_that_of_scipy(padding, rows, out_shape):
    rng = np.random.default_rng(1)
    images = _images((3, 6, 8, 2), np.float64)
    matrices = np.eye(3) + 0.4 * rng.normal(size=(3, 3, 3))
    matrices[:, 2] = [0.2, -0.15, 1.1]
    with jax.enable_x64(True):
        found = affine(jnp.asarray(images), matrices[:, :rows], padding=padding, out_shape=out_shape)
        expected = [_plain(i, m[:rows], out_shape or (6, 8), padding) for i, m in zip(images, matrices, strict=True)]
        np.testing.assert_allclose(found, np.stack(expected), atol=1e-12)
    single = affine(images.astype(np.float32), matrices[:, :rows].astype(np.float32), padding=padding)
    expected = [_plain(i, m[:rows], (6, 8), padding) for i, m in zip(images, matrices, strict=True)]
    np.testing.assert_allclose(single, np.stack(expected), atol=2e-6)


def test_a_quarter_turn_goes_counterclockwise_and_a_shift_goes_right_and_down():
    images = _images((2, 6, 6, 3))
    turned = affine(images, warps.similarity(jnp.full(2, 90.0), jnp.zeros((2, 2))))
    np.testing.assert_allclose(turned, np.rot90(images, axes=(1, 2)), atol=2e-6)
    shifts = jnp.asarray([[2 / 6, 0.0], [0.0, 1 / 6]])
    shifted = np.asarray(affine(images, warps.similarity(jnp.zeros(2), shifts)))
    np.testing.assert_allclose(shifted[0, :, 2:], images[0, :, :-2], atol=2e-6)
    np.testing.assert_array_equal(shifted[0, :, :2], 0.0)
    np.testing.assert_allclose(shifted[1, 1:], images[1, :-1], atol=2e-6)


def test_first_the_scale_then_the_turn_then_the_shift():
    """A bright pixel of an image that is not square goes where plain arithmetic on pixels takes it."""
    height, width = 21, 41
    image = np.zeros((1, height, width, 1), np.float32)
    image[0, 10, 24] = 1.0  # Four pixels right of the centre.
    matrices = warps.similarity(
        jnp.asarray([90.0]), jnp.asarray([[5 / width, 3 / height]]), jnp.asarray([2.0]), aspect=width / height
    )
    found = np.asarray(affine(image, matrices))[0, :, :, 0]
    # Eight pixels above the centre, then five to the right and three down.
    assert np.unravel_index(found.argmax(), found.shape) == (10 - 8 + 3, 20 + 5)
    np.testing.assert_allclose(found.max(), 1.0, atol=1e-5)


def test_what_is_behind_the_eye_is_beyond_the_image():
    images = np.ones((1, 8, 8, 1), np.float32)
    matrix = IDENTITY.copy()
    matrix[2] = [2.0, 0.0, 0.0]  # Depth is negative in the left half.
    found = np.asarray(affine(images, matrix[None]))
    np.testing.assert_array_equal(found[0, :, :4], 0.0)
    assert found[0, :, 4:].max() > 0.5


def test_pixels_and_maps_have_the_gradients_of_finite_differences():
    with jax.enable_x64(True):
        images = jnp.asarray(_images((2, 5, 6, 2), np.float64))
        weights = jnp.asarray(_images((2, 5, 6, 2), np.float64, seed=3))
        parameters = jnp.asarray([[11.0, 0.07, -0.13, 1.1], [-23.0, -0.21, 0.05, 0.9]])

        def total(images, parameters):
            maps = warps.similarity(parameters[:, 0], parameters[:, 1:3], parameters[:, 3], aspect=6 / 5)
            return jnp.sum(weights * affine(images, maps))

        jax.test_util.check_grads(total, (images, parameters), order=1, modes=("fwd", "rev"), eps=1e-6, rtol=1e-5)


def test_mistakes_are_told():
    images = _images((2, 4, 4, 1))
    with pytest.raises(errors.UserError, match="did you mean 'reflect'"):
        warps.affine(images, np.stack([IDENTITY] * 2), padding="reflct")
    with pytest.raises(errors.UserError, match="one matrix an image"):
        warps.affine(images, IDENTITY[None])
