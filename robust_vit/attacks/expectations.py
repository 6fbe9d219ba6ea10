"""Expectation over transformations: a model asked through random changes of the image, or through its own randomness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robust_vit import classifier, errors
from robust_vit.attacks import arguments, evaluation


class Expectation(flax.struct.PyTreeNode, kw_only=True):
    """A model whose answer is its mean probability over draws: `expectation` makes one; any attack takes it as a model.

    Attacks then climb the mean loss over the draws, and an image counts as a success where the mean probability, over draws that
    no step has seen, says so.

    Attributes:
      model: canonical pixels to logits, stochastic or not.
      transform: `(keys, images) -> images`, a pytree; None for a model whose own draws are averaged.
      draws: of the transform for one evaluation; static.
    """

    model: Any
    transform: Any = None
    draws: int = flax.struct.field(pytree_node=False, default=16)

    stochastic: ClassVar[bool] = True

    @property
    def samples(self) -> int:
        """Passes of the model for one evaluation."""
        return self.draws * evaluation.passes(self.model)

    def sample(
        self, images: Float[Array, "batch height width channels"], keys: Key[Array, " batch"]
    ) -> Float[Array, "samples batch classes"]:
        """Logits under each draw, in one call on a batch that is `draws` times as large."""
        return self._sample(self.model, images, keys)

    def sample_features(
        self, images: Float[Array, "batch height width channels"], keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, "samples batch classes"], dict[str, jax.Array]]:
        """Logits and features under each draw, `[samples, batch, ...]`; no features of a model that names none."""
        return self._sample(Featured(self.model), images, keys)

    def _sample(self, model: Any, images: jax.Array, keys: jax.Array) -> Any:
        # The draws of an image are neighbours, so that a batch that is split over devices stays where it is.
        wide = jnp.repeat(images, self.draws, axis=0)
        keys = jax.vmap(lambda key: jax.random.split(key, self.draws))(keys).reshape(-1)
        if self.transform is not None:
            wide = self.transform(keys, wide)
        leading = 2 if getattr(model, "stochastic", False) else 1

        def by_draw(found: jax.Array) -> jax.Array:
            rest = found.shape[leading:]
            found = jnp.moveaxis(found.reshape(-1, images.shape[0], self.draws, *rest), 2, 0)
            return found.reshape(self.samples, images.shape[0], *rest)

        return jax.tree.map(by_draw, evaluation.respond(model, wide, keys))

    def __call__(self, images: jax.Array, *, keys: jax.Array | None = None) -> Float[Array, "batch classes"]:
        """Logarithms of the mean probabilities; without keys under the same draws for each image, each time."""
        keys = classifier.same_draws(images) if keys is None else keys
        return evaluation.collapse(self.sample(images, keys))


@dataclasses.dataclass(frozen=True)
class Featured:
    """A model that answers with its features besides: `evaluation.respond(Featured(model), ...)` is `(logits, features)`.

    Attributes:
      model: canonical pixels to logits; the features are those of its `features`, or of its `sample_features`; else none.
    """

    model: Any

    @property
    def stochastic(self) -> bool:
        """Whether the model is."""
        return getattr(self.model, "stochastic", False)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits and features, `[batch, ...]`."""
        features = getattr(self.model, "features", None)
        return features(images) if features is not None else (self.model(images), {})

    def sample(self, images: jax.Array, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits and features under each draw, `[samples, batch, ...]`."""
        features = getattr(self.model, "sample_features", None)
        return features(images, keys) if features is not None else (self.model.sample(images, keys), {})


@dataclasses.dataclass(frozen=True)
class _Named:
    """A function as a pytree without leaves; equal for equal functions, so nothing is traced twice."""

    function: Callable

    def __call__(self, keys: jax.Array, images: jax.Array) -> jax.Array:
        return self.function(keys, images)


jax.tree_util.register_static(_Named)


def expectation(model: Any, *, transform: Callable | None = None, samples: int = 16) -> Expectation:
    """The model as any attack should see it where the image will be changed at random, or the model itself draws.

    Expectation over transformation (Athalye et al. 2018, arXiv 1707.07397), in one widened batch. Cost of an evaluation:
    `samples` passes, times those of a model that is an expectation itself.

    Args:
      model: canonical pixels to logits; with its own randomness, `robust_vit.classifier.wrap(..., stochastic=True)`.
      transform: `(keys, images) -> images`, differentiable: `robust_vit.attacks.print_photo()`, or a named function. What is a
        pytree keeps its numbers as leaves, so that another strength compiles nothing. None averages the model's own draws.
      samples: draws of the transform, or of the model, for one evaluation.

    Raises:
      errors.UserError: no transform, and a model that does not draw.
    """
    arguments.counts(samples=samples)
    if transform is None and not getattr(model, "stochastic", False):
        raise errors.UserError(
            "an expectation got a model that does not draw and no transform: give transform=..., or wrap the model with "
            "stochastic=True."
        )
    return Expectation(model=model, transform=as_pytree(transform), draws=samples)


def as_pytree(transform: Callable | None) -> Any:
    """A transform as an argument of compiled programs: a pytree as it is, a named function as one without leaves."""
    if transform is None or not jax.tree_util.all_leaves([transform]):
        return transform
    return _Named(transform)
