"""Randomized smoothing: the class that a model gives most often under Gaussian noise, and the radius in which that is proven."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit import errors, loops
from robust_vit import mesh as meshes
from robust_vit import programs as compiled
from robust_vit.attacks import arguments, evaluation, expectations, inputs, runner
from robust_vit.metrics import statistics

ABSTAIN = -1
_PURPOSE = 0x736D6F6F  # "smoo": keeps the noise of certificates apart from every other draw under the same seed.


class GaussianNoise(flax.struct.PyTreeNode):
    """Adds Gaussian noise to canonical pixels, not clipped: the transform of `smooth`.

    Attributes:
      sigma: standard deviation, in pixel units [0, 1].
    """

    sigma: Any

    def __call__(
        self, keys: Key[Array, " batch"], images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """The images with a draw of noise for each key."""
        noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys)
        return images + jnp.asarray(self.sigma, images.dtype) * noise


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What is proven of each image. "Proven" errs for an image with probability `alpha` at most, over the noise.

    Attributes:
      prediction: the class of the smoothed model; -1 where it abstains.
      radius: in L2, pixel units: no image nearer than this has another class; 0 where it abstains.
      guess: the class that the selection's samples name, whether proven or not.
      votes: of the estimation's samples for `guess`.
      samples: of the estimation.
      sigma: standard deviation of the noise.
      alpha: probability of error.
    """

    prediction: Int[np.ndarray, " images"]
    radius: Float[np.ndarray, " images"]
    guess: Int[np.ndarray, " images"]
    votes: Int[np.ndarray, " images"]
    samples: int
    sigma: float
    alpha: float

    def right(self, labels: Int[np.ndarray, " images"], radius: float = 0.0) -> Bool[np.ndarray, " images"]:
        """Which images are proven to have their label up to this radius; their mean is the certified accuracy."""
        return (self.prediction == np.asarray(labels)) & (self.radius >= radius)


def smooth(model: Any, *, sigma: float, samples: int = 16) -> expectations.Expectation:
    """The smoothed model as attacks take it: its mean probability over draws of noise (Salman et al. 2019, arXiv 1906.04584).

    Cost of an evaluation: `samples` passes of the model.

    Args:
      model: canonical pixels to logits; the noise is added before its normalisation.
      sigma: standard deviation of the noise, in pixel units [0, 1].
      samples: draws for one evaluation.
    """
    arguments.positive(sigma=sigma)
    return expectations.expectation(model, transform=GaussianNoise(arguments.number(sigma)), samples=samples)


def certify(
    model: Any,
    images: Float[np.ndarray, "images height width channels"],
    *,
    sigma: float,
    rows: Int[np.ndarray, " images"] | None = None,
    seed: int = 0,
    selection: int = 100,
    estimation: int = 100_000,
    alpha: float = 0.001,
    chunk: int = 100,
    mesh: Mesh | None = None,
) -> Certificate:
    """Class and certified L2 radius of each image under the smoothed model (Cohen et al. 2019, arXiv 1902.02918, CERTIFY).

    The class is guessed from `selection` samples of noise; of `estimation` others, a one-sided Clopper-Pearson bound on the share
    that agrees gives `radius = sigma * Phi^-1(share)`, which ends at `largest_radius`. Noise is added to pixels in [0, 1],
    before the model normalises, and is not clipped. It depends on (seed, row, chunk) only; a new sigma compiles nothing.

    Cost: `selection + estimation` forward passes an image, each rounded up to whole chunks, in batches of `images * chunk`.

    Args:
      model: canonical pixels to logits, deterministic.
      images: canonical pixels; as many at a time as memory has room for, `chunk` times over.
      sigma: standard deviation of the noise, in pixel units [0, 1].
      rows: ids of the images, from which the noise is drawn; positions by default.
      seed: of the noise.
      selection: samples that choose the class.
      estimation: samples that prove it.
      alpha: probability that a certificate is wrong.
      chunk: samples of each image in one call of the model.
      mesh: devices that share the images, or None for JAX's default device.

    Raises:
      errors.UserError: settings out of range, a model that draws or that `check_inputs` refuses, before the first vote; logits
        that are not finite under noise, after the last.
    """
    arguments.counts(selection=selection, estimation=estimation, chunk=chunk)
    arguments.positive(sigma=sigma)
    _check_alpha(alpha)
    votes = _count(model, images, sigma, rows, seed, Vote(chunk, selection, estimation), mesh)
    guess = votes[:, 0].argmax(axis=1)
    counts = np.take_along_axis(votes[:, 1], guess[:, None], axis=1)[:, 0]
    radius = np.asarray([certified_radius(int(k), estimation, sigma=sigma, alpha=alpha) for k in counts])
    return Certificate(
        prediction=np.where(radius > 0, guess, ABSTAIN).astype(np.int32),
        radius=radius,
        guess=guess.astype(np.int32),
        votes=counts.astype(np.int32),
        samples=estimation,
        sigma=float(sigma),
        alpha=float(alpha),
    )


def predict(
    model: Any,
    images: Float[np.ndarray, "images height width channels"],
    *,
    sigma: float,
    rows: Int[np.ndarray, " images"] | None = None,
    seed: int = 0,
    samples: int = 1000,
    alpha: float = 0.001,
    chunk: int = 100,
    mesh: Mesh | None = None,
) -> Int[np.ndarray, " images"]:
    """Class of each image under the smoothed model, or -1 (Cohen et al. 2019, arXiv 1902.02918, PREDICT).

    It abstains where a two-sided binomial test cannot tell the two classes of most votes apart at `alpha`. Cost: `samples`
    forward passes an image. Arguments as in `certify`; the samples are those of its estimation.
    """
    arguments.counts(samples=samples, chunk=chunk)
    arguments.positive(sigma=sigma)
    _check_alpha(alpha)
    votes = _count(model, images, sigma, rows, seed, Vote(chunk, 0, samples), mesh)[:, 1]
    order = np.argsort(-votes, axis=1, kind="stable")[:, :2]
    first, second = (np.take_along_axis(votes, order[:, i : i + 1], axis=1)[:, 0] for i in (0, 1))
    sure = [scipy.stats.binomtest(int(a), int(a + b), 0.5).pvalue <= alpha for a, b in zip(first, second, strict=True)]
    return np.where(sure, order[:, 0], ABSTAIN).astype(np.int32)


def certified_radius(votes: int, samples: int, *, sigma: float, alpha: float) -> float:
    """`sigma * Phi^-1` of the one-sided Clopper-Pearson lower bound on the share of votes; 0 where it does not exceed a half."""
    lower = statistics.proportion(votes, samples, level=1.0 - 2.0 * alpha, over="draws").low
    return float(sigma * scipy.stats.norm.ppf(lower)) if lower > 0.5 else 0.0


def largest_radius(samples: int, *, sigma: float, alpha: float = 0.001) -> float:
    """What every vote for one class proves: `sigma * Phi^-1(alpha ** (1 / samples))`, 3.8115 sigma at 100,000 and 0.001."""
    return certified_radius(samples, samples, sigma=sigma, alpha=alpha)


def program(
    model: Any, images: jax.ShapeDtypeStruct, *, selection: int, estimation: int, chunk: int, times: int = 1
) -> compiled.Program:
    """The program that `certify` runs on images of this shape, for planning; the model's arrays may be shapes."""
    vote = Vote(chunk, selection, estimation)
    keys = jax.eval_shape(lambda: runner.example_keys(0, np.zeros(images.shape[0], np.uint32)))
    state = jax.eval_shape(functools.partial(_no_votes, images, evaluation.count_classes(model, images.shape)))
    sigma = jax.ShapeDtypeStruct((), jnp.result_type(float))
    plan = loops.plan(
        vote, compiled.beside(state, model), vote.chunks, model, images, compiled.beside(keys, model), sigma
    )
    return dataclasses.replace(plan, name="votes", times=plan.times * times)


@dataclasses.dataclass(frozen=True)
class Vote:
    """One chunk of votes, in the form that `loops.repeat` takes: the selection's chunks first, then the estimation's."""

    chunk: int
    selection: int
    estimation: int

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.selection // self.chunk) - (-self.estimation // self.chunk)

    def __call__(self, state, index: jax.Array, model: Any, images: jax.Array, keys: jax.Array, sigma: jax.Array):
        """The votes `[images, 2, classes]` with those of one chunk more, and how many logits were not finite."""
        votes, broken = state
        first = -(-self.selection // self.chunk)
        estimates = (index >= first).astype(jnp.int32)
        position = index - first * estimates
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, estimates), position))(keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, (self.chunk, *images.shape[1:]), images.dtype))(keys)
        noisy = images[:, None] + jnp.asarray(sigma, images.dtype) * noise
        logits = model(noisy.reshape(-1, *images.shape[1:])).reshape(images.shape[0], self.chunk, -1)
        limit = jnp.where(estimates == 1, self.estimation, self.selection)
        counted = position * self.chunk + jnp.arange(self.chunk) < limit
        chosen = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.int32)
        fresh = jnp.sum(chosen * counted[None, :, None].astype(jnp.int32), axis=1)
        broken = broken + jnp.sum(~jnp.isfinite(logits), axis=(1, 2)).astype(jnp.int32)
        return votes + fresh[:, None] * jax.nn.one_hot(estimates, 2, dtype=jnp.int32)[None, :, None], broken


def _count(
    model: Any, images: Any, sigma: float, rows: Any, seed: int, vote: Vote, mesh: Mesh | None
) -> Int[np.ndarray, "images 2 classes"]:
    if getattr(model, "stochastic", False):
        raise errors.UserError(
            "the model draws itself: certificates are of a deterministic model under Gaussian noise."
        )
    images = np.asarray(images, np.float32)
    inputs.check_values(model, images, np.zeros(len(images), np.int32))
    inputs.check_once(model, images, mesh=mesh)
    rows = np.asarray(np.arange(len(images)) if rows is None else rows, np.uint32)
    placed, rows = meshes.put_global(mesh, (images, rows))
    state = _no_votes(placed, evaluation.count_classes(model, images.shape))
    keys = _keys(runner.example_keys(seed, rows))
    found = loops.repeat(vote, state, vote.chunks, model, placed, keys, arguments.number(sigma))
    votes, broken = meshes.fetch(found)
    if broken.any():
        raise errors.UserError(
            f"the model gives NaN or infinite logits under noise of {sigma} for {(broken > 0).sum()} of {len(images)} images: "
            "check its weights and the precision that it computes in."
        )
    return votes


def _no_votes(images: jax.Array, classes: int) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((images.shape[0], 2, classes), jnp.int32), jnp.zeros(images.shape[0], jnp.int32)


@jax.jit
def _keys(keys: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, _PURPOSE))(keys)


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < 0.5:
        raise errors.UserError(f"alpha is {alpha}: expected a probability of error in (0, 0.5), for example 0.001.")
