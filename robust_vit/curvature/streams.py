"""Operators over a data set: the mean over its examples of operators over its batches, read one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from robust_vit import errors, trees
from robust_vit.curvature import batches as resident

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Streamed:
    """The mean over a data set of operators over its batches, applied one after the other by the host. `stream` makes it.

    Attributes:
      build: an operator over one batch.
      batches: iterable again and again, or with a method `iterate` that is.
      like: as the operators'.
      shift: added multiple of the identity.
    """

    build: Callable[[PyTree], resident.BatchOperator]
    batches: Any
    like: PyTree
    shift: float

    def __call__(self, vector: PyTree) -> PyTree:
        """The map applied to a vector: one pass over the data. A block `[block, ...]` by `block`."""
        return self._sum(lambda operator: operator(vector), vector)

    def block(self, vectors: PyTree) -> PyTree:
        """The map applied to each of a block of vectors, `[block, ...]`, in one pass over the data."""
        return self._sum(lambda operator: resident.apply_block(operator, vectors), vectors)

    def _sum(self, apply: Callable, vector: PyTree) -> PyTree:
        total, examples = None, 0
        for batch in _read(self.batches):
            operator = self.build(batch)
            part = trees.scale(float(operator.examples), apply(operator))
            total, examples = part if total is None else _add(total, part), examples + operator.examples
        return resident.shifted(trees.scale(1.0 / examples, total), self.shift, vector)


def stream(build: Callable[[PyTree], resident.BatchOperator], batches: Any, *, weight_decay: float = 0.0) -> Streamed:
    """The operator over a data set that is read batch by batch, every example with the same weight, the last batch's too.

    A batch smaller than the others costs one more compilation. It is a loop of the host, so that it does not go into `jax.jit`.

    Args:
      build: makes the operator over one batch: `functools.partial(curvature.hessian, loss, params)`.
      batches: an iterable that starts anew each time, such as a list, or the `test` or `validation` stream of `data.load`,
        which is read by its method `iterate`; not a generator. Rows where "mask" of a batch is False are padding, and dropped.
      weight_decay: added multiple of the identity.

    Raises:
      UserError: there are no batches, they can be read once only, or they have no end.
    """
    if hasattr(batches, "steps_per_epoch"):
        raise errors.UserError(
            "the batches have no end: training streams repeat. Give an evaluation stream of these images, or a list of batches."
        )
    if not (hasattr(batches, "iterate") or isinstance(batches, Iterable)):
        raise errors.UserError(
            f"the batches are a {type(batches).__name__}, which cannot be read batch by batch: give a list, or a stream of "
            "`data.load`."
        )
    if not hasattr(batches, "iterate") and iter(batches) is batches:
        raise errors.UserError(
            "the batches can be read only once, and every application reads them: give a list or a data set."
        )
    first = next(_read(batches), None)
    if first is None:
        raise errors.UserError("there are no batches: the data set is empty.")
    return Streamed(build, batches, build(first).like, float(weight_decay))


def _read(batches: Any) -> Iterator[PyTree]:
    """The batches without their padding, and none of padding alone."""
    for batch in batches.iterate() if hasattr(batches, "iterate") else batches:
        mask = batch.get("mask") if isinstance(batch, Mapping) else None
        if mask is None or np.ndim(mask) != 1 or mask.dtype != bool or np.all(mask):
            yield batch
        elif np.any(mask):
            kept = np.flatnonzero(mask)
            yield jax.tree.map(lambda leaf, kept=kept: leaf[kept], batch)


_add = jax.jit(trees.add, donate_argnums=0)
