"""The planted-adversarial test: is an attack able to find an adversarial example that is known to be there?"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from robust_vit import classifier, errors
from robust_vit.attacks import arguments, evaluation, features, inputs, norms, runner, skeleton, threats
from robust_vit.metrics import statistics

PASSED = 0.95  # The share of planted examples that an attack which can be trusted finds (section 4 of the paper).
INNER = 0.95  # Radius of the ball of the inner points, in units of epsilon.
CLOSENESS = (
    0.999  # How near to the planted point the boundary lies, on the way from the inner point that comes nearest.
)


class Planted(flax.struct.PyTreeNode):
    """A model whose head is replaced by a linear one on its features that tells inner points from the planted one.

    Class 0 holds the image and the inner points, class 1 the planted one. Further classes fill up the model's number of logits
    and never win, so that losses and targeted attacks which need several classes run as they are.

    Attributes:
      model: gives `features`.
      weights: `[width]` of the head.
      bias: of the head.
      layer: the name of the features; static.
      classes: logits that the original has; static.
    """

    model: Any
    weights: Float[Array, " width"]
    bias: Float[Array, ""]
    layer: str = flax.struct.field(pytree_node=False, default="pre_logits")
    classes: int = flax.struct.field(pytree_node=False, default=2)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Logits: the head's, halved and with both signs, then those that never win."""
        score = 0.5 * (features.Layer(self.model, self.layer)(images) @ self.weights + self.bias)
        below = -jnp.abs(jax.lax.stop_gradient(score))[:, None] - jnp.arange(1.0, self.classes - 1.0)[None]
        return jnp.concatenate([-score[:, None], score[:, None], below], axis=1)


@dataclasses.dataclass(frozen=True)
class PlantedResult:
    """How an attack fared on planted examples, one row an image.

    Attributes:
      planted: the adversarial example is there: the head calls the image class 0 and the planted point, in ball and box, 1.
      found: the attack reached class 1 within the ball.
      guessed: one of as many random points as the attack has forward passes did.
      distance: of the planted point, in the norm of the ball.
      random_points: how many were tried for each image.
    """

    planted: Bool[np.ndarray, " images"]
    found: Bool[np.ndarray, " images"]
    guessed: Bool[np.ndarray, " images"]
    distance: Float[np.ndarray, " images"]
    random_points: int

    @property
    def success(self) -> statistics.Interval:
        """The attack's rate of success on the images where an example was planted; it should be one."""
        return statistics.proportion(self.found[self.planted].sum(), self.planted.sum())

    @property
    def chance(self) -> statistics.Interval:
        """That of random points: a test in which it is high is easy, and passing it says little."""
        return statistics.proportion(self.guessed[self.planted].sum(), self.planted.sum())

    @property
    def passed(self) -> bool:
        """Whether the attack finds at least 95 % of what is there."""
        return self.success.value >= PASSED

    def __str__(self) -> str:
        return (
            f"planted-adversarial test {'passed' if self.passed else 'FAILED'}: the attack finds {self.success.number('.1%')} of "
            f"{self.planted.sum()} planted examples, {self.random_points} random points {self.chance.number('.1%')}"
        )


def planted(
    model: Any,
    images: Float[np.ndarray, "images height width channels"],
    attack: skeleton.Attack,
    *,
    threat: str | threats.ThreatModel | None = None,
    epsilon: float | None = None,
    norm: str | norms.Norm | None = None,
    layer: str | None = None,
    inner: int | None = None,
    random_points: int | None = None,
    rows: np.ndarray | None = None,
    seed: int = 0,
    batch: int = 64,
) -> PlantedResult:
    """Tests an attack on a model's features where an adversarial example provably exists (Zimmermann et al. 2022, 2206.13991).

    For each image, a linear head on the model's features is fitted that calls the image and `inner` random points within 0.95
    epsilon class 0, and one random point on the surface of the ball class 1, with its boundary next to that point. The point is
    in the ball, so an attack that does not reach class 1 missed what is there: 11 of 13 published evaluations did. Each image has
    its own head, so the attack runs on one image at a time, in float32.

    Departures: the head is the ridge regression of the two sets rather than a logistic one (a closed form; where it does not
    separate them the image is left out), and random guessing has as many points as the attack has forward passes.

    Cost: `inner + 2 + random_points` forward passes an image, and the attack's.

    Args:
      model: canonical pixels to logits: a function, a `Classifier`, or what has `features(images) -> (logits, features)`.
      images: canonical pixels in [0, 1].
      attack: bounded, in the same norm; it runs with the threat's epsilon.
      threat: a threat model or its name, in place of `epsilon` and `norm`.
      epsilon: radius of the ball, in pixel units.
      norm: of the ball; the maximum norm where neither it nor `threat` is given.
      layer: the features that the head reads; by default `pre_logits`, or the logits of a model that does not name them: then
        there are fewer inner points, and the test is an easier one.
      inner: points of class 0; half the width of the features by default, 999 at most: more are hardly separable.
      random_points: for the control; as many as the attack has forward passes by default.
      rows: ids of the images, from which points are drawn; positions by default.
      seed: of the draws.
      batch: images a pass where points are looked at.

    Raises:
      errors.UserError: a model without these features or that `check_inputs` refuses, an attack in another norm or without a
        ball, no image separable.
    """
    radius, ball = arguments.ball(epsilon, norm, threat)
    arguments.positive(epsilon=radius)
    images = np.asarray(images, np.float32)
    # What is no pytree is a function, and no argument of a compiled one.
    is_bare = jax.tree_util.all_leaves([model]) and not hasattr(model, "features")
    model = classifier.wrap(model) if is_bare else model
    if layer is None:
        layer = "pre_logits" if "pre_logits" in features.names(model, images.shape) else features.LOGITS
    width = features.Layer(model, layer).width(images.shape)
    _check(attack, ball)
    inputs.check_values(model, images, np.zeros(len(images), np.int32))
    inputs.check_once(model, images)
    seen = features.Layer(classifier.in_float32(model), layer)
    classes = evaluation.count_classes(model, images.shape)
    inner = min(999, max(1, width // 2)) if inner is None else inner
    points = attack.evaluations * attack.step_passes[0] if random_points is None else random_points
    arguments.counts(inner=inner, random_points=points, batch=batch)
    keys = runner.example_keys(seed, np.arange(len(images)) if rows is None else np.asarray(rows))
    bounded = attack.replace(epsilon=radius)
    found = {name: [] for name in ("planted", "found", "guessed", "distance")}
    for index, image in enumerate(images):
        draw, attacked = jax.random.split(jax.random.fold_in(keys[index], 0x706C616E))
        places = [jax.random.fold_in(draw, number) for number in range(3)]
        near = _points(ball, places[0], image, INNER * radius, inner, False)
        far = _points(ball, places[1], image, radius, 1, True)
        known = np.concatenate([image[None], near, far])
        weights, bias = head(features.extract(seen, known, batch=batch))
        broken = Planted(seen.model, jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32), layer, classes)
        label = jnp.zeros(1, jnp.int32)
        result = skeleton.carry_out(bounded, broken, attacked[None], jnp.asarray(image[None]), label)
        distance = float(ball.measure(jnp.asarray(far - image))[0])
        guesses = _points(ball, places[2], image, radius, points, True)
        there = _predicted(broken, image[None])[0] == 0 and _predicted(broken, far)[0] == 1
        found["planted"].append(bool(there and norms.within(distance, float(radius))))
        found["found"].append(bool(result.success[0] and norms.within(result.distance[0], float(radius))))
        found["guessed"].append(bool((features.in_batches(_predicted, broken, guesses, batch=batch) == 1).any()))
        found["distance"].append(distance)
    arrays = {name: np.asarray(values) for name, values in found.items()}
    if not arrays["planted"].any():
        raise errors.UserError(
            f"no head on {layer!r} ({width} features) tells the planted point from {inner} inner ones: give fewer, inner=..., or "
            "a larger epsilon."
        )
    return PlantedResult(**arrays, random_points=points)


def head(points: Float[np.ndarray, "points width"]) -> tuple[np.ndarray, float]:
    """Weights and bias of a linear head that is positive on the last row, and hardly so, and negative on the others.

    Ridge regression in its dual form, float64. The boundary lies at 0.999 of the way to the last row from the other that comes
    nearest to it in score; the scale is such that this way has length one.
    """
    centre = points[:-1].mean(axis=0)
    centred = points - centre
    gram = centred @ centred.T
    ridge = 1e-8 * max(float(np.trace(gram)) / len(gram), 1e-30)
    target = np.append(-np.ones(len(points) - 1), 1.0)
    weights = centred.T @ np.linalg.solve(gram + ridge * np.eye(len(gram)), target)
    scores = points @ weights
    nearest, last = scores[:-1].max(), scores[-1]
    way = max(last - nearest, 1e-12)
    return weights / way, -(nearest + CLOSENESS * (last - nearest)) / way


@jax.jit
def _predicted(model: Planted, images: jax.Array) -> jax.Array:
    return jnp.argmax(model(images), axis=-1)


def _points(ball: norms.Norm, key: jax.Array, image: np.ndarray, radius: Any, count: int, surface: bool) -> np.ndarray:
    """Random points of the ball around an image, or of its surface, put into [0, 1]."""
    keys = jax.random.split(key, count)
    clean = np.broadcast_to(image, (count, *image.shape))
    return np.asarray(_draw(ball, surface, keys, jnp.asarray(clean), arguments.number(radius)))


def _drawn(ball: norms.Norm, surface: bool, keys: jax.Array, clean: jax.Array, radius: jax.Array) -> jax.Array:
    differences = ball.draw(keys, clean, radius)
    if surface:
        length = ball.measure(differences)
        differences = differences * (radius / jnp.maximum(length, 1e-30))[:, None, None, None]
    return ball.project(clean + differences, clean, radius)


_draw = jax.jit(_drawn, static_argnums=(0, 1))


def _check(attack: skeleton.Attack, ball: norms.Norm) -> None:
    if attack.minimal or not hasattr(attack, "epsilon"):
        raise errors.UserError("the attack has no ball: give a bounded one, such as attacks.build('pgd', epsilon=...).")
    if attack.norm is not ball:
        raise errors.UserError(
            f"the attack is in {attack.norm.name} and the threat in {ball.name}: give both in one norm."
        )
    if attack.goal is not skeleton.UNTARGETED:
        raise errors.UserError("the attack is targeted: the test asks for any other class; give an untargeted one.")
