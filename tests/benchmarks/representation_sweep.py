"""What the sweep of `representation_curvature` costs: direction changes along many directions of many images in one compilation.

    python tests/benchmarks/representation_sweep.py                                      # ViT-B/16 at 224 px, 1,000 x 10
    python tests/benchmarks/representation_sweep.py --size=Ti --directions=2 --images=1 --steps=4 --batch=2   # on a CPU

prints one Markdown table: compilations, forward passes, operations, time for 1,000 passes, and the share of the rate of a
large matrix product of the same precision, which is measured first (model operations over time over that rate). On an
accelerator the share of a bfloat16 product's rate stands beside it: the sweep needs float32 "highest", and pays for it. Model
operations are the matrix products of `passes.flops`; XLA's count is printed as a multiple of them. `--tiny` shrinks the model: a
check that the script works.

Written and run on a CPU: nothing was measured with it on an accelerator yet. Results: results/representation_sweep.md.
"""

from __future__ import annotations

import argparse
import time

import accelerator
import jax
import jax.numpy as jnp
import numpy as np
import passes

from robust_vit import classifier, command_line, curvature, models, programs
from robust_vit.attacks import features as layers
from robust_vit.curvature import representations
from robust_vit.studies import representation_curvature

HEADER = (
    "| model | images x directions x points | compilations | forward passes (filled up) | GFLOP a pass | XLA's count "
    "| compile, s | s for 1,000 passes | TFLOP/s | share of a float32 product's rate | of a bfloat16 product's |\n"
    + "|---" * 11
    + "|"
)


def ceiling(side: int, calls: int) -> float:
    """Operations a second of a square float32 matrix product in precision "highest"; the best of some runs of chained ones."""
    left, right = (passes.like(jax.ShapeDtypeStruct((side, side), jnp.float32), seed) for seed in range(2))
    product = jax.jit(lambda left, right: jnp.matmul(left, right, precision="highest") / side**0.5)
    jax.block_until_ready(product(left, right))

    def chained():
        out = left
        for _ in range(calls):
            out = product(out, right)
        return out

    return calls * 2 * side**3 / min(passes.seconds(chained, 3))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="B")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--directions", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="paths of a call, steps + 1 images each")
    parser.add_argument("--tiny", action="store_true", help="a model of one block at 8 px")
    flags = parser.parse_args()
    command_line.configure_jax()
    # A compilation read from a cache is none.
    jax.config.update("jax_enable_compilation_cache", False)
    side = 8 if flags.tiny else flags.side
    given = {"width": 16, "depth": 1, "heads": 2, "patch": 4} if flags.tiny else {"size": flags.size}
    module = models.build("vit", num_classes=1000, **given)
    spec = classifier.ImageSpec(size=(side, side))
    layer = layers.Layer(classifier.Classifier(models.init(module, spec, jax.random.key(0)), module, spec))
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(flags.images, side, side, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), flags.images)
    function, points = representation_curvature.features, flags.steps + 1
    work = passes.flops(function, images[:1], layer)
    planned = representations.program_of_sweep(
        function, images, layer, directions=flags.directions, steps=flags.steps, clip=False, batch=flags.batch
    )
    cost = programs.inspect(planned)
    executed = planned.times * flags.batch * points

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if event.endswith("backend_compile_duration") else None
    )

    def sweep(directions: int) -> curvature.Bend:
        options = {"directions": directions, "span": 0.05, "steps": flags.steps, "batch": flags.batch}
        return curvature.sweep_directions(function, images, keys, layer, **options)

    is_cpu = jax.default_backend() == "cpu"
    side_of_product, calls = (512 if flags.tiny else 2048 if is_cpu else 8192), 4 if is_cpu else 16
    rate = ceiling(side_of_product, calls)
    before = representations._measure_drawn._cache_size()
    # The first call compiles: few directions of each image, which fill up the same shape as many.
    sweep(1)
    others = len(compiled)
    begin = time.perf_counter()
    found = sweep(flags.directions)
    seconds = time.perf_counter() - begin
    count = representations._measure_drawn._cache_size() - before
    assert 0 < others == len(compiled), "the sweep compiled again, or nobody counted"
    assert np.isfinite(found.angles).all()
    # Before and after: a machine that others use, too, is not always as fast.
    rate = max(rate, ceiling(side_of_product, calls))
    half = None if is_cpu else accelerator.ceiling(8192, 16)
    reached = work * executed / seconds
    device = jax.devices()[0]
    print(
        f"{device.device_kind}; jax {jax.__version__}; a float32 product reaches {rate / 1e12:,.3f} TFLOP/s", flush=True
    )
    cells = (
        f"ViT-{'tiny' if flags.tiny else flags.size}/{module.patch} at {side} px",
        f"{flags.images} x {flags.directions} x {points}",
        str(count),
        f"{flags.images * flags.directions * points:,} ({executed:,})",
        f"{work / 1e9:,.2f}",
        f"{cost.flops / (work * flags.batch * points):.2f}",
        f"{cost.compile_seconds:.1f}",
        f"{1e3 * seconds / executed:,.2f}",
        f"{reached / 1e12:,.3f}",
        f"{100 * reached / rate:.0f} %",
        "not on a CPU" if half is None else f"{100 * reached / half:.1f} %",
    )
    print(f"\n{HEADER}\n| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
