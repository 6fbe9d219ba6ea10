"""Why a row of `throughput.py --suite=cpu` takes what it takes: `python tests/benchmarks/explain.py shares` or `ablation`.

`shares` profiles one pass and adds up the time by kind of operation, and counts the pages of memory that the kernel had to hand
out. `ablation` puts the usual form of one part at a time back into a ViT-Ti/16 of three blocks, in turns in one run.
"""

from __future__ import annotations

import argparse
import glob
import re
import resource
import statistics
import tempfile
import time
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import passes
import throughput

from robust_vit import models
from robust_vit.models import layers


class _FlaxLayerNorm(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(epsilon=layers.EPSILON, dtype=self.dtype)(x)


# Part of `layers`, and the usual form of it.
USUAL = {
    "products of merged axes": ("Dense", nn.Dense),
    "own LayerNorm": ("LayerNorm", _FlaxLayerNorm),
    "own softmax": ("softmax", jax.nn.softmax),
    "own GELU": ("gelu", lambda x: jax.nn.gelu(x, approximate=False)),
}


def _program(name: str, given: dict, count: int, side: int, classes: int, each: str):
    """A compiled pass with random weights, and its arguments."""
    module = models.build(name, num_classes=classes, **given)
    draw = np.random.default_rng(0)
    images = jnp.asarray(draw.standard_normal((count, side, side, 3)), jnp.float32)
    batch = (images, jnp.asarray(draw.integers(0, classes, count), jnp.int32))
    shapes = jax.eval_shape(lambda key: module.init(key, images), jax.random.key(0))
    variables = jax.tree.map(lambda leaf: 0.05 * jnp.abs(leaf), passes.like(shapes))
    arguments = (batch, variables, passes.like(variables["params"]))
    return jax.jit(passes.Pass(module, each)).lower(*arguments).compile(), arguments


def _kinds(text: str) -> dict[str, str]:
    """What each instruction of a compiled module is."""
    computations = {}
    for block in re.split(r"\n(?=%|ENTRY)", text):
        found = re.match(r"(?:ENTRY )?%?([\w.\-]+)", block)
        if found:
            computations[found[1]] = block
    kinds = {}
    for line in text.splitlines():
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = \S+ ([\w\-]+)\(", line)
        if not found:
            continue
        name, operation = found[1], found[2]
        called = re.search(r"calls=%?([\w.\-]+)", line)
        body = computations.get(called[1], "") if called else ""
        if operation in ("dot", "convolution") or re.search(r" (dot|convolution)\(", body):
            kinds[name] = "matrix products, convolutions, and what is fused to them"
        elif re.search(r" transpose\(", body) or operation in ("transpose", "copy") or "copy" in name:
            kinds[name] = "transposing copies, and what is fused to them"
        elif re.search(r" reduce\(", body):
            kinds[name] = "reductions"
        else:
            kinds[name] = "elementwise"
    return kinds


def shares(rows: list[str], chosen: list[str]) -> None:
    """Prints milliseconds by kind for each pass of each row."""
    for label in rows:
        name, given, count, side, classes, _ = throughput.ROWS[label]
        for each in chosen:
            compiled, arguments = _program(name, given, count, side, classes, each)
            kinds = _kinds(compiled.as_text())
            jax.block_until_ready(compiled(*arguments))
            before = resource.getrusage(resource.RUSAGE_SELF)
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            wall = time.perf_counter() - begin
            after = resource.getrusage(resource.RUSAGE_SELF)
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    jax.block_until_ready(compiled(*arguments))
                (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
                trace = jax.profiler.ProfileData.from_file(path)
            spent: Counter = Counter()
            for plane in trace.planes:
                for line in plane.lines:
                    for event in line.events:
                        kind = kinds.get(event.name.lstrip("%").split(" ")[0])
                        if kind:
                            spent[kind] += event.duration_ns / 1e6
            print(f"\n{label}, {count} images, {each.replace('_', ' ')}: {1e3 * wall:,.0f} ms")
            for kind, took in spent.most_common():
                print(f"  {kind}: {took:,.0f} ms")
            print(
                f"  pages handed out: {after.ru_minflt - before.ru_minflt:,} in {after.ru_stime - before.ru_stime:.2f} s of "
                f"the kernel's time; temporary memory {compiled.memory_analysis().temp_size_in_bytes / 2**30:.2f} GB",
                flush=True,
            )


def ablation(chosen: list[str], *, count: int = 64, rounds: int = 3) -> None:
    """Prints how long each pass takes with all parts, without one of them, and with none."""
    variants = {"all": (), **{f"without {part}": (part,) for part in USUAL}, "none": tuple(USUAL)}
    print("| variant | " + " | ".join(chosen) + " |")
    programs = {}
    for variant, parts in variants.items():
        kept = {attribute: getattr(layers, attribute) for attribute, _ in USUAL.values()}
        for part in parts:
            setattr(layers, *USUAL[part])
        jax.clear_caches()
        given = {"size": "Ti", "depth": 3}
        programs[variant] = {each: _program("vit", given, count, 224, 1000, each) for each in chosen}
        for attribute, value in kept.items():
            setattr(layers, attribute, value)
    times: dict[tuple, list[float]] = {(variant, each): [] for variant in variants for each in chosen}
    for turn in range(rounds + 1):
        for (variant, each), found in times.items():
            compiled, arguments = programs[variant][each]
            taken = passes.seconds(lambda run=compiled, given=arguments: run(*given), 1)
            found += taken if turn else []
    for variant in variants:
        cells = (f"{1e3 * min(times[variant, each]):,.0f}" for each in chosen)
        medians = (f"{1e3 * statistics.median(times[variant, each]):,.0f}" for each in chosen)
        print(f"| {variant} | " + " | ".join(map(" / ".join, zip(cells, medians, strict=True))) + " |", flush=True)


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("shares", "ablation"))
    parser.add_argument("--rows", default="ViT-Ti/16,ResNet-20", help="comma-separated names of models, for shares")
    parser.add_argument("--passes", default="forward,input_gradient,parameter_gradient", help="comma-separated")
    flags = parser.parse_args()
    if flags.what == "shares":
        shares(flags.rows.split(","), flags.passes.split(","))
    else:
        ablation(flags.passes.split(","))


if __name__ == "__main__":
    main()
