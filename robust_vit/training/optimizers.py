"""Optimisers by name from Optax, with gradient clipping and weight decay on the parameters that a pattern names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import optax
import optax.contrib

from robust_vit import errors, trees

PyTree = Any
OPTIMIZERS = ("adamw", "sgd", "lamb", "sam")


def build(
    name: str,
    *,
    learning_rate: Callable | float,
    weight_decay: float = 0.0,
    decay_pattern: str = r"kernel$",
    clip: float | None = None,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    base: str = "sgd",
    rho: float = 0.05,
) -> optax.GradientTransformation:
    """A gradient transformation.

    Args:
      name: "adamw" (Loshchilov & Hutter 2019, arXiv 1711.05101: decoupled decay), "sgd" (decay joins the gradient, as L2),
        "lamb" (You et al. 2020, arXiv 1904.00962) or "sam" (Foret et al. 2021, arXiv 2010.01412: a second gradient at the
        worst point within `rho`, then the step of `base`).
      learning_rate: a schedule or a number.
      weight_decay: coefficient; SGD's gradient grows by `weight_decay * parameter`.
      decay_pattern: regular expression over slash-joined parameter paths: only what it finds decays.
      clip: largest global norm of the gradient; None does not clip.
      momentum: of SGD.
      nesterov: of SGD.
      betas: of AdamW and LAMB.
      base: the optimiser under SAM.
      rho: radius of SAM, in the norm of all parameters.
    """
    if name not in OPTIMIZERS:
        raise errors.unknown("optimizer", name, OPTIMIZERS)
    if name == "sam":
        if base == "sam" or base not in OPTIMIZERS:
            raise errors.unknown("base optimizer", base, [known for known in OPTIMIZERS if known != "sam"])
        inner = build(
            base,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            decay_pattern=decay_pattern,
            clip=clip,
            momentum=momentum,
            nesterov=nesterov,
            betas=betas,
        )
        ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
        # Opaque: the second gradient is taken inside one update, so a step of the loop stays a step of training.
        return optax.contrib.sam(inner, ascent, sync_period=2, opaque_mode=True)

    decay_mask = _DecayMask(decay_pattern)
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    if name == "adamw":
        parts.append(optax.adamw(learning_rate, *betas, weight_decay=weight_decay, mask=decay_mask))
    elif name == "lamb":
        parts.append(optax.lamb(learning_rate, *betas, weight_decay=weight_decay, mask=decay_mask))
    else:
        if weight_decay:
            parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
        parts.append(optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov))
    return optax.chain(*parts)


def takes_gradient_function(name: str) -> bool:
    """Whether the update takes further gradients itself (SAM) and must be handed a gradient function."""
    return name == "sam"


def check_decay_pattern(pattern: str, params: PyTree) -> None:
    """Refuses a pattern that is no regular expression or finds no parameter.

    Raises:
      errors.UserError: naming a few parameters that exist.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise errors.UserError(f"optimizer.decay_pattern={pattern!r} is no regular expression: {error}.") from error
    names = trees.paths(params)
    if not any(compiled.search(name) for name in names):
        raise errors.UserError(
            f"optimizer.decay_pattern={pattern!r} finds none of the {len(names)} parameters; "
            f"they are named like {', '.join(names[:3])}."
        )


class _DecayMask:
    def __init__(self, pattern: str):
        self._pattern = pattern

    def __call__(self, params: PyTree) -> PyTree:
        return trees.mask(params, self._pattern)
