"""What products with second derivatives cost: operations by XLA's count, as multiples of one gradient, and memory.

    python tests/benchmarks/curvature_cost.py --size=Ti --side=224 --batch=2

prints one Markdown table; it compiles, and runs nothing. Results: tests/benchmarks/results/curvature.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robust_vit import classifier, command_line, curvature, losses, models


def _logits(params: Any, batch: Mapping[str, jax.Array], model: classifier.Classifier) -> jax.Array:
    return model.with_params(params)(batch["image"])


def _loss(params: Any, batch: Mapping[str, jax.Array], model: classifier.Classifier) -> jax.Array:
    return jnp.mean(losses.cross_entropy(_logits(params, batch, model), batch["label"]))


def _cost(function, *arguments) -> tuple[float, float]:
    """Operations, and bytes of temporary memory and results."""
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return compiled.cost_analysis()["flops"], memory.temp_size_in_bytes + memory.output_size_in_bytes


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="Ti")
    parser.add_argument("--depth", type=int, help="blocks; those of the size by default")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--remat", action="store_true", help="blocks computed again in the backward pass")
    flags = parser.parse_args()
    command_line.configure_jax()
    module = models.build("vit", num_classes=1000, size=flags.size, depth=flags.depth, remat=flags.remat)
    spec = classifier.ImageSpec(size=(flags.side, flags.side))
    model = classifier.Classifier(models.init(module, spec, jax.random.key(0)), module, spec)
    batch = {
        "image": jnp.full((flags.batch, flags.side, flags.side, 3), 0.5),
        "label": jnp.arange(flags.batch, dtype=jnp.int32),
    }
    params = model.params
    hessian = curvature.hessian(_loss, params, batch, model, separable=False)
    reverse = curvature.hessian(_loss, params, batch, model, mode="reverse over reverse", separable=False)
    newton = curvature.gauss_newton(_logits, params, batch, model)
    empirical = curvature.fisher(_logits, params, batch, model, kind="empirical", labels=batch["label"])

    def block(count: int) -> Any:
        return jax.tree.map(lambda leaf: jnp.ones((count, *leaf.shape), leaf.dtype), params)

    calls = {
        "gradient": (jax.grad(_loss), params, batch, model),
        "Hessian": (lambda o, v: o(v), hessian, params),
        "Hessian, reverse over reverse": (lambda o, v: o(v), reverse, params),
        "Hessian, linearised": (lambda o, v: o(v), curvature.linearise(hessian), params),
        "Hessian, block of 4": (lambda o, v: jax.vmap(o)(v), hessian, block(4)),
        "Hessian, block of 8": (lambda o, v: jax.vmap(o)(v), hessian, block(8)),
        "Gauss-Newton": (lambda o, v: o(v), newton, params),
        "Gauss-Newton, linearised": (lambda o, v: o(v), curvature.linearise(newton), params),
        "empirical Fisher": (lambda o, v: o(v), empirical, params),
    }
    print("| product | vectors | of a gradient | for each vector | memory, of a gradient's |\n|---|---|---|---|---|")
    unit = None
    for name, call in calls.items():
        found = _cost(*call)
        unit = unit or found
        count = int(name.rsplit(" ", 1)[1]) if "block" in name else 1
        flops, memory = found[0] / unit[0], found[1] / unit[1]
        print(f"| {name} | {count} | {flops:.2f} | {flops / count:.2f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
