"""Compiled programs with what they cost: memory by XLA's own analysis, floating-point operations with loops counted in full.

Nothing here needs an array: a program is lowered from the shapes of its arguments.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from robust_vit import errors, mesh

PyTree = Any
AUTO = "auto"
# Share of a device's memory that a program may take: allocators fragment, and batches wait beside it. On a CPU, where freed
# memory is kept (`robust_vit.allocation`), the heap was measured at 1.8 times what a program needs.
_MARGIN = {"cpu": 0.5, "accelerator": 0.9}
# Operations in one call from which a larger batch is no faster an image: a few times what hides the cost of a call.
ENOUGH = {"cpu": 1e10, "accelerator": 1e13}
LIMIT_VARIABLE = "ROBUST_VIT_MEMORY_GIB"  # Overrides what a device says of its memory.


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jitted function, the shapes that it is called with, and how often.

    Attributes:
      name: what it does, for people.
      function: made by `jax.jit`.
      arguments: pytrees of arrays or `jax.ShapeDtypeStruct`.
      times: calls in the whole of what is planned.
      static: static arguments, which come before `arguments`.
      carry: position in `arguments` of what the next call is given from this one's result (donated, so it cannot be given
        twice); None where each call stands alone.
    """

    name: str
    function: Callable
    arguments: tuple
    times: float = 1
    static: tuple = ()
    carry: int | None = None

    @property
    def key(self) -> tuple:
        """Equal for programs that compile to the same, whatever they are called and however often."""
        leaves, structure = jax.tree.flatten(self.arguments)
        shapes = tuple((np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves)
        return self.function, self.static, structure, shapes


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """What one call of a program takes, on each device.

    Attributes:
      flops: floating-point operations as XLA counts them, with loops as often as they go round.
      argument_bytes: of memory, parameters and batch among them.
      temporary_bytes: between the first and the last operation.
      output_bytes: without what takes the place of a donated argument.
      compile_seconds: what compiling took, or reading it from the compilation cache.
      compiled: to call it, or to look at its text.
    """

    flops: float
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    compile_seconds: float
    compiled: Any

    @property
    def memory(self) -> int:
        """Bytes on each device while the program runs."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes


def inspect(program: Program) -> Cost:
    """Compiles a program and reads what it costs; runs nothing.

    Raises:
      jax.errors.JaxRuntimeError: the compiler found that it does not fit (TPU); see `out_of_memory`.
    """
    started = time.monotonic()
    placed = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(program.arguments))
    shared = next((sharding.mesh for sharding in placed if isinstance(sharding, jax.sharding.NamedSharding)), None)
    with mesh.context(shared):
        traced = program.function.trace(*program.static, *program.arguments)
    compiled = traced.lower().compile()
    seconds = time.monotonic() - started
    analysis = compiled.cost_analysis() or {}
    if isinstance(analysis, list):
        analysis = analysis[0] if analysis else {}
    memory = compiled.memory_analysis()
    sizes = [
        getattr(memory, f"{name}_size_in_bytes", 0)
        for name in ("argument", "temp", "output", "alias", "generated_code")
    ]
    arguments, temporary, output, alias, code = sizes
    return Cost(
        flops=max(float(analysis.get("flops", 0.0)), 0.0) * loop_factor(traced.jaxpr.jaxpr),
        argument_bytes=arguments,
        temporary_bytes=temporary + (0 if backend() == "cpu" else code),
        output_bytes=max(output - alias, 0),
        compile_seconds=seconds,
        compiled=compiled,
    )


def backend() -> str:
    """What JAX's default devices are: "cpu" or "accelerator"."""
    return "cpu" if jax.default_backend() == "cpu" else "accelerator"


def margin(kind: str | None = None) -> float:
    """The share of a device's memory that a program may take; of `backend()` where no other kind is named."""
    return _MARGIN[kind or backend()]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no more memory."""
    text = str(error)
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "Ran out of memory")
    )


def device_memory(device: jax.Device | None = None) -> int:
    """Bytes that programs may use on a device (the first one by default).

    What the allocator of an accelerator is given; of a CPU the machine's memory, or the share that its control group allows,
    divided by the process's devices, which share it. The environment variable `ROBUST_VIT_MEMORY_GIB` overrides both: processes
    that share a machine are told their part by it (`launch/local_processes.py` does).
    """
    given = os.environ.get(LIMIT_VARIABLE)
    if given:
        try:
            return int(float(given) * 2**30)
        except ValueError:
            raise errors.UserError(f"{LIMIT_VARIABLE}={given}: expected a number of GiB, for example 16.") from None
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            machine = min(machine, int(pathlib.Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return machine // (jax.local_device_count() if device.platform == "cpu" else 1)


def usable_memory() -> int:
    """Bytes that one program may take on a device of this process: its memory less the margin."""
    return int(margin() * device_memory())


def fits(programs: Iterable[Program], limit: int) -> tuple[bool, int]:
    """Whether each of the programs fits in `limit` bytes, and the most that one of those looked at takes."""
    most = 0
    for program in programs:
        try:
            most = max(most, inspect(program).memory)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            return False, limit
        if most > limit:
            return False, most
    return True, most


def choose(
    candidates: Iterable[int], build: Callable[[int], list[Program]], *, what: str, limit: int | None = None
) -> int:
    """The first candidate whose programs all fit in the memory of a device.

    Args:
      candidates: numbers, the most wanted first.
      build: the programs of a candidate.
      what: the setting that is chosen, for the error.
      limit: bytes that a program may take; None is `usable_memory`.

    Raises:
      errors.UserError: not even the last one fits.
    """
    limit = usable_memory() if limit is None else limit
    most = 0
    candidate = None
    for candidate in candidates:
        enough, most = fits(build(candidate), limit)
        if enough:
            return candidate
    known = f"{size_text(most)}, " if most > limit else ""  # A compiler for TPUs refuses, and gives no size.
    raise errors.UserError(
        f"{what}=auto: even {candidate} needs {known}more than the {size_text(limit)} that a program may take on a device: use a "
        "smaller model or image size, model.dtype=bfloat16, rematerialisation (model.remat), or shard the parameters over more "
        "devices."
    )


def choose_batch(build: Callable[[int], list[Program]], *, most: int, what: str) -> int:
    """The largest power of two whose programs fit in the memory of a device, up to where more is no use.

    More is no use beyond `most`, rounded up to a power of two, and beyond the first number at which the longest of the programs
    does `ENOUGH` operations in one call.

    Args:
      build: the programs of a number of examples at a time.
      most: examples that there are.
      what: the setting that is chosen, for the error.

    Raises:
      errors.UserError: not even 1 fits.
    """
    powers = [2**exponent for exponent in range(max(most - 1, 0).bit_length() + 1)]
    work = max(inspect(program).flops for program in build(powers[0]))
    enough = ENOUGH[backend()]
    useful = [number for number in powers if number // 2 * work < enough]
    return choose(reversed(useful), build, what=what)


def beside(tree: PyTree, like: PyTree) -> PyTree:
    """The shapes of `tree` on the devices of `like`, whole on each: where a program puts what it makes of arrays that lie there.

    Where `like` says nothing of devices, neither does the result.
    """
    placed = [leaf.sharding for leaf in jax.tree.leaves(like) if isinstance(leaf, jax.ShapeDtypeStruct | jax.Array)]
    named = next((sharding for sharding in placed if isinstance(sharding, jax.sharding.NamedSharding)), None)
    if named is None:
        return tree
    whole = jax.sharding.NamedSharding(named.mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), tree)


def loop_factor(jaxpr: Any) -> float:
    """How many times more a program multiplies than its text shows: XLA counts the body of a loop once."""
    once, whole = _products(jaxpr)
    return whole / once if once else 1.0


def materialise(tree: PyTree) -> PyTree:
    """Arrays of a tree's shapes, dtypes and shardings with small positive numbers, to time a program with."""
    block = np.random.default_rng(0).uniform(0.0, 0.02, 1 << 14)

    def one(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
            return jax.random.wrap_key_data(np.zeros((*leaf.shape, *words), np.uint32))
        floating = jax.dtypes.issubdtype(leaf.dtype, np.inexact)
        values = np.resize(block, leaf.shape) if floating else np.zeros(leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(one, tree)


def measure(program: Program, cost: Cost, *, seconds: float) -> float:
    """Seconds of one call, by calling: once to warm up, then for about `seconds`; the least of several tries.

    Args:
      program: what to call. One that donates has to say so by its `carry`.
      cost: of it, from `inspect`.
      seconds: to spend after the first call.
    """
    arguments = list(materialise(program.arguments))

    def call() -> float:
        started = time.perf_counter()
        result = jax.block_until_ready(cost.compiled(*arguments))
        if program.carry is not None:
            arguments[program.carry] = result
        return time.perf_counter() - started

    call()
    best, until = math.inf, time.perf_counter() + seconds
    while True:
        best = min(best, call())
        if time.perf_counter() + best > until:
            return best


def size_text(size: float) -> str:
    """Bytes as a person would say them: "1.2 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.0f} GiB" if size >= 100 else f"{size:.1f} GiB"


def _products(jaxpr: Any) -> tuple[float, float]:
    """Operations of matrix products and convolutions: with the body of a loop once, and as often as it runs."""
    once = whole = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            count = 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            once, whole = once + count, whole + count
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            count = 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
            once, whole = once + count, whole + count
        inner = [_products(part) for part in inner_jaxprs(equation)]
        if not inner:
            continue
        if name == "cond":
            inner = [max(inner, key=lambda pair: pair[1])]
        rounds = equation.params["length"] if name == "scan" else 1
        once += sum(pair[0] for pair in inner)
        whole += rounds * sum(pair[1] for pair in inner)
    return once, whole


def inner_jaxprs(equation: Any) -> list[Any]:
    """The jaxprs that an equation of a jaxpr holds: bodies of loops, branches of conditionals, functions that are called."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, list | tuple) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found
