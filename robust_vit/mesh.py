"""The device mesh: one `jax.sharding.Mesh` with axes ("data", "model"), the same on one device and on many.

A batch is always split over all devices. Parameters and optimiser state are whole on every device (data parallel), split over
all of them (fully sharded data parallel, FSDP), or split within groups of devices and repeated between groups: one word,
`sharding`, says which. Activations are the compiler's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robust_vit import errors, trees

PyTree = Any
AXES = ("data", "model")
# An array smaller than this is whole everywhere: to gather it costs more than it saves.
SMALLEST_SPLIT = 2**14
WHOLE, LARGEST = "whole", "largest"


def make(devices: Sequence[jax.Device] | None = None, *, sharding: str = "data") -> Mesh:
    """A mesh over the given devices (all of them by default).

    Args:
      devices: in any order; they are ordered by process, so that a process holds consecutive rows of every batch.
      sharding: "data": parameters whole on every device. "fsdp": split over all devices. "fsdp=N": split over groups of N
        devices, whole in each group.

    Raises:
      errors.UserError: another word; groups that do not divide the devices, or larger than the machine.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda each: (each.process_index, each.id))
    group = _group(sharding, len(devices))
    # Auto: the compiler places activations. The default of jax.make_mesh has changed between releases, so it is spelled out.
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(np.asarray(devices).reshape(-1, group), AXES, axis_types=types)


def _group(sharding: str, count: int) -> int:
    found = re.fullmatch(r"data|fsdp(?:=(\d+))?", str(sharding))
    if not found:
        raise errors.UserError(f'sharding={sharding!r}: expected "data", "fsdp" or "fsdp=N".')
    if sharding == "data":
        return 1
    group = count if found.group(1) is None else int(found.group(1))
    if group < 1 or count % group:
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise errors.UserError(
            f"sharding={sharding!r}: groups of {group} do not fit {count} devices; choose one of {divisors}, or add devices."
        )
    return group


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which axis of an array is split over the model axis, by regular expression over its path.

    Attributes:
      rules: pairs (pattern, axis), tried in order; the first pattern found in the path decides. The axis is a number, "largest"
        (the largest axis that the devices divide; arrays below `SMALLEST_SPLIT` stay whole) or "whole". A path that no pattern
        is found in counts as "largest". A path in an optimiser's state ends with that of its parameter.
    """

    rules: tuple[tuple[str, int | str], ...] = ()

    def __post_init__(self):
        for rule in self.rules:
            if not isinstance(rule, tuple | list) or len(rule) != 2:
                raise errors.UserError(
                    f'sharding rule {rule!r}: expected a pair (pattern, axis), for example ("mlp/expand/kernel$", 1).'
                )
            pattern, axis = rule
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise errors.UserError(f"sharding rule {pattern!r} is no regular expression: {error}.") from error
            if axis not in (WHOLE, LARGEST) and (not isinstance(axis, int) or isinstance(axis, bool)):
                raise errors.UserError(
                    f'sharding rule {pattern!r}: axis {axis!r}; expected a number, "largest" or "whole".'
                )

    def place(self, mesh: Mesh, tree: PyTree) -> PyTree:
        """The sharding of every leaf of a tree of arrays or shapes.

        Raises:
          errors.UserError: a rule whose pattern is in no path, or whose axis is not there or not divisible.
        """
        size = mesh.shape[AXES[1]]
        used = [False] * len(self.rules)

        def one(path: str, leaf: Any) -> NamedSharding:
            axis: int | str | None = LARGEST
            for index, (pattern, chosen) in enumerate(self.rules):
                if re.search(pattern, path):
                    used[index] = True
                    axis = _checked(path, leaf.shape, chosen, size)
                    break
            if size == 1 or axis == WHOLE:
                return replicated(mesh)
            if axis == LARGEST:
                axis = _largest(leaf.shape, size)
            if axis is None:
                return replicated(mesh)
            axis = axis % len(leaf.shape)
            return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXES[1]))

        placed = trees.map_with_path(one, tree)
        for (pattern, _), found in zip(self.rules, used, strict=True):
            if not found:
                examples = ", ".join(trees.paths(tree)[:3])
                raise errors.UserError(
                    f"sharding rule {pattern!r} matches no parameter left by the rules before it; paths look like {examples}."
                )
        return placed


def _checked(path: str, shape: tuple[int, ...], axis: int | str, size: int) -> int | str:
    if isinstance(axis, str):
        return axis
    if not shape:
        return WHOLE  # A counter of the optimiser beside the arrays that the rule means.
    if not -len(shape) <= axis < len(shape):
        raise errors.UserError(f"sharding rule: {path} has shape {list(shape)}, and no axis {axis}.")
    if shape[axis] % size:
        raise errors.UserError(
            f"sharding rule: axis {axis} of {path} is {shape[axis]} long, which {size} devices do not divide: choose another."
        )
    return axis


def _largest(shape: tuple[int, ...], size: int) -> int | None:
    if np.prod(shape, dtype=np.int64) < SMALLEST_SPLIT:
        return None
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0 and length >= size]
    # The last of equals: the output side of a kernel.
    return max(divisible, key=lambda axis: (shape[axis], axis), default=None)


def context(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Programs traced inside gather parameters where they are used, if the mesh splits any: see `whole`."""
    if mesh is None or mesh.shape[AXES[1]] == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def whole(parameter: jax.Array) -> jax.Array:
    """A parameter where a layer is about to use it: gathered from the devices that share it, inside of `context`.

    Left to itself the compiler may exchange activations instead where there are few of them. Read off a ViT-H/14 compiled for 64
    chips: training 16 images a chip took 19 GiB of it, which does not fit, and a forward pass of 4 sent 34.7 GiB, where the
    parameters are 1.2 GiB. Gradients and tangents go where the compiler wants them: they are not gathered.
    """
    return parameter if jax.sharding.get_abstract_mesh().empty else _gathered(parameter)


@jax.custom_jvp
def _gathered(parameter: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(parameter, PartitionSpec())


@_gathered.defjvp
def _gathered_jvp(primals, tangents):
    # The derivative of a plain constraint is that constraint: it would gather the gradient as well.
    return _gathered(*primals), tangents[0]


def check_batch(mesh: Mesh, batch: int, *, name: str) -> None:
    """Refuses a global batch that the devices do not divide.

    Raises:
      errors.UserError: with the nearest batch that would do.
    """
    if batch % mesh.size:
        raise errors.UserError(
            f"{name}={batch} is not divisible by {mesh.size} devices: use {max(mesh.size, batch // mesh.size * mesh.size)}."
        )


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A global, split batch from this process's rows of it."""
    sharding = batched(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def examples(mesh: Mesh, count: int) -> NamedSharding:
    """Where `put_global` places so many examples."""
    return batched(mesh) if count % mesh.size == 0 else replicated(mesh)


def put_global(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Arrays `[examples, ...]` that every process holds whole, split over the devices as a batch is.

    Where the devices do not divide the examples, every device holds all of them: the same numbers, and no gain from the devices.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, tree)

    def one(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        sharding = examples(mesh, leaf.shape[0])
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree)


def sharing(examples: PyTree) -> NamedSharding | None:
    """Where the rows of `[examples, ...]` lie, if several devices share them; of shapes where they are to lie, of traces None."""
    for leaf in jax.tree.leaves(examples):
        placed = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(placed, NamedSharding) and placed.spec and placed.spec[0] is not None and _shares(placed) > 1:
            return NamedSharding(placed.mesh, PartitionSpec(placed.spec[0]))
    return None


def is_whole(tree: PyTree) -> bool:
    """Whether every device holds all of a tree's arrays, or shapes; those that are placed nowhere count as such."""
    placed = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return all(sharding is None or sharding.is_fully_replicated for sharding in placed)


@dataclasses.dataclass(frozen=True)
class Apart:
    """A function of independent examples that each device computes for its own rows, so that none waits for another.

    Left to the compiler, a condition such as "if any example starts anew" asks all devices in every step of a loop. On a CPU that
    can end in a deadlock too: XLA waits for the answer on a thread that the other device needs for its convolutions.

    Attributes:
      function: `function(rows, *operands) -> rows`, of leaves `[examples, ...]`; a step of `loops.repeat`, for example.
      placed: how the devices share the examples (`sharing`).
    """

    function: Callable
    placed: NamedSharding

    def __call__(self, rows: PyTree, *operands: PyTree) -> PyTree:
        """What the function makes of the rows; operands are whole on every device."""
        split, whole = self.placed.spec, PartitionSpec()
        # A loop inside of the function starts from what is the same everywhere: to check that it stays so would refuse it.
        compute = jax.shard_map(
            self.function,
            mesh=self.placed.mesh,
            in_specs=(split, *(whole for _ in operands)),
            out_specs=split,
            check_vma=False,
        )
        return compute(rows, *operands)


def parts(examples: PyTree, size: int, placed: NamedSharding | None) -> tuple[PyTree, PyTree | None]:
    """`[examples, ...]` as parts `[parts, size, ...]` to be taken one after the other, and the rows left over or None.

    A part is made of rows of every device, so that all of them work on it and none is sent a row of another. Cut in order, a
    part would be the rows of a few devices, and the compiler gathers them. Where the devices do not divide a part, it is.

    Args:
      examples: leaves `[examples, ...]`.
      size: of a part.
      placed: how the devices share the examples (`sharing`); None is one device, and the rows stay in order.
    """
    count = jax.tree.leaves(examples)[0].shape[0]
    whole, shares = count // size, _common_shares(count, size, placed)

    def put(leaf: jax.Array, axis: int) -> jax.Array:
        if shares == 1:
            return leaf
        return jax.lax.with_sharding_constraint(
            leaf, NamedSharding(placed.mesh, PartitionSpec(*(None,) * axis, placed.spec[0]))
        )

    def cut(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, shape = leaf.reshape(shares, -1, *leaf.shape[1:]), leaf.shape[1:]
        used = whole * size // shares
        stacked = rows[:, :used].reshape(shares, whole, -1, *shape).swapaxes(0, 1).reshape(whole, size, *shape)
        return put(stacked, 1), put(rows[:, used:].reshape(-1, *shape), 0)

    pairs = jax.tree.map(cut, examples)
    stacked, rest = (jax.tree.map(lambda _, pair, i=i: pair[i], examples, pairs) for i in range(2))
    return stacked, rest if whole * size < count else None


def joined(stacked: PyTree, rest: PyTree | None, placed: NamedSharding | None) -> PyTree:
    """`[examples, ...]` in their order from what `parts` made of them."""
    whole, size = jax.tree.leaves(stacked)[0].shape[:2]
    count = whole * size + (0 if rest is None else jax.tree.leaves(rest)[0].shape[0])
    shares = _common_shares(count, size, placed)

    def join(leaf: jax.Array, *left: jax.Array) -> jax.Array:
        shape = leaf.shape[2:]
        rows = [leaf.reshape(whole, shares, -1, *shape).swapaxes(0, 1).reshape(shares, -1, *shape)]
        rows += [one.reshape(shares, -1, *shape) for one in left]
        return jax.numpy.concatenate(rows, axis=1).reshape(count, *shape)

    return jax.tree.map(join, stacked, *(() if rest is None else (rest,)))


def rounded_up(size: int, placed: NamedSharding | None) -> int:
    """A number of examples that the devices which share them divide."""
    shares = 1 if placed is None else _shares(placed)
    return -(-size // shares) * shares


def _common_shares(count: int, size: int, placed: NamedSharding | None) -> int:
    shares = 1 if placed is None else _shares(placed)
    return 1 if count % shares or size % shares else shares


def _shares(placed: NamedSharding) -> int:
    axes = placed.spec[0]
    return math.prod(placed.mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """A tree that every process holds whole, placed by a tree of shardings; what is there already stays."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and leaf.sharding == sharding):
            return jax.device_put(leaf, sharding)
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree, shardings)


def fetch(tree: PyTree) -> PyTree:
    """NumPy arrays of a tree of arrays, wherever their parts are; every process gets all of them."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def bytes_per_device(tree: PyTree) -> int:
    """What one device holds of a tree of arrays or of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
