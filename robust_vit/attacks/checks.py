"""Signs that a model looks robust because it was attacked badly: `check(model, images, labels, threat=...)` looks for all.

A guard that fired proves nothing about the model; it says that robust accuracies of it are not to be believed before the reason
is known. What each guard looks at is in `robust_vit.attacks.guards`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from robust_vit import errors, loops, losses, tables
from robust_vit.attacks import (
    arguments,
    estimation,
    evaluation,
    gradient,
    guards,
    inputs,
    norms,
    runner,
    skeleton,
    square,
    threats,
)
from robust_vit.metrics import statistics

PAIRS = 10  # Of images that the default black box asks about in a step, where it estimates gradients.


@dataclasses.dataclass(frozen=True)
class Report:
    """The guards of one model under one threat.

    Attributes:
      guards: all that were made, in the order of looking.
      norm: of the ball.
      epsilon: its radius.
      accuracies: of the clean images, and robust ones by attack at epsilon, with intervals over images.
      forward_passes: of one image each, that the attacks needed.
      backward_passes: likewise.
    """

    guards: tuple[guards.Guard, ...]
    norm: str
    epsilon: float
    accuracies: Mapping[str, statistics.Interval]
    forward_passes: int
    backward_passes: int

    @property
    def fired(self) -> tuple[str, ...]:
        """Names of the guards that fired."""
        return tuple(guard.name for guard in self.guards if guard.fired)

    def table(self) -> tables.Table:
        """One row a guard, those that fired first."""
        rows = [
            (guard.name, "FIRED" if guard.fired else "quiet", tables.Number(guard.value, format=".3g"), guard.detail)
            for guard in sorted(self.guards, key=lambda guard: not guard.fired)
        ]
        return tables.Table(
            "Guards against false robustness",
            ("guard", "state", "value", "what was seen"),
            rows,
            f"{self.norm} ball of {self.epsilon:.4g} in pixel units [0, 1]; {len(self.fired)} of {len(rows)} guards fired.",
        )

    def __str__(self) -> str:
        found = self.table()
        cells = [[tables.text(cell) for cell in row] for row in found.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(3)]
        lines = [found.title + ": " + found.caption]
        lines += [f"  {name}: {interval.number('.1%')}" for name, interval in self.accuracies.items()]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0], strict=True)) for row in cells]
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Plain JSON, as an evaluation card holds it."""
        return {
            "norm": self.norm,
            "epsilon": self.epsilon,
            "accuracies": {name: dataclasses.asdict(interval) for name, interval in self.accuracies.items()},
            "guards": {guard.name: dataclasses.asdict(guard) for guard in self.guards},
            "fired": list(self.fired),
            "passes": {"forward": self.forward_passes, "backward": self.backward_passes},
        }


def follow(
    attack: skeleton.Attack, model: skeleton.Model, keys: jax.Array, images: jax.Array, labels: jax.Array
) -> guards.Path:
    """Runs an attack and looks at every iterate: what the attack costs, and a forward pass a step besides."""
    looks = []
    for state in _walk(attack, model, keys, images, labels):
        looks.append(_look(attack, model, state))
    # Where all are done nothing moves any more.
    looks += looks[-1:] * (attack.evaluations + 1 - len(looks))
    margins, achieved, met, distances = (np.stack([np.asarray(look[part]) for look in looks]) for part in range(4))
    inside = np.ones_like(met)
    if not attack.minimal and hasattr(attack, "epsilon"):
        inside = norms.within(distances, float(attack.epsilon))
    return guards.Path(margins, achieved & inside | met, inside, skeleton.finish(attack, model, state))


def check(
    model: skeleton.Model,
    images: Float[np.ndarray, "batch height width channels"],
    labels: Int[np.ndarray, " batch"],
    *,
    threat: str | threats.ThreatModel | None = None,
    epsilon: float | None = None,
    norm: str | norms.Norm | None = None,
    white_box: Mapping[str, skeleton.Attack] | None = None,
    black_box: Mapping[str, skeleton.Attack] | None = None,
    steps: int = 50,
    queries: int = 500,
    multiples: Sequence[float] = (0.5, 2.0),
    neighbours: int = 100,
    rows: Int[np.ndarray, " batch"] | None = None,
    seed: int = 0,
) -> Report:
    """Looks for every known sign of false robustness on a batch of images.

    Cost, in passes of the batch: `neighbours` and a dozen forward ones, and each white-box attack at epsilon, at its multiples
    and without a bound, as long as an image is left: with the defaults about 1,100 forward and 420 backward passes at most. 64 to
    256 images tell enough.

    Args:
      model: canonical pixels to logits.
      images: canonical pixels in [0, 1].
      labels: true classes.
      threat: a threat model or its name, in place of `epsilon` and `norm`.
      epsilon: radius of the ball, in pixel units.
      norm: of the ball; the maximum norm where neither it nor `threat` is given.
      white_box: bounded or minimal attacks by name; PGD on the cross-entropy and on the margin by default.
      black_box: attacks that ask for logits alone, by name, which should be no stronger than the white boxes; by default Square,
        or NES in L1, which Square does not know.
      steps: of the default white boxes.
      queries: of the default black box.
      multiples: of epsilon, at which the white boxes are run besides: accuracy may not rise with epsilon.
      neighbours: random ones in the ball, among which the loss should be steady.
      rows: ids of the images, from which the keys are drawn; positions by default.
      seed: of every draw.

    Raises:
      errors.UserError: pixels or labels that `check_inputs` refuses, or logits that are not finite. What else it refuses in a
        model is a guard here.
    """
    radius, ball = arguments.ball(epsilon, norm, threat)
    arguments.positive(epsilon=radius)
    images, labels = np.asarray(images), np.asarray(labels)
    inputs.check_values(model, images, labels)
    keys = runner.example_keys(seed, np.arange(len(labels)) if rows is None else np.asarray(rows))
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)
    logits, again = (np.asarray(_logits(model, images, keys)) for _ in range(2))
    if not np.isfinite(logits).all():
        raise errors.UserError(
            "the model gives NaN or infinite logits: check its weights, normalisation and precision."
        )
    right = logits.argmax(axis=1) == np.asarray(labels)
    if not right.any():
        raise errors.UserError("the model is wrong on every image as it is: check labels, class order, normalisation.")
    bench = _Bench(model, keys, images, labels, right, float(radius))
    found = [
        guards.stochastic(logits, again),
        guards.probabilities(logits),
        *guards.gradients(model, keys, images, labels, right, ball, radius),
        guards.unstable(model, keys, images, labels, right, ball, radius, neighbours),
    ]
    whole = float(ball.measure(jnp.ones_like(images[:1]))[0]) / float(radius)  # A ball that holds every image.
    broken, unbounded, results = {}, np.zeros_like(right), []
    for name, attack in (_white_box(radius, ball, steps) if white_box is None else white_box).items():
        path = follow(bench.sized(attack, 1.0), model, keys, images, labels)
        at = {1.0: path.result} | {size: bench.run(attack, size, path.result) for size in (*multiples, whole)}
        results += at.values()
        hit = {size: bench.broken(result, size) for size, result in at.items()}
        broken[name], unbounded = hit[1.0], unbounded | hit.pop(whole)
        found += [
            guards.silent(name, path, right),
            *guards.converged(name, attack, path, right),
            guards.inside(name, attack, path.result, ball, float(radius)),
            guards.rising(name, hit),
        ]
    found.append(guards.unbounded(unbounded))
    white = np.logical_or.reduce(list(broken.values()))
    for name, attack in (_black_box(radius, ball, queries) if black_box is None else black_box).items():
        results.append(bench.run(attack, 1.0))
        broken[name] = bench.broken(results[-1], 1.0)
        found.append(guards.black_box(name, broken[name], white))
    return Report(
        guards=tuple(found),
        norm=ball.name,
        epsilon=float(radius),
        accuracies={
            "clean": statistics.proportion(right.sum(), len(right)),
            **{name: statistics.proportion((~hit).sum(), len(hit)) for name, hit in broken.items()},
        },
        forward_passes=sum(int(result.forward_passes.sum()) for result in results),
        backward_passes=sum(int(result.backward_passes.sum()) for result in results),
    )


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What every attack of a check is run on."""

    model: Any
    keys: jax.Array
    images: jax.Array
    labels: jax.Array
    right: np.ndarray
    radius: float

    def sized(self, attack: skeleton.Attack, size: float) -> skeleton.Attack:
        """The attack at a multiple of epsilon; one that seeks the nearest success as it is."""
        return attack if attack.minimal else attack.replace(epsilon=arguments.number(size * self.radius))

    def run(
        self, attack: skeleton.Attack, size: float, found: skeleton.AttackResult | None = None
    ) -> skeleton.AttackResult:
        """What it finds there; what an attack without a ball has found holds for every size."""
        if attack.minimal and found is not None:
            return found
        attack = self.sized(attack, size)
        walked = collections.deque(_walk(attack, self.model, self.keys, self.images, self.labels), maxlen=1)
        return skeleton.finish(attack, self.model, walked[0])

    def broken(self, result: skeleton.AttackResult, size: float) -> np.ndarray:
        """Which images it broke within the ball of this size, those that are misclassified as they are among them."""
        return (np.asarray(result.success) & norms.within(result.distance, size * self.radius)) | ~self.right


def _white_box(radius: Any, ball: norms.Norm, steps: int) -> dict[str, skeleton.Attack]:
    return {
        f"pgd {loss}": gradient.pgd(epsilon=radius, norm=ball, steps=steps, loss=loss)
        for loss in ("cross_entropy", "margin")
    }


def _black_box(radius: Any, ball: norms.Norm, queries: int) -> dict[str, skeleton.Attack]:
    if ball in (norms.LINF, norms.L2):
        return {"square": square.square(epsilon=radius, norm=ball, queries=queries)}
    steps = max(1, queries // (1 + 2 * PAIRS))
    return {"nes": estimation.nes(epsilon=radius, norm=ball, samples=PAIRS, steps=steps, loss="margin")}


def _walk(
    attack: skeleton.Attack, model: skeleton.Model, keys: jax.Array, images: jax.Array, labels: jax.Array
) -> Iterator[skeleton.State]:
    """The states of an attack from the start until all examples are done; each is given up for the next one."""
    state = jax.tree.map(jnp.copy, skeleton.start(attack, keys, images, labels))
    yield state
    for _ in range(attack.evaluations):
        state = loops.repeat(skeleton.advance, state, 1, attack, model, donate=True)
        yield state
        if np.asarray(state.done).all():
            return


@jax.jit
def _look(attack: skeleton.Attack, model: skeleton.Model, state: skeleton.State) -> tuple[jax.Array, ...]:
    logits = evaluation.logits(model, state.images, state.keys, state.count)
    achieved = attack.achieves(logits, state.labels)
    return losses.margin(logits, state.labels), achieved, state.success, attack.norm.measure(state.images - state.clean)


@jax.jit
def _logits(model: skeleton.Model, images: jax.Array, keys: jax.Array) -> jax.Array:
    return evaluation.logits(model, images, keys)
