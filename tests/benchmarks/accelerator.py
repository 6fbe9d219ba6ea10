"""What share of an accelerator's own matrix-product rate the models reach, in bfloat16: `throughput.py --suite=accelerator`.

The share is the analytic count of the operations in matrix products and convolutions (`passes.flops`) over the time, over the
rate of a large matrix product, which is measured first. XLA's own count, which holds elementwise work and leaves out products
with padding, is printed as a multiple of it. Memory is what the compiled module asks for. Batches double until memory runs out;
the row says so.

Written and run at tiny size on a CPU: nothing was measured with it on an accelerator yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import passes

from robust_vit import classifier, models

PyTree = Any
ROWS = {
    "ViT-S/16": ("vit", {"size": "S"}),
    "ViT-B/16": ("vit", {"size": "B"}),
    "ViT-L/16": ("vit", {"size": "L"}),
    "ResNet-50": ("resnet", {"depth": 50}),
}
TINY_ROWS = {
    "ViT-tiny": ("vit", {"width": 16, "depth": 1, "heads": 2, "patch": 4}),
    "ResNet-tiny": ("resnet", {"depth": 8, "width": 2}),
}
PASSES = ("training", "forward", "pgd_step", "hvp")
BATCHES = (32, 64, 128, 256, 512, 1024)
HEADER = (
    "| model, attention | pass | batch | ms | images/s | TFLOP/s | share of the measured rate | XLA's count | memory, GB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
_OPTIMIZER = optax.adamw(1e-4)
_EPSILON, _STEP = 8 / 255, 2 / 255


@dataclasses.dataclass(frozen=True)
class Step:
    """One step as a pure function `state, batch -> state`, so that a run of steps is one after the other.

    Attributes:
      module: the model, with dropout and stochastic depth off.
      name: one of `PASSES`.
    """

    module: nn.Module
    name: str

    def state(self, variables: PyTree, images: jax.Array) -> PyTree:
        """What the step hands on: parameters and optimiser, images, or a vector of parameters."""
        if self.name == "training":
            return {"variables": variables, "optimizer": _OPTIMIZER.init(variables["params"])}
        if self.name == "hvp":
            return {"variables": variables, "vector": passes.like(variables["params"])}
        return {"variables": variables, "images": images}

    def __call__(self, state: PyTree, images: jax.Array, labels: jax.Array) -> PyTree:
        """The state after one step."""
        variables = state["variables"]

        def loss(params, images, train=False):
            rest = {**variables, "params": params}
            if train and "batch_stats" in variables:
                (logits, _), moved = self.module.apply(rest, images, train=True, mutable=["batch_stats"])
            else:
                (logits, _), moved = self.module.apply(rest, images), {}
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)), moved

        params = variables["params"]
        if self.name == "training":
            gradient, moved = jax.grad(loss, has_aux=True)(params, images, train=True)
            updates, optimizer = _OPTIMIZER.update(gradient, state["optimizer"], params)
            return {
                "variables": {**variables, **moved, "params": optax.apply_updates(params, updates)},
                "optimizer": optimizer,
            }
        if self.name == "forward":
            logits, _ = self.module.apply(variables, state["images"])
            # What is handed on depends on the logits, and the next step on it: nothing can be left out.
            return {**state, "images": state["images"] + 1e-6 * jnp.max(logits).astype(images.dtype)}
        if self.name == "pgd_step":
            gradient, _ = jax.grad(loss, argnums=1, has_aux=True)(params, state["images"])
            moved = state["images"] + _STEP * jnp.sign(gradient)
            return {**state, "images": jnp.clip(moved, images - _EPSILON, images + _EPSILON)}
        product = jax.jvp(lambda p: jax.grad(loss, has_aux=True)(p, images)[0], (params,), (state["vector"],))[1]
        return {**state, "vector": product}


def ceiling(side: int, calls: int) -> float:
    """Operations a second of a square bfloat16 matrix product; the best of some runs of chained products."""
    left, right = (passes.like(jax.ShapeDtypeStruct((side, side), jnp.bfloat16), seed) for seed in range(2))
    product = jax.jit(lambda left, right: (left @ right) / side**0.5)
    jax.block_until_ready(product(left, right))

    def chained():
        out = left
        for _ in range(calls):
            out = product(out, right)
        return out

    return calls * 2 * side**3 / min(passes.seconds(chained, 3))


def report(*, tiny: bool = False, rows: list[str] | None = None) -> None:
    """Prints the table."""
    chosen = TINY_ROWS if tiny else ROWS
    chosen = {label: chosen[label] for label in rows} if rows else chosen
    side, classes, batches = (8, 10, (2,)) if tiny else (224, 1000, BATCHES)
    rate = ceiling(256 if tiny else 8192, 4 if tiny else 16)
    device = jax.devices()[0]
    print(
        f"{device.device_kind}; jax {jax.__version__}; a bfloat16 product reaches {rate / 1e12:,.2f} TFLOP/s",
        flush=True,
    )
    print(f"\n{HEADER}", flush=True)
    for label, (name, given) in chosen.items():
        for attention in ("explicit", "fused") if name == "vit" else (None,):
            options = {} if attention is None else {"attention": attention}
            module = models.build(name, num_classes=classes, dtype="bfloat16", **given, **options)
            spec = classifier.ImageSpec(size=(side, side), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
            variables = models.init(module, spec, jax.random.key(0))
            for each in PASSES:
                if each == "hvp" and attention == "fused":
                    continue  # The kernel has no second derivative.
                for batch in batches:
                    cells = _measured(
                        Step(module, each), variables, (batch, side, side, 3), classes, rate, 2 if tiny else 10
                    )
                    title = label if attention is None else f"{label}, {attention}"
                    print("| " + " | ".join((title, each.replace("_", " "), str(batch), *cells)) + " |", flush=True)
                    if len(cells) == 1:
                        break


def _measured(
    step: Step, variables: PyTree, shape: tuple[int, ...], classes: int, rate: float, calls: int
) -> tuple[str, ...]:
    """The cells of one row; one cell where memory ran out."""
    try:
        # The pass donates its state, and the next row needs the variables again.
        variables = jax.tree.map(jnp.copy, variables)
        images = passes.like(jax.ShapeDtypeStruct(shape, jnp.float32))
        labels = jnp.arange(shape[0], dtype=jnp.int32) % classes
        state = step.state(variables, images + 0.0)
        compiled = jax.jit(step, donate_argnums=0).lower(state, images, labels).compile()
        work = passes.flops(dataclasses.replace(step, module=models.explicit(step.module)), state, images, labels)
        memory = compiled.memory_analysis()
        counted = compiled.cost_analysis().get("flops", float("nan"))
        state = compiled(state, images, labels)
        best = float("inf")
        for _ in range(3):
            state, taken = _run(compiled, state, (images, labels), calls)
            best = min(best, taken / calls)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return ("out of memory",)
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    held -= memory.alias_size_in_bytes
    return (
        f"{1e3 * best:,.2f}",
        f"{shape[0] / best:,.0f}",
        f"{work / best / 1e12:,.2f}",
        f"{100 * work / best / rate:.1f} %",
        f"{counted / work:.2f}",
        f"{held / 2**30:.2f}",
    )


def _run(compiled: Callable, state: PyTree, batch: tuple, calls: int) -> tuple[PyTree, float]:
    holder = [state]

    def steps():
        for _ in range(calls):
            holder[0] = compiled(holder[0], *batch)
        return holder[0]

    (taken,) = passes.seconds(steps, 1)
    return holder[0], taken
