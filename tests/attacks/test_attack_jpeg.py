"""JPEG as a function of pixels: against PIL's, its tables, its gradients in float64."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from robust_vit import errors
from robust_vit.attacks import jpeg


def _smooth(shape, seed=0, count=2):
    """Images with edges and slopes, 8 bits."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape)
    waves = rng.normal(size=(count, shape[2], 6))
    angle = 9 * (waves[..., 0, None, None] * x + waves[..., 1, None, None] * y) + waves[..., 2, None, None]
    image = 0.5 + 0.35 * np.sin(angle) + 0.2 * (waves[..., 3, None, None] * x > waves[..., 4, None, None] * (y - 0.4))
    return np.round(255 * np.clip(np.moveaxis(image, 1, -1), 0, 1)).astype(np.uint8)


_coded = jax.jit(jpeg.jpeg)


def _pil(images, quality):
    decoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(buffer, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(buffer)).reshape(image.shape))
    return np.stack(decoded)


@pytest.mark.parametrize("shape", [(32, 32, 3), (21, 37, 3), (24, 19, 1)])
def test_the_pixels_are_those_of_pil(shape):
    images = _smooth(shape)
    for quality in (10, 50, 90, 100):
        ours = np.asarray(_coded(jnp.asarray(images / 255, jnp.float32), np.full(2, quality, np.float32))) * 255
        theirs = _pil(images, quality).astype(float)
        # Integer arithmetic now and then rounds a coefficient the other way. Measured: at most 0.45 and 0.045.
        assert np.abs(ours - theirs).mean() < 0.6
        assert (np.abs(ours - theirs) > 3).mean() < 0.06
        assert np.abs(ours - np.round(ours)).max() < 1e-3
        assert np.abs(theirs - images).mean() > 0.3 or quality == 100


@pytest.mark.needs_data
def test_the_pixels_are_those_of_pil_on_photographs(data_dir):
    names = sorted((data_dir / "imagenet_samples" / "images").glob("*.jpg"))[:4]
    images = np.stack([np.asarray(Image.open(name).convert("RGB"))[40:200, 50:210] for name in names])
    for quality in (25, 75, 95):
        ours = np.asarray(_coded(jnp.asarray(images / 255, jnp.float32), np.full(4, quality, np.float32))) * 255
        # Measured: at most 0.39 in the mean, where JPEG itself changes the photographs by 1.7 to 6.
        assert np.abs(ours - _pil(images, quality)).mean() < 0.5


def test_each_image_has_a_quality_of_its_own():
    images = jnp.asarray(_smooth((32, 32, 3)) / 255, jnp.float32)
    together = _coded(images, np.asarray([20.0, 95.0], np.float32))
    for index, quality in enumerate((20.0, 95.0)):
        np.testing.assert_allclose(together[index], _coded(images, np.full(2, quality, np.float32))[index], atol=1e-6)


def test_tables_are_those_that_pil_writes():
    for quality in (1, 10, 49, 50, 51, 75, 99, 100):
        buffer = io.BytesIO()
        Image.fromarray(_smooth((16, 16, 3))[0]).save(buffer, "JPEG", quality=quality)
        written = Image.open(buffer).quantization
        for index, base in enumerate((jpeg._LUMINANCE, jpeg._CHROMINANCE)):
            table = jpeg.tables(base, jnp.asarray([quality], jnp.float32))[0]
            np.testing.assert_array_equal(np.asarray(table).ravel(), np.asarray(written[index]))


def test_the_soft_rounding_has_the_gradient_of_finite_differences():
    with jax.enable_x64(True):
        images = jnp.asarray(np.random.default_rng(2).uniform(0.3, 0.7, (1, 8, 10, 3)))
        direction = jnp.asarray(np.random.default_rng(3).normal(size=images.shape))
        weights = jnp.asarray(np.random.default_rng(4).normal(size=images.shape))

        @jax.jit
        @jax.value_and_grad
        def value(step):
            return jnp.sum(weights * jpeg.jpeg(images + step * direction, 80.0, rounding="soft"))

        step = 1e-8
        numeric = (value(step)[0] - value(-step)[0]) / (2 * step)
        np.testing.assert_allclose(value(0.0)[1], numeric, rtol=1e-4)
        assert abs(numeric) > 1e-3


def test_the_gradient_straight_through_is_that_without_rounding():
    images = jnp.asarray(np.random.default_rng(5).uniform(0.4, 0.6, (1, 8, 10, 3)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(6).normal(size=images.shape), jnp.float32)

    def value(images, rounding):
        found = jpeg.jpeg(images, 60.0, rounding=rounding)
        return jnp.sum(weights * found), found

    derivative = jax.jit(jax.grad(value, has_aux=True), static_argnums=1)
    (through, _), (smooth, _) = (derivative(images, rounding) for rounding in ("straight_through", _unrounded))
    np.testing.assert_allclose(through, smooth, atol=1e-4)
    # Without rounding only the halved chroma is lost: a grey image comes back.
    grey = jnp.broadcast_to(images[..., :1], images.shape)
    np.testing.assert_allclose(derivative(grey, _unrounded)[1], grey, atol=1e-3)


def _unrounded(values):
    return values


def test_an_unknown_rounding_names_the_known():
    with pytest.raises(errors.UserError, match="straight_through"):
        jpeg.jpeg(jnp.zeros((1, 8, 8, 3)), 50.0, rounding="straight")
