"""The skeleton of every iterated attack: `init / step / finish` on per-example state, with its ingredients as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit import errors, loops, losses
from robust_vit import programs as compiled
from robust_vit.attacks import norms

Model = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Goal:
    """What counts as success, and which way the loss has to go for it.

    Attributes:
      name: of the goal.
      direction: +1 raises the loss of `labels`, -1 lowers it.
      achieved: `(predictions, labels) -> bool [batch]`.
    """

    name: str
    direction: float
    achieved: Callable


UNTARGETED = Goal("untargeted", 1.0, jnp.not_equal)
TARGETED = Goal("targeted", -1.0, jnp.equal)
GOALS = {goal.name: goal for goal in (UNTARGETED, TARGETED)}
LOSSES = {"cross_entropy": losses.cross_entropy, "margin": losses.margin}


def constant(progress: jax.Array) -> jax.Array:
    """The step size as it is."""
    return jnp.ones_like(progress)


def cosine(progress: jax.Array) -> jax.Array:
    """The step size falling to zero along half a cosine."""
    return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


SCHEDULES = {"constant": constant, "cosine": cosine}


class State(flax.struct.PyTreeNode):
    """Where each example's attack stands; examples may be at different steps.

    Attributes:
      keys: one key an example; fixed.
      clean: the images attacked; fixed.
      labels: true labels, or for a targeted attack the classes to reach; fixed.
      images: the images that the next step evaluates; where `done`, the adversarial ones.
      count: evaluations so far.
      done: nothing is left to do.
      success: an image that reaches the goal has been met.
      best: the first such image; before there is one, the clean image.
      vanished: evaluations whose gradient was zero everywhere or not finite: a mark of masking.
    """

    keys: Key[Array, " batch"]
    clean: Float[Array, "batch height width channels"]
    labels: Int[Array, " batch"]
    images: Float[Array, "batch height width channels"]
    count: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    success: Bool[Array, " batch"]
    best: Float[Array, "batch height width channels"]
    vanished: Int[Array, " batch"]


class AttackResult(flax.struct.PyTreeNode):
    """What an attack found, one row an example.

    Attributes:
      images: canonical pixels in [0, 1]: the first image met that reaches the goal, else the last iterate.
      success: the goal is reached by `images` in a forward pass in float32. For an untargeted attack that includes the
        examples that were misclassified to begin with, whose `images` are the clean ones where the attack looks at them.
      prediction: the class that this pass gives to `images`.
      loss: of `images` and `labels` in that pass, in the attack's own loss.
      distance: of `images` from the clean ones, in the attack's norm.
      forward_passes: of this example, until its attack ended, the judging pass included.
      backward_passes: likewise.
      vanished: gradients that were zero everywhere or not finite.
    """

    images: Float[Array, "batch height width channels"]
    success: Bool[Array, " batch"]
    prediction: Int[Array, " batch"]
    loss: Float[Array, " batch"]
    distance: Float[Array, " batch"]
    forward_passes: Int[Array, " batch"]
    backward_passes: Int[Array, " batch"]
    vanished: Int[Array, " batch"]


class Attack(flax.struct.PyTreeNode):
    """An iterated attack: projected steepest ascent with its ingredients. Use `robust_vit.attacks.build` to make one.

    Numbers are leaves, so a new epsilon compiles nothing and `jax.vmap` over an attack is a sweep; structure is static.

    Attributes:
      epsilon: radius of the ball, in pixel units [0, 1].
      relative_step: length of a step in units of epsilon, so that a sweep over epsilon scales the steps too.
      norm: of the ball and of the steps.
      loss: `(logits, labels) -> [batch]`, a named function.
      schedule: factor of the step size from the progress in [0, 1) of a restart, a named function.
      goal: `UNTARGETED` or `TARGETED`.
      steps: gradient steps from each start.
      restarts: starts, at least one.
      random_start: start uniformly in the ball rather than at the clean image.
      stop_on_success: leave an example alone as soon as it reaches the goal, which the clean image may do by itself. Without it
        every example takes all steps, and the images are the last iterates unless only an earlier one reached the goal.
    """

    epsilon: Any
    relative_step: Any
    norm: norms.Norm = flax.struct.field(pytree_node=False, default=norms.LINF)
    loss: Callable = flax.struct.field(pytree_node=False, default=losses.cross_entropy)
    schedule: Callable = flax.struct.field(pytree_node=False, default=constant)
    goal: Goal = flax.struct.field(pytree_node=False, default=UNTARGETED)
    steps: int = flax.struct.field(pytree_node=False, default=10)
    restarts: int = flax.struct.field(pytree_node=False, default=1)
    random_start: bool = flax.struct.field(pytree_node=False, default=True)
    stop_on_success: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def evaluations(self) -> int:
        """Forward and backward passes that one example takes at most; judging adds one forward pass."""
        return self.restarts * (self.steps + 1) if self.random_start else self.steps

    def sweep(self, epsilons: Float[Array, " sweep"]) -> Attack:
        """This attack at each radius, its numbers stacked: `jax.vmap(lambda a: a(model, keys, images, labels))(a.sweep(e))`."""
        epsilons = jnp.asarray(epsilons, jnp.result_type(float))
        return self.replace(epsilon=epsilons, relative_step=jnp.broadcast_to(self.relative_step, epsilons.shape))

    def __call__(
        self,
        model: Model,
        keys: Key[Array, " batch"],
        images: Float[Array, "batch height width channels"],
        labels: Int[Array, " batch"],
    ) -> AttackResult:
        """Attacks a batch: pure, of fixed shape, compiled once for all models of equal structure and all numbers.

        Args:
          model: canonical pixels to logits; a pytree (`Classifier`, `Wrapped`).
          keys: one typed key an example; the result of an example depends on its own key only.
          images: canonical pixels in [0, 1].
          labels: true labels; for a targeted attack the classes to reach.

        Returns:
          The result, after `evaluations` forward and backward passes and one forward pass of the whole batch.
        """
        _check(keys, images, labels)
        state = _init(self, keys, images, labels)
        state = loops.repeat(advance, state, self.evaluations, self, model)
        return finish(self, model, state)

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """The state before any evaluation. No passes."""
        images = jnp.asarray(images)
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        return State(
            keys=keys,
            clean=images,
            labels=jnp.asarray(labels, jnp.int32),
            images=images,
            count=zeros,
            done=zeros > 0,
            success=zeros > 0,
            best=images,
            vanished=zeros,
        )

    def step(self, model: Model, state: State) -> State:
        """Evaluates the current images and moves those of examples that are not done. One forward and backward pass."""
        # What is evaluated at a boundary is complete: the clean image, or the end of a restart. A new start follows.
        phase = state.count % (self.steps + 1) if self.random_start else state.count + 1
        restart = state.count // (self.steps + 1)

        def loss(images):
            logits = model(images)
            return jnp.sum(self.loss(logits, state.labels)), logits

        gradients, logits = jax.grad(loss, has_aux=True)(state.images)
        finite = jnp.all(jnp.isfinite(gradients), axis=(1, 2, 3))
        gradients = jnp.where(finite[:, None, None, None], gradients, 0.0)
        vanishes = jnp.all(gradients == 0.0, axis=(1, 2, 3))
        moved = self._move(state, gradients, phase)
        if self.random_start:
            starts = phase == 0
            fresh = jax.lax.cond(jnp.any(starts), lambda: self._start(state, restart), lambda: moved)
            moved = jnp.where(starts[:, None, None, None], fresh, moved)

        achieved = self._achieves(logits, state.labels)
        count = state.count + 1
        done = count >= self.evaluations
        if self.stop_on_success:
            done = done | achieved
            moved = jnp.where(achieved[:, None, None, None], state.images, moved)
        first = achieved & ~state.success
        updated = state.replace(
            images=moved,
            count=count,
            done=done,
            success=state.success | achieved,
            best=jnp.where(first[:, None, None, None], state.images, state.best),
            vanished=state.vanished + vanishes,
        )
        return _select(state.done, state, updated)

    def finish(self, model: Model, state: State) -> AttackResult:
        """Judges the images that the attack returns by the model in float32. One forward pass.

        With `stop_on_success` that is the adversarial image or the last iterate; without, the last iterate wherever it
        reaches the goal, else an earlier image that did (which costs a second forward pass).
        """
        twin = in_float32(model)
        extra = 0
        with jax.default_matmul_precision("highest"):
            if self.stop_on_success:
                images = state.images
            else:
                last = self._achieves(twin(state.images), state.labels)
                images = jnp.where((state.success & ~last)[:, None, None, None], state.best, state.images)
                extra = 1
            logits = twin(images)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return AttackResult(
            images=images,
            success=self._achieves(logits, state.labels),
            prediction=jnp.argmax(logits, axis=-1).astype(jnp.int32),
            loss=self.loss(logits, state.labels),
            distance=self.norm.measure(images - state.clean),
            forward_passes=state.count + 1 + extra,
            backward_passes=state.count,
            vanished=state.vanished,
        )

    def _achieves(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        return self.goal.achieved(jnp.argmax(logits, axis=-1), labels)

    def _move(self, state: State, gradients: jax.Array, phase: jax.Array) -> jax.Array:
        epsilon = jnp.asarray(self.epsilon, gradients.dtype)
        size = epsilon * jnp.asarray(self.relative_step, gradients.dtype)
        progress = (phase - 1).astype(gradients.dtype) / self.steps
        size = self.goal.direction * size * self.schedule(progress)
        images = state.images + size[:, None, None, None] * self.norm.ascend(gradients)
        return self.norm.project(images, state.clean, epsilon)

    def _start(self, state: State, restart: jax.Array) -> jax.Array:
        epsilon = jnp.asarray(self.epsilon, state.clean.dtype)
        keys = jax.vmap(jax.random.fold_in)(state.keys, restart)
        return self.norm.project(state.clean + self.norm.draw(keys, state.clean, epsilon), state.clean, epsilon)


def advance(state: State, index: jax.Array, attack: Attack, model: Model) -> State:
    """`attack.step` in the form that `loops.repeat` takes."""
    del index
    return attack.step(model, state)


def programs(attack: Attack, model: Model, images: jax.ShapeDtypeStruct) -> list[compiled.Program]:
    """The compiled programs of `attack(model, keys, images, labels)` with how often each runs, for planning.

    Args:
      attack: the attack.
      model: canonical pixels to logits; its arrays may be shapes.
      images: the shape of the batch.
    """
    keys, labels = jax.eval_shape(
        lambda x: (jax.random.split(jax.random.key(0), len(x)), jnp.zeros(len(x), jnp.int32)), images
    )
    start = compiled.Program("start", _init, (attack, keys, images, labels))
    state = jax.eval_shape(_init, attack, keys, images, labels)
    step = loops.plan(advance, state, attack.evaluations, attack, model)
    judged = compiled.beside(state, model)
    return [start, step, compiled.Program("judge", finish, (attack, model, judged))]


@jax.jit
def _init(attack: Attack, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
    return attack.init(keys, images, labels)


@jax.jit
def finish(attack: Attack, model: Model, state: State) -> AttackResult:
    """`attack.finish`, compiled."""
    return attack.finish(model, state)


def in_float32(model: Model) -> Model:
    """The model's float32 twin: the same weights, computed in float32 where its module computes in less.

    A fused attention becomes the explicit one: the kernel of a GPU is half precision, and has no second derivative.
    """
    module = getattr(model, "module", None)
    dtype = getattr(module, "dtype", None)
    if dtype is None or jnp.dtype(dtype).itemsize >= 4:
        return model
    changes = {"dtype": "float32" if isinstance(dtype, str) else jnp.float32}
    if getattr(module, "attention", None) == "fused":
        changes["attention"] = "explicit"
    return model.replace(module=module.clone(**changes))


def _select(keep: jax.Array, old: State, new: State) -> State:
    def select(a, b):
        return jnp.where(keep.reshape(keep.shape + (1,) * (a.ndim - keep.ndim)), a, b)

    fixed = {"keys": old.keys, "clean": old.clean, "labels": old.labels}
    moving = {
        field.name: select(getattr(old, field.name), getattr(new, field.name))
        for field in dataclasses.fields(State)
        if field.name not in fixed
    }
    return State(**fixed, **moving)


def _describe(array: Any) -> str:
    return f"{getattr(array, 'dtype', type(array).__name__)} {tuple(getattr(array, 'shape', ()))}"


def _check(keys: jax.Array, images: jax.Array, labels: jax.Array) -> None:
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise errors.UserError(
            f"images are {_describe(images)}: expected floating point [batch, height, width, channels] in [0, 1]; divide "
            "uint8 by 255."
        )
    if labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise errors.UserError(f"labels are {_describe(labels)}: expected class indices ({images.shape[0]},).")
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != images.shape[:1]:
        raise errors.UserError(
            f"keys are {_describe(keys)}: expected one typed key an example, ({images.shape[0]},): "
            "jax.random.split(jax.random.key(0), batch)."
        )
