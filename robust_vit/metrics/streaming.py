"""Means that stream: sums and counts on the device, merged over batches and devices, divided once at the end."""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robust_vit import losses


@flax.struct.dataclass
class Sums:
    """Masked sums of per-example values, and how many examples they are over.

    Under `jax.jit` on a mesh the sums are global: a batch cut over devices gives the sums of the whole batch.

    Attributes:
      totals: name -> scalar float32 sum.
      count: scalar float32, the number of real examples.
    """

    totals: Mapping[str, jax.Array]
    count: jax.Array

    def merge(self, other: Sums) -> Sums:
        """The sums over both; a mean over batches of unequal size comes out right."""
        return Sums({name: self.totals[name] + other.totals[name] for name in self.totals}, self.count + other.count)

    def means(self) -> dict[str, float]:
        """The means, as Python numbers (this waits for the device); NaN over no example."""
        totals, count = jax.device_get((dict(self.totals), self.count))
        return {name: float(total) / float(count) if count else float("nan") for name, total in totals.items()}


def sums(values: Mapping[str, Float[Array, " batch"]], mask: Bool[Array, " batch"] | None = None) -> Sums:
    """Sums over the real examples of a batch; a NaN in a masked row does not count."""
    first = next(iter(values.values()))
    mask = jnp.ones(first.shape, bool) if mask is None else mask
    totals = {name: jnp.sum(jnp.where(mask, value, 0), dtype=jnp.float32) for name, value in values.items()}
    return Sums(totals, jnp.sum(mask, dtype=jnp.float32))


def classification(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    mask: Bool[Array, " batch"] | None = None,
    *,
    smoothing: float = 0.0,
) -> Sums:
    """Sums of `loss` (nats), `accuracy` and `accuracy_top5` over the real examples of a batch.

    Args:
      logits: any float dtype.
      labels: class indices.
      mask: False where a row is padding.
      smoothing: label smoothing of the loss.
    """
    logits = logits.astype(jnp.float32)
    true = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1])[None, :] < labels[:, None]
    rank = jnp.sum((logits > true) | ((logits == true) & earlier), axis=-1)
    # A NaN compares false with everything, so a broken model would otherwise look always right.
    rank = jnp.where(jnp.any(jnp.isnan(logits), axis=-1), logits.shape[-1], rank)
    return sums(
        {
            "loss": losses.cross_entropy(logits, labels, smoothing=smoothing),
            "accuracy": rank < 1,
            "accuracy_top5": rank < 5,
        },
        mask,
    )
