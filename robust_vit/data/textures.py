"""Textures and backgrounds as Gaussian noise of stated power spectra. Frequencies are in cycles per image width."""

from __future__ import annotations

import functools

import numpy as np
import scipy.fft
from jaxtyping import Float, UInt64

# (name, centre frequency, orientation of the wave vector in degrees or None for isotropic).
_BANDS = (
    ("coarse_0", 5.0, 0.0),
    ("coarse_45", 5.0, 45.0),
    ("coarse_90", 5.0, 90.0),
    ("coarse_135", 5.0, 135.0),
    ("fine_0", 10.0, 0.0),
    ("fine_45", 10.0, 45.0),
    ("fine_90", 10.0, 90.0),
    ("fine_135", 10.0, 135.0),
    ("ring", 7.5, None),
)
NAMES = (*(name for name, _, _ in _BANDS), "cloud")
BACKGROUNDS = tuple(f"background_{index}" for index in range(10))

BAND_WIDTH = 1.0  # Standard deviation of the radial Gaussian, cycles per image.
BAND_ANGLE = 10.0  # Standard deviation of the orientation, degrees.
CLOUD_SLOPE = 2.0  # Power falls as frequency to the minus this.
BACKGROUND_SLOPE = 2.0
BACKGROUND_STRETCH = 1.6  # Contours of a background's spectrum are ellipses with this squared as the ratio of the axes.
# Share of a texture's variance that is its own spectrum; the rest is white. Set by the cue-strength test.
TEXTURE_SHARE = 0.78


def spectrum(label: int, *, size: int) -> Float[np.ndarray, "size half"]:
    """Power of a texture at the frequencies of `rfft2`: a band-pass ring sector, a ring, or a power law, plus a white part.

    Args:
      label: index into `NAMES`.
      size: image size in pixels.

    Returns:
      Power, scaled so that a field of it has unit variance; the mean (zero frequency) is 0.
    """
    frequency, angle = _polar(size)
    if label < len(_BANDS):
        _, centre, orientation = _BANDS[label]
        power = np.exp(-0.5 * ((frequency - centre) / BAND_WIDTH) ** 2)
        if orientation is not None:
            off = (angle - orientation + 90) % 180 - 90
            power = power * np.exp(-0.5 * (off / BAND_ANGLE) ** 2)
    else:
        power = np.maximum(frequency, 1) ** -CLOUD_SLOPE
    white = _unit_variance(np.ones_like(frequency))
    return TEXTURE_SHARE * _unit_variance(power) + (1 - TEXTURE_SHARE) * white


def background_spectrum(label: int, *, size: int) -> Float[np.ndarray, "size half"]:
    """Power of a background: an inverse square law along ellipses turned by 18 degrees a label; unit variance, zero mean."""
    frequency, angle = _polar(size)
    off = np.deg2rad(angle - 18.0 * label)
    stretched = frequency * np.hypot(np.cos(off) / BACKGROUND_STRETCH, np.sin(off) * BACKGROUND_STRETCH)
    return _unit_variance(np.maximum(stretched, 0.5) ** -BACKGROUND_SLOPE)


@functools.cache
def amplitudes(kind: str, size: int) -> Float[np.ndarray, "label size half"]:
    """Square roots of all spectra of a kind ("texture" or "background"), float32, read-only."""
    function, names = {"texture": (spectrum, NAMES), "background": (background_spectrum, BACKGROUNDS)}[kind]
    stacked = np.sqrt(np.stack([function(label, size=size) for label in range(len(names))])).astype(np.float32)
    # The transform keeps only the Hermitian part of these two columns, which has half the variance of what goes in.
    stacked[:, :, [0, -1]] *= np.sqrt(np.float32(2))
    stacked.flags.writeable = False
    return stacked


def fields(
    labels: np.ndarray, bits: UInt64[np.ndarray, "batch size half"], *, kind: str
) -> Float[np.ndarray, "batch size size"]:
    """Gaussian random fields, float32, of zero mean and expected unit variance.

    Args:
      labels: `[batch]`, which spectrum each has.
      bits: one random word for each frequency of `rfft2`.
      kind: "texture" or "background".
    """
    size = bits.shape[1]
    uniform = ((bits >> np.uint64(40)).astype(np.float32) + 0.5) * np.float32(2.0**-24)
    phase = (bits & np.uint64(0xFFFFFF)).astype(np.float32) * np.float32(2 * np.pi * 2.0**-24)
    radius = np.sqrt(-np.log(uniform)) * amplitudes(kind, size)[labels]
    noise = np.empty(bits.shape, np.complex64)
    np.multiply(radius, np.cos(phase), out=noise.real)
    np.multiply(radius, np.sin(phase), out=noise.imag)
    return scipy.fft.irfft2(noise, s=(size, size))


def _polar(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequency in cycles per image, and orientation in degrees [0, 180), at each entry of `rfft2`; y up."""
    vertical = -np.fft.fftfreq(size, 1 / size)[:, None]
    horizontal = np.fft.rfftfreq(size, 1 / size)[None]
    return np.hypot(vertical, horizontal), np.rad2deg(np.arctan2(vertical, horizontal)) % 180


def _unit_variance(power: np.ndarray) -> np.ndarray:
    """Scales power so that `irfft2` of complex Gaussians of that power has unit variance (Parseval)."""
    power = power.copy()
    power[0, 0] = 0
    size = power.shape[0]
    # In the Nyquist column +y and -y are one frequency: it has the mean of the two powers.
    power[:, -1] = (power[:, -1] + power[-np.arange(size) % size, -1]) / 2
    weight = np.full(power.shape, 2.0)
    weight[:, 0] = weight[:, -1] = 1.0  # These columns are their own mirror image.
    return power * size**4 / (power * weight).sum()
