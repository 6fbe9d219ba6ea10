"""What curvature sends between devices: the collectives of a Hessian product and of a Lanczos step beyond it.

    python tests/benchmarks/curvature_traffic.py                        on 8 virtual devices of this machine
    python tests/benchmarks/curvature_traffic.py --topology=v5e-8       compiled for a slice of a TPU pod (needs libtpu)

Prints one Markdown table; it compiles, and runs nothing. Results: tests/benchmarks/results/curvature.md.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp

from robust_vit import classifier, collectives, curvature, mesh, models, programs, topology, trees
from robust_vit.curvature import batches
from robust_vit.studies import training_loss

IMAGES, RANK = 64, 20


def _operator(devices: jax.sharding.Mesh) -> batches.BatchOperator:
    """The Hessian of a ViT of two blocks of width 256, as shapes."""
    spec = classifier.ImageSpec(size=(32, 32))
    module = models.build("vit", num_classes=16, patch=4, width=256, depth=2, heads=4)
    shapes = jax.eval_shape(lambda key: models.init(module, spec, key), jax.random.key(0))

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    variables = jax.tree.map(placed, shapes, mesh.Rules().place(devices, shapes))
    split = mesh.examples(devices, IMAGES)
    batch = {"image": jax.ShapeDtypeStruct((IMAGES, 32, 32, 3), jnp.float32, sharding=split)}
    batch["label"] = jax.ShapeDtypeStruct((IMAGES,), jnp.int32, sharding=split)
    model = classifier.Classifier(variables, module, spec)
    return curvature.hessian(training_loss.MeanLoss(), model.params, batch, model, separable=False)


def _sent(compiled) -> str:
    found = [each for each in collectives.read(compiled) if each.group > 1]
    return "; ".join(f"{each.count} {each.kind} of {each.bytes:,} bytes" for each in found) or "nothing"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", help="a slice of a TPU pod, for example v5e-8; virtual devices by default")
    flags = parser.parse_args()
    devices = jax.devices()
    if flags.topology:
        topology.configure(flags.topology, alone=True)
        devices = topology.devices(topology.parse(flags.topology))
    print("| parameters | a Hessian product sends | a Lanczos step sends |\n|---|---|---|")
    for sharding in ("data", "fsdp"):
        placed = mesh.make(devices, sharding=sharding)
        with mesh.context(placed):
            operator = _operator(placed)
            product = batches._apply.lower(operator, operator.like).compile()
            step = programs.inspect(curvature.programs(operator, rank=RANK, check_every=1)[0]).compiled
        print(
            f"| {sharding}, {4 * trees.count(operator.like):,} bytes | {_sent(product)} | {_sent(step)} |", flush=True
        )


if __name__ == "__main__":
    main()
