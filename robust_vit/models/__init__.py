"""Flax modules, one file an architecture; import and export of weights.

A model is a Linen module: `module(images, *, train=False, gates=None, norm_set="main") -> (logits, features)`. Images are
normalised, `[batch, height, width, channels]`; logits are float32; `features` is a flat dict with stable names, of which
XLA removes what the caller does not use. `module.branches` names the residual branches in the order of `gates`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_vit import classifier, errors, registry
from robust_vit.models.weights import load_weights, resize_positions, save_weights, stack_blocks, unstack_blocks

__all__ = [
    "MODELS",
    "build",
    "explicit",
    "init",
    "load_weights",
    "options",
    "resize_positions",
    "save_weights",
    "stack_blocks",
    "unstack_blocks",
]

PyTree = Any

MODELS = {
    "vit": "robust_vit.models.vit:build",
    "resnet": "robust_vit.models.resnet:build",
}


def options(name: str) -> dict[str, Any]:
    """The options of a registered model and their defaults.

    Raises:
      errors.UserError: no model has this name.
    """
    parameters = inspect.signature(registry.find("model", name, MODELS)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "num_classes"}


def build(name: str, *, num_classes: int, **given: Any) -> nn.Module:
    """The module of a registered model.

    Args:
      name: a key of `MODELS`.
      num_classes: width of the logits.
      **given: options of that model's factory; `options(name)` lists them.

    Raises:
      errors.UserError: unknown name or option, or options that do not go together.
    """
    factory = registry.find("model", name, MODELS)
    registry.check_options("model", name, given, options(name))
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise errors.UserError(f"num_classes is {num_classes!r}: expected a positive whole number.")
    return factory(num_classes=num_classes, **given)


def explicit(module: nn.Module) -> nn.Module:
    """The same model with attention of which every derivative exists, for curvature; the variables are the same."""
    return module.clone(attention="explicit") if hasattr(module, "attention") else module


def init(module: nn.Module, spec: classifier.ImageSpec, key: jax.Array) -> PyTree:
    """Fresh variable collections of a module: float32 `params`, and `batch_stats` where there is BatchNorm.

    Args:
      module: what `build` returned.
      spec: gives the size and the channels that the parameters are made for.
      key: the one source of randomness.

    Raises:
      errors.UserError: the module does not accept images of this size.
    """
    return _init(module, (1, *spec.size, spec.channels), key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(module: nn.Module, shape: tuple[int, ...], key: jax.Array) -> PyTree:
    return module.init(key, jnp.zeros(shape, jnp.float32))
