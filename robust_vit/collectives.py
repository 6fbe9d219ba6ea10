"""What a compiled program sends between devices: its collectives with their bytes, read off the compiled module's text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Operations that run another computation as often as they run themselves, by the attribute that names it.
_CALLS = re.compile(r"\b(?:calls|to_apply|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices, as often as one run of the program makes it.

    Attributes:
      kind: one of `KINDS`.
      bytes: of its operands on one device: of an all-gather the device's own share, of a reduce-scatter the whole array.
      count: how many times one run of the program executes it, loops included.
      group: how many devices exchange with each other; 1 moves nothing.
    """

    kind: str
    bytes: int
    count: int
    group: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one execution if the devices form a ring, which is the least possible."""
        others = self.group - 1
        if self.kind == "all-reduce":
            return 2 * self.bytes * others / self.group
        if self.kind == "all-gather":
            return self.bytes * others
        if self.kind in ("reduce-scatter", "all-to-all"):
            return self.bytes * others / self.group
        return self.bytes if others else 0


def read(compiled: Any) -> tuple[Collective, ...]:
    """The collectives of a compiled program, equal ones counted together, the largest traffic first.

    An asynchronous exchange counts once, wherever its start, its middle and its end stand. What stands in a loop counts as
    often as the loop goes round, where the module says or its condition shows how often that is, else once. Of a conditional
    the branch that moves most counts.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returned, or the text of its module (`as_text()`).
    """
    module = _Module(compiled if isinstance(compiled, str) else compiled.as_text())
    counts = module.count(module.entry) if module.entry else Counter()
    found = [Collective(kind, size, count, group) for (kind, size, group), count in counts.items()]
    return tuple(sorted(found, key=lambda one: (-one.bytes * one.count, one.kind, one.group)))


def total_bytes(collectives: Iterable[Collective], kind: str | None = None) -> int:
    """Operand bytes on one device of all executions of one run; of one kind, where one is given."""
    return sum(one.bytes * one.count for one in collectives if kind in (None, one.kind))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str


class _Module:
    """The computations of a module by name, each a list of instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        self._counts: dict[str, Counter] = {}
        sizes = re.search(r"\bnum_partitions=(\d+)", text), re.search(r"\breplica_count=(\d+)", text)
        self.devices = math.prod(int(size.group(1)) for size in sizes if size)
        current: list[_Instruction] = []
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                current = self.computations.setdefault(name, [])
                if line.startswith("ENTRY"):
                    self.entry = name
            elif line.startswith(" ") and " = " in line:
                current.append(_parse(line))

    def count(self, name: str) -> Counter:
        """(kind, bytes, group) -> executions of one run of a computation."""
        if name in self._counts:
            return self._counts[name]
        total: Counter = Counter()
        chains: set[tuple[str, ...]] = set()
        sizes = {one.name: _bytes(one.shape) for one in self.computations.get(name, ())}
        for one in self.computations.get(name, ()):
            kind = one.operation.removesuffix("-start")
            if kind in KINDS:
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # What a TPU makes of one: the sum and the share of it in one kernel.
                size = sum(sizes.get(operand, 0) for operand in one.operands)
                total[kind, size, self._group(one.rest)] += 1
            elif one.operation == "while":
                body, condition = (re.search(rf"\b{part}=%?([\w.\-]+)", one.rest) for part in ("body", "condition"))
                for key, count in self.count(body.group(1)).items():
                    total[key] += count * self._trips(one.rest, condition.group(1))
            elif one.operation == "conditional":
                branches = [
                    found for pair in _BRANCHES.findall(one.rest) for found in re.split(r"[,\s]+", "".join(pair))
                ]
                counts = [self.count(branch.lstrip("%")) for branch in branches if branch]
                total += max(counts, key=lambda part: sum(key[1] * n for key, n in part.items()), default=Counter())
            elif not one.operation.endswith(("-done", "-update")):
                for called in _CALLS.findall(one.rest):
                    if self._is_new(called, chains):
                        total += self.count(called)
        self._counts[name] = total
        return total

    def _is_new(self, called: str, chains: set[tuple[str, ...]]) -> bool:
        """Whether a computation is not a later piece of an exchange that a TPU has cut over several fusions."""
        for one in self.computations.get(called, ()):
            chain = re.search(r'\bchain_id="(\w+)"', one.rest)
            if chain and one.operation in KINDS:
                channel = re.search(r"\bchannel_id=(\d+)", one.rest)
                key = (one.operation, chain.group(1), channel.group(1) if channel else "")
                if key in chains:
                    return False
                chains.add(key)
        return True

    def _group(self, rest: str) -> int:
        listed = re.search(r"\breplica_groups=\{\{([\d,]+)\}", rest)
        if listed:
            return listed.group(1).count(",") + 1
        iota = re.search(r"\breplica_groups=\[\d+,(\d+)\]<=", rest)
        if iota:
            return int(iota.group(1))
        named = re.search(r"\breplica_groups=\w+\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", rest)
        if named:
            axes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
            return math.prod(int(axes.get(axis, 1)) for axis in re.findall(r"'([^']+)'", named.group(2)))
        pairs = re.search(r"\bsource_target_pairs=\{(.*?)\}\}", rest)
        if pairs:
            return len(set(re.findall(r"\d+", pairs.group(1))))
        return self.devices

    def _trips(self, rest: str, condition: str) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
        if known:
            return int(known.group(1))
        # A loop of JAX counts from zero while the counter is below a constant.
        limits = [
            re.match(r"(\d+)\)", one.rest)
            for one in self.computations.get(condition, ())
            if one.operation == "constant"
        ]
        below = any("direction=LT" in one.rest for one in self.computations.get(condition, ()))
        return int(limits[0].group(1)) if below and len(limits) == 1 and limits[0] else 1


def _parse(line: str) -> _Instruction:
    left, _, right = re.sub(r"/\*.*?\*/", "", line).partition(" = ")
    end = _closing(right) if right.startswith("(") else right.index(" ")
    shape, call = right[:end], right[end:].strip()
    operation, _, rest = call.partition("(")
    close = _closing(f"({rest}") - 1
    operands = tuple(_NAME.findall(rest[:close]))
    return _Instruction(left.strip().removeprefix("ROOT ").lstrip("%"), shape, operation, operands, rest)


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the one that the text starts with."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position + 1
    return len(text)


def _bytes(shape: str) -> int:
    bits = 0
    for kind, dimensions in _SHAPE.findall(shape):
        width = re.match(r"[a-z]+(\d+)", kind)
        bits_each = 8 if kind == "pred" else int(width.group(1)) if width else 0
        bits += bits_each * math.prod(int(size) for size in re.findall(r"\d+", dimensions))
    return bits // 8
