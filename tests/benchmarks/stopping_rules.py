"""What two stopping rules make of spectra with near-ties: PyHessian's power iteration, and Lanczos with residuals.

    python tests/benchmarks/stopping_rules.py

prints one Markdown table over random starts. Results: tests/benchmarks/results/curvature.md.
"""

from __future__ import annotations

import argparse

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import command_line, curvature

SIZE = 2000
# The eigenvalues beside a bulk between -0.2 and 0.2.
TOPS = {
    "1 and 0.9": (1.0, 0.9),
    "12 between 0.9 and 1": tuple(np.linspace(0.9, 1.0, 12)),
    "1 and -0.999": (1.0, -0.999),
    "1 and -1.02": (1.0, -1.02),
}


class Diagonal(flax.struct.PyTreeNode):
    """A diagonal matrix; the start is random, so that it is as good as any symmetric one."""

    values: jax.Array

    @property
    def like(self) -> jax.Array:
        """A vector."""
        return self.values

    def __call__(self, vector: jax.Array) -> jax.Array:
        """The values times the vector."""
        return self.values * vector


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=20)
    flags = parser.parse_args()
    command_line.configure_jax()
    print(
        "| top of the spectrum | rule | largest by magnitude: mean [least, most] | median residual / value | products |"
    )
    print("|---|---|---|---|---|")
    for name, top in TOPS.items():
        bulk = np.linspace(-0.2, 0.2, SIZE - len(top))
        operator = Diagonal(jnp.asarray(np.concatenate([top, bulk]), jnp.float32))
        solvers = {
            "PyHessian's": lambda key, o=operator: curvature.power_iteration(o, key, top=1, rule="pyhessian"),
            "residual, power iteration": lambda key, o=operator: curvature.power_iteration(o, key, top=1),
            "residual, Lanczos": lambda key, o=operator: curvature.lanczos(
                o, key, rank=100, top=1, tolerance=1e-3, check_every=5
            ),
        }
        for rule, solve in solvers.items():
            found = [solve(jax.random.key(seed)) for seed in range(flags.starts)]
            values = np.asarray([one.values[0] for one in found])
            residual = np.median([one.residuals[0] / abs(one.values[0]) for one in found])
            products = np.median([one.applications for one in found])
            print(
                f"| {name} | {rule} | {values.mean():.3f} [{values.min():.3f}, {values.max():.3f}] | {residual:.1e} "
                f"| {products:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
