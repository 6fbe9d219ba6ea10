"""The classifier: canonical pixels in, logits out. Variables are leaves, the module and its `ImageSpec` are static."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit import errors

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What a model expects of an image. Hashable: it is part of the compiled program's key.

    Attributes:
      size: height and width, in pixels, that the module runs at.
      channels: channels of the module's input; a one-channel image is repeated to them.
      mean: per channel, in pixel units [0, 1], subtracted first.
      std: per channel, in pixel units, divided by.
      preprocessing: the transforms, in order, that make canonical pixels of a decoded image at evaluation
        (`robust_vit.data` knows them); they travel with the weights.
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    preprocessing: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.mean) not in (1, self.channels) or len(self.std) not in (1, self.channels):
            raise errors.UserError(
                f"mean and std have {len(self.mean)} and {len(self.std)} values for {self.channels} channels: "
                f"give one or {self.channels} of each."
            )

    def normalize(self, images: Float[Array, "batch height width channels"]) -> jax.Array:
        """Canonical pixels `[batch, height, width, 1 or channels]` in [0, 1] to the module's input: repeat, resize, normalise."""
        if images.ndim != 4 or images.shape[-1] not in (1, self.channels):
            raise errors.UserError(
                f"images have shape {tuple(images.shape)}: expected [batch, height, width, "
                f"{' or '.join(sorted({'1', str(self.channels)}))}]."
            )
        if images.shape[-1] != self.channels:
            images = jnp.repeat(images, self.channels, axis=-1)
        if images.shape[1:3] != self.size:
            shape = (images.shape[0], *self.size, self.channels)
            images = jax.image.resize(images, shape, "bilinear", antialias=True)
        mean = jnp.asarray(self.mean, images.dtype).reshape(1, 1, 1, -1)
        std = jnp.asarray(self.std, images.dtype).reshape(1, 1, 1, -1)
        return (images - mean) / std


@flax.struct.dataclass
class Classifier:
    """A model with its weights, as one frozen pytree that passes through `jax.jit` as an argument.

    Two classifiers with equal modules and specs share one trace, whatever their weights.

    Attributes:
      variables: Linen variable collections (`params`, `batch_stats`, ...): the leaves.
      module: the Linen module; static.
      spec: what the module expects of an image; static.
    """

    variables: PyTree
    module: Any = flax.struct.field(pytree_node=False)
    spec: ImageSpec = flax.struct.field(pytree_node=False)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Logits `[batch, classes]` of canonical pixels. One forward pass."""
        return self.features(images)[0]

    def features(
        self, images: Float[Array, "batch height width channels"], gates: Float[Array, "batch branches"] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits and the flat dict of named intermediates; what the caller does not use, XLA removes.

        Args:
          images: canonical pixels in [0, 1].
          gates: `[batch or 1, len(module.branches)]`: a factor for each residual branch; None is all ones.
        """
        return self.module.apply(self.variables, self.spec.normalize(images), gates=gates)

    @property
    def params(self) -> PyTree:
        """The trainable parameters."""
        return self.variables["params"]

    def with_params(self, params: PyTree) -> Classifier:
        """The same classifier with other parameters."""
        return self.replace(variables={**self.variables, "params": params})


@flax.struct.dataclass
class Wrapped:
    """A foreign model as a classifier: see `wrap`.

    Attributes:
      variables: the parameters handed to `apply`; `()` for a model that keeps its own.
      apply: `apply(variables, images) -> logits`, of a stochastic model `apply(variables, images, keys)`; static.
      stochastic: the model draws; static.
    """

    variables: PyTree
    apply: Callable = flax.struct.field(pytree_node=False)
    stochastic: bool = flax.struct.field(pytree_node=False, default=False)

    def __call__(self, images: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        """Logits `[batch, classes]` of canonical pixels.

        Args:
          images: canonical pixels.
          keys: of a stochastic model, one typed key an example; without them every image meets the same draw, each time.
        """
        if not self.stochastic:
            return self.apply(self.variables, images)
        return self.apply(self.variables, images, same_draws(images) if keys is None else keys)

    @property
    def samples(self) -> int:
        """How many draws `sample` makes."""
        return 1

    def sample(self, images: jax.Array, keys: jax.Array) -> Float[Array, "samples batch classes"]:
        """Logits of a stochastic model under the draws of these keys: how attacks ask it. One forward pass."""
        return self(images, keys=keys)[None]

    def features(self, images: jax.Array, gates: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits and an empty dict: a foreign model names no features and has no gates."""
        if gates is not None:
            raise errors.UserError(
                "gates were given for a wrapped model: it names no branches. Use a Linen model of this library."
            )
        return self(images), {}

    @property
    def params(self) -> PyTree:
        """The parameters, as they were given."""
        return self.variables

    def with_params(self, params: PyTree) -> Wrapped:
        """The same model with other parameters."""
        return self.replace(variables=params)


@dataclasses.dataclass(frozen=True)
class _IgnoringVariables:
    """`images -> logits` as `(variables, images) -> logits`; equal for equal functions, so nothing is traced twice."""

    function: Callable

    def __call__(self, variables: PyTree, *inputs: jax.Array) -> jax.Array:
        del variables
        return self.function(*inputs)


def wrap(apply: Callable, variables: PyTree | None = None, *, stochastic: bool = False) -> Wrapped:
    """Admits any JAX function as a classifier.

    Args:
      apply: `apply(variables, images) -> logits` where `variables` are given, else `apply(images) -> logits`. Images are
        canonical pixels `[batch, height, width, channels]` in [0, 1]: put the normalisation inside. Pass the same
        function object each time: a new one is traced anew.
      variables: a pytree of parameters. Without it, studies of the loss in parameter space do not apply.
      stochastic: the model draws: `apply` takes `keys` last, one typed key an example, and has no other randomness. Attacks
        then draw anew in each evaluation; `robust_vit.attacks.expectation` makes them average over several draws.
    """
    if variables is None:
        return Wrapped(variables=(), apply=_IgnoringVariables(apply), stochastic=stochastic)
    return Wrapped(variables=variables, apply=apply, stochastic=stochastic)


def same_draws(images: jax.Array) -> jax.Array:
    """Keys for a stochastic model that is asked without any: the same one for each image, in any batch."""
    return jnp.broadcast_to(jax.random.key(0), images.shape[:1])


def count_classes(classifier: Classifier | Wrapped, images: jax.Array) -> int:
    """The number of logits, from shapes alone (no compute)."""
    return jax.eval_shape(lambda c, x: c(x), classifier, jax.ShapeDtypeStruct(images.shape, jnp.float32)).shape[-1]


def in_float32(model: Any) -> Any:
    """The model's float32 twin: the same weights, computed in float32 where its module computes in less.

    A fused attention becomes the explicit one: the kernel of a GPU is half precision, and has no second derivative. Of a pytree
    that holds models, however deep and however many, each is replaced by its twin.
    """
    return jax.tree.map(lambda node: _twin(node) if _has_dtype(node) else node, model, is_leaf=_has_dtype)


def _has_dtype(node: Any) -> bool:
    return getattr(getattr(node, "module", None), "dtype", None) is not None


def _twin(model: Any) -> Any:
    dtype = model.module.dtype
    if jnp.dtype(dtype).itemsize >= 4:
        return model
    changes = {"dtype": "float32" if isinstance(dtype, str) else jnp.float32}
    if getattr(model.module, "attention", None) == "fused":
        changes["attention"] = "explicit"
    return model.replace(module=model.module.clone(**changes))
