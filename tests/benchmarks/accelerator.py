"""What share of an accelerator's own matrix-product rate the models reach, in bfloat16: `throughput.py --suite=accelerator`.

    python tests/benchmarks/throughput.py --suite=accelerator --models=ViT-B/16,ResNet-50 --batches=64,256 --minutes=8

is a session of ten minutes on a device: all passes of one batch before the next batch, and no row is begun after `--minutes`.
Without the flags: four models, batches from 32 that double until memory runs out (the row says so), no limit.

The share is the analytic count of the operations in matrix products and convolutions (`passes.flops`) over the time, over the
rate of a large matrix product, which is measured first. XLA's own count, which holds elementwise work and leaves out products
with padding, is printed as a multiple of it. Memory is what the compiled module asks for. "Gradient" is that of the parameters;
the Hessian-vector product's time is also printed as a multiple of its. The attacks' steps are the library's own, and
"attacked/s" the examples a second of a whole attack of as many steps as `ATTACKS` says.

Written and run at tiny size on a CPU: nothing was measured with it on an accelerator yet.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import passes

from robust_vit import attacks, classifier, models
from robust_vit.attacks import skeleton

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
ATTACKS = {"pgd_step": ("pgd", {"steps": 40}), "apgd_step": ("apgd_ce", {"steps": 100})}
PASSES = ("training", "forward", "gradient", *ATTACKS, "hvp")
BATCHES = (32, 64, 128, 256, 512, 1024)
COLUMNS = (
    "model, attention", "pass", "batch", "ms", "images/s", "attacked/s", "TFLOP/s", "share of the measured rate", "XLA's count",
    "memory, GB", "HVP / gradient", "compile, s",
)  # fmt: skip
_OPTIMIZER = optax.adamw(1e-4)
_EPSILON = 8 / 255


@dataclasses.dataclass(frozen=True)
class Step:
    """One step as a pure function `state, batch -> state`, so that a run of steps is one after the other.

    Attributes:
      module: the model, with dropout and stochastic depth off.
      spec: what it expects of an image.
      name: one of `PASSES`.
    """

    module: nn.Module
    spec: classifier.ImageSpec
    name: str

    @property
    def attack(self) -> attacks.Attack | None:
        """The attack that it is a step of; an example that it succeeds on goes on all the same."""
        if self.name not in ATTACKS:
            return None
        name, options = ATTACKS[self.name]
        return attacks.build(name, epsilon=_EPSILON, stop_on_success=False, **options)

    def state(self, variables: PyTree, images: jax.Array, labels: jax.Array) -> PyTree:
        """What the step hands on: parameters and optimiser, images, a vector of parameters, or where an attack stands."""
        if self.name == "training":
            return {"variables": variables, "optimizer": _OPTIMIZER.init(variables["params"])}
        if self.name in ("gradient", "hvp"):
            return {"variables": variables, "vector": drawn(variables["params"])}
        if self.attack is None:
            return {"variables": variables, "images": images + 0.0}
        keys = attacks.example_keys(0, jnp.arange(len(labels)))
        # A state begins with one array in several places, and none may be donated twice.
        return {"variables": variables, "attack": jax.tree.map(jnp.copy, self.attack.init(keys, images, labels))}

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
        if self.attack is not None:
            model = classifier.Classifier(variables=variables, module=self.module, spec=self.spec)
            return {**state, "attack": skeleton.advance(state["attack"], jnp.int32(0), self.attack, model)}
        gradient = jax.grad(loss, has_aux=True)
        if self.name == "gradient":
            # At parameters that depend on the last one, by less than rounding.
            moved = jax.tree.map(lambda leaf, vector: leaf + 1e-12 * vector, params, state["vector"])
            return {**state, "vector": gradient(moved, images)[0]}
        product = jax.jvp(lambda p: gradient(p, images)[0], (params,), (state["vector"],))[1]
        return {**state, "vector": product}


@jax.jit
def _normal(tree: PyTree, key: jax.Array) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    made = [jax.random.normal(one, leaf.shape, leaf.dtype) for one, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, made)


def drawn(tree: PyTree, seed: int = 0) -> PyTree:
    """Standard normal arrays of the same shapes and dtypes, made on the device."""
    return _normal(tree, jax.random.key(seed))


def ceiling(side: int, calls: int) -> float:
    """Operations a second of a square bfloat16 matrix product; the best of some runs of chained products."""
    left, right = (drawn(jnp.zeros((side, side), jnp.bfloat16), seed) for seed in range(2))
    product = jax.jit(lambda left, right: (left @ right) / side**0.5)
    jax.block_until_ready(product(left, right))

    def chained():
        out = left
        for _ in range(calls):
            out = product(out, right)
        return out

    return calls * 2 * side**3 / min(passes.seconds(chained, 3))


def report(
    *,
    tiny: bool = False,
    chosen: Sequence[str] = (),
    names: Sequence[str] = PASSES,
    batches: Sequence[int] = (),
    minutes: float = float("inf"),
) -> None:
    """Prints the table.

    Args:
      tiny: shrunken models.
      chosen: models; none is all of them.
      names: passes.
      batches: in the order in which they are measured; none is `BATCHES`.
      minutes: after which no row is begun.
    """
    until = time.monotonic() + 60 * minutes
    known = TINY_ROWS if tiny else ROWS
    side, classes = (8, 10) if tiny else (224, 1000)
    spec = classifier.ImageSpec(size=(side, side), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    rate = ceiling(256 if tiny else 8192, 4 if tiny else 16)
    print(
        f"{jax.devices()[0].device_kind}; jax {jax.__version__}; a bfloat16 product reaches {rate / 1e12:,.2f} TFLOP/s\n",
        flush=True,
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    full, left = set(), 0
    for batch in batches or ((2,) if tiny else BATCHES):
        for label in chosen or known:
            name, given = known[label]
            for attention in ("explicit", "fused") if name == "vit" else (None,):
                options = {} if attention is None else {"attention": attention}
                module = models.build(name, num_classes=classes, dtype="bfloat16", **given, **options)
                title = label if attention is None else f"{label}, {attention}"
                variables, gradient = None, None
                for each in names:
                    if (title, each) in full or (each == "hvp" and attention == "fused"):
                        continue  # Memory ran out at a smaller batch; the fused kernel has no second derivative.
                    if time.monotonic() > until:
                        left += 1
                        continue
                    if variables is None:
                        variables = models.init(module, spec, jax.random.key(0))
                    found = _measured(Step(module, spec, each), variables, batch, classes, 2 if tiny else 10)
                    if found is None:
                        full.add((title, each))
                    if each == "gradient" and found is not None:
                        gradient = found.seconds
                    cells = ["out of memory"] if found is None else _cells(found, batch, rate, gradient)
                    print("| " + " | ".join((title, each.replace("_", " "), str(batch), *cells)) + " |", flush=True)
    if left:
        print(f"\n{left} rows were left out after {minutes:g} minutes.", flush=True)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row: the step, its least seconds, its operations (ours and XLA's), bytes of memory, seconds to compile."""

    step: Step
    seconds: float
    work: float
    counted: float
    memory: int
    compiling: float


def _cells(found: Measurement, batch: int, rate: float, gradient: float | None) -> tuple[str, ...]:
    attack, name = found.step.attack, found.step.name
    return (
        f"{1e3 * found.seconds:,.2f}",
        f"{batch / found.seconds:,.0f}",
        "-" if attack is None else f"{batch / found.seconds / attack.evaluations:,.1f}",
        f"{found.work / found.seconds / 1e12:,.2f}",
        f"{100 * found.work / found.seconds / rate:.1f} %",
        f"{found.counted / found.work:.2f}",
        f"{found.memory / 2**30:.2f}",
        "-" if name != "hvp" or gradient is None else f"{found.seconds / gradient:.2f}",
        f"{found.compiling:.1f}",
    )


def _measured(step: Step, variables: PyTree, batch: int, classes: int, calls: int) -> Measurement | None:
    """None where memory ran out."""
    try:
        # The pass donates its state, and the next row needs the variables again.
        variables = jax.tree.map(jnp.copy, variables)
        shape = (batch, *step.spec.size, step.spec.channels)
        images = jax.random.uniform(jax.random.key(0), shape)
        labels = jnp.arange(batch, dtype=jnp.int32) % classes
        state = step.state(variables, images, labels)
        begin = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(state, images, labels).compile()
        compiling = time.perf_counter() - begin
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
        return None
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Measurement(step, best, work, counted, held - memory.alias_size_in_bytes, compiling)


def _run(compiled: Callable, state: PyTree, batch: tuple, calls: int) -> tuple[PyTree, float]:
    holder = [state]

    def steps():
        for _ in range(calls):
            holder[0] = compiled(holder[0], *batch)
        return holder[0]

    (taken,) = passes.seconds(steps, 1)
    return holder[0], taken
