"""The skeleton of every attack: `init / step / finish` on per-example state, with norm, loss and goal as data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit import classifier, loops, losses
from robust_vit import mesh as meshes
from robust_vit import programs as compiled
from robust_vit.attacks import evaluation, inputs, norms

Model = evaluation.Model
PyTree = Any


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
LOSSES = {"cross_entropy": losses.cross_entropy, "margin": losses.margin, "dlr": losses.dlr}


class State(flax.struct.PyTreeNode, kw_only=True):
    """Where each example's attack stands; examples may be at different steps. An attack adds what it needs beside.

    Attributes:
      keys: one key an example; fixed.
      clean: the images attacked; fixed.
      labels: true labels, or for a targeted attack the classes to reach; fixed.
      images: what the attack returns if it has no success; most evaluate it in the next step.
      count: evaluations so far.
      done: nothing is left to do.
      success: an image that reaches the goal has been met.
      best: that image: the first, or of a minimal attack the nearest; before there is one, the clean image.
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


# Of the state, what stays as it is, and what `Attack.finish` reads of the rest.
FIXED = ("keys", "clean", "labels")
JUDGED = ("images", "best", "count", "success", "vanished")
JUDGE = 0xFFFFFFFF  # The number of the draw that judges a stochastic model.


class AttackResult(flax.struct.PyTreeNode):
    """What an attack found, one row an example.

    Attributes:
      images: canonical pixels in [0, 1]: the first image met that reaches the goal (of a minimal attack the nearest), else
        the one that came closest to it.
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


class Attack(flax.struct.PyTreeNode, kw_only=True):
    """The base of every attack: a frozen pytree whose numbers are leaves and whose structure is static.

    Numbers are leaves, so a new epsilon compiles nothing and `jax.vmap` over an attack is a sweep. A subclass defines
    `evaluations`, `init` and `step`; `__call__`, `finish` and `robust_vit.attacks.run` are the same for all.

    Attributes:
      norm: of the distance, and of the ball where there is one.
      loss: `(logits, labels) -> [batch]`, a named function: what is climbed where the attack has a choice, and what the
        result reports.
      goal: `UNTARGETED` or `TARGETED`.
    """

    norm: norms.Norm = flax.struct.field(pytree_node=False, default=norms.LINF)
    loss: Callable = flax.struct.field(pytree_node=False, default=losses.cross_entropy)
    goal: Goal = flax.struct.field(pytree_node=False, default=UNTARGETED)

    # Whether the attack returns the nearest success at any distance, rather than one within a ball.
    minimal: ClassVar[bool] = False

    @property
    def evaluations(self) -> int:
        """Steps that one example takes at most."""
        raise TypeError(f"{type(self).__name__} does not define evaluations")

    @property
    def step_passes(self) -> tuple[int, int]:
        """Forward and backward passes of one step, of a model that is not stochastic."""
        return 1, 1

    @property
    def judge_passes(self) -> int:
        """Forward passes that judging takes."""
        return 1

    def against(self, model: Model) -> Attack:
        """The attack as it is run on this model; its counts of passes are those to plan with.

        A model that draws (`stochastic`, so an `Expectation` too) is fooled now and then by an image that it gets right in its
        next draws: there no success ends an example, whatever `stop_on_success` says.
        """
        if getattr(model, "stochastic", False) and getattr(self, "stop_on_success", False):
            return self.replace(stop_on_success=False)
        return self

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """The state before any evaluation. No passes."""
        return State(**blank(keys, images, labels))

    def step(self, model: Model, state: State) -> State:
        """The state after one more evaluation, as if no example were done; `advance` counts, and keeps those that are.

        A step has a fixed shape and the same passes whatever the state: examples in one batch may be at different
        counts. It calls the model outside of `lax.cond` and of loops (see `robust_vit.loops`).
        """
        raise TypeError(f"{type(self).__name__} does not define step")

    def answer(self, model: Model, state: State) -> jax.Array:
        """The images that the attack returns. `judge_passes - 1` forward passes of the model, here its float32 twin."""
        del model
        return select(state.success, state.best, state.images)

    def __call__(
        self,
        model: Model,
        keys: Key[Array, " batch"],
        images: Float[Array, "batch height width channels"],
        labels: Int[Array, " batch"],
    ) -> AttackResult:
        """Attacks a batch: pure, of fixed shape, compiled once for all models of equal structure and all numbers.

        Args:
          model: canonical pixels to logits; a pytree (`Classifier`, `Wrapped`, `Expectation`).
          keys: one typed key an example; the result of an example depends on its own key only.
          images: canonical pixels in [0, 1].
          labels: true labels; for a targeted attack the classes to reach.

        Returns:
          The result, after `evaluations` steps of the whole batch and its judgement.

        Raises:
          errors.UserError: outside of a compiled function, what `attacks.check_inputs` refuses, before the first step, where a
            model that passed once is not looked at again; a loss that is not finite, after the last.
        """
        inputs.check_arrays(keys, images, labels)
        inputs.check_values(model, images, labels)
        inputs.check_once(model, images)
        result = carry_out(self, model, keys, images, labels)
        inputs.check_losses(result.loss)
        return result

    def finish(self, model: Model, state: State) -> AttackResult:
        """Judges the images that the attack returns by the model in float32. `judge_passes` forward passes."""
        twin = classifier.in_float32(model)
        with jax.default_matmul_precision("highest"):
            images = self.against(model).answer(twin, state)
            # Draws of their own: an attack on a stochastic model is not judged on those that it has seen.
            logits = evaluation.logits(twin, images, state.keys, JUDGE)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        forward, backward = (evaluation.passes(model) * count for count in self.step_passes)
        return AttackResult(
            images=images,
            success=self.achieves(logits, state.labels),
            prediction=jnp.argmax(logits, axis=-1).astype(jnp.int32),
            loss=self.loss(logits, state.labels),
            distance=self.norm.measure(images - state.clean),
            forward_passes=state.count * forward + evaluation.passes(model) * self.against(model).judge_passes,
            backward_passes=state.count * backward,
            vanished=state.vanished,
        )

    def achieves(self, logits: jax.Array, labels: jax.Array) -> Bool[Array, " batch"]:
        """Whether the prediction is what the attack wants."""
        return self.goal.achieved(jnp.argmax(logits, axis=-1), labels)


def carry_out(attack: Attack, model: Model, keys: jax.Array, images: jax.Array, labels: jax.Array) -> AttackResult:
    """`attack(model, keys, images, labels)` without a look at what it is given."""
    state = start(attack, keys, images, labels)
    state = loops.repeat(by_device(advance, images, model), state, attack.evaluations, attack, model)
    return finish(attack, model, state)


class Climb(Attack, kw_only=True):
    """The base of attacks that move an image step by step and return where they end.

    Attributes:
      stop_on_success: leave an example alone as soon as it reaches the goal, which the clean image may do by itself. Without it,
        and on a model that draws, every example takes all steps, and the images are the last iterates unless only an earlier
        one reached the goal.
    """

    stop_on_success: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def judge_passes(self) -> int:
        """One forward pass; without `stop_on_success` another one, of the last iterate."""
        return 1 if self.stop_on_success else 2

    def answer(self, model: Model, state: State) -> jax.Array:
        """With `stop_on_success` the success or the last iterate; without, the last iterate wherever it is one."""
        if self.stop_on_success:
            return state.images
        last = self.achieves(evaluation.logits(model, state.images, state.keys, state.count), state.labels)
        return select(state.success & ~last, state.best, state.images)


def follow(
    state: State, moved: jax.Array, achieved: jax.Array, vanished: jax.Array, *, stop_on_success: bool, **fields: Any
) -> State:
    """The state after images were looked at and moved: the first success is kept, and ends the attack where it should.

    Args:
      state: before.
      moved: where the images go.
      achieved: those looked at reach the goal.
      vanished: their gradient is zero everywhere or not finite.
      stop_on_success: a success stays where it is.
      **fields: what else has changed of the state.
    """
    if stop_on_success:
        moved = select(achieved, state.images, moved)
    return state.replace(
        images=moved,
        done=state.done | achieved if stop_on_success else state.done,
        success=state.success | achieved,
        best=select(achieved & ~state.success, state.images, state.best),
        vanished=state.vanished + vanished,
        **fields,
    )


def advance(state: State, index: jax.Array, attack: Attack, model: Model) -> State:
    """One step of the examples that are not done, counted; in the form that `loops.repeat` takes."""
    del index
    stepped = attack.against(model).step(model, state)
    count = state.count + 1
    stepped = stepped.replace(count=count, done=stepped.done | (count >= attack.evaluations))
    moving = {
        field.name: select(state.done, getattr(state, field.name), getattr(stepped, field.name))
        for field in dataclasses.fields(state)
        if field.name not in FIXED
    }
    return state.replace(**moving)


def by_device(function: Callable, images: Float[Array, "batch height width channels"], model: Model) -> Callable:
    """A function of attacked examples as the devices compute it that share these images; see `mesh.Apart`.

    Where each of them holds all of the model, each takes its own images alone; else it is left to the compiler.

    Args:
      function: `function(state, *operands)`, such as `advance`; all leaves that it takes and gives are `[batch, ...]`.
      images: where they lie says which devices share them; they may be shapes.
      model: canonical pixels to logits; its arrays may be shapes.
    """
    placed = meshes.sharing(images)
    return function if placed is None or not meshes.is_whole(model) else meshes.Apart(function, placed)


def programs(attack: Attack, model: Model, images: jax.ShapeDtypeStruct) -> list[compiled.Program]:
    """The compiled programs of `attack(model, keys, images, labels)` with how often each runs, for planning.

    Args:
      attack: the attack.
      model: canonical pixels to logits; its arrays may be shapes.
      images: the shape of the batch.
    """
    begin, state = begin_program(attack, images)
    step = loops.plan(by_device(advance, images, model), state, attack.evaluations, attack, model)
    return [begin, step, judge_program(attack, model, images, state)]


def begin_program(attack: Attack, images: jax.ShapeDtypeStruct) -> tuple[compiled.Program, State]:
    """The program of `start`, and the shapes that it makes."""
    keys, labels = jax.eval_shape(
        lambda x: (jax.random.split(jax.random.key(0), len(x)), jnp.zeros(len(x), jnp.int32)), images
    )
    arguments = (attack, keys, images, labels)
    begin = compiled.Program("start", _start, arguments, static=(meshes.sharing(images),))
    return begin, jax.eval_shape(start, *arguments)


def judge_program(attack: Attack, model: Model, images: jax.ShapeDtypeStruct, state: State) -> compiled.Program:
    """The program of `finish`, for shapes."""
    arguments = (attack, model, compiled.beside(state, model))
    return compiled.Program("judge", _finish, arguments, static=(by_device(_judge, images, model),))


def blank(keys: jax.Array, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """The fields of `State` before any evaluation, for an attack's `init`."""
    images = jnp.asarray(images)
    zeros = jnp.zeros(images.shape[0], jnp.int32)
    return {
        "keys": keys,
        "clean": images,
        "labels": jnp.asarray(labels, jnp.int32),
        "images": images,
        "count": zeros,
        "done": zeros > 0,
        "success": zeros > 0,
        "best": images,
        "vanished": zeros,
    }


def select(chosen: Bool[Array, " batch"], first: PyTree, second: PyTree) -> PyTree:
    """`first` for the examples that are chosen, `second` for the others; arrays or pytrees of arrays, `[batch, ...]`."""

    def one(first, second):
        return jnp.where(chosen.reshape(chosen.shape + (1,) * (first.ndim - chosen.ndim)), first, second)

    return jax.tree.map(one, first, second)


def start(attack: Attack, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
    """`attack.init`, compiled; of images that devices share, all of the state lies where they do."""
    return _start(meshes.sharing(images), attack, keys, images, labels)


@functools.partial(jax.jit, static_argnums=0)
def _start(placed, attack, keys, images, labels):
    state = attack.init(keys, images, labels)
    return state if placed is None else jax.lax.with_sharding_constraint(state, placed)


def finish(attack: Attack, model: Model, state: State) -> AttackResult:
    """`attack.finish`, compiled."""
    return _finish(by_device(_judge, state.images, model), attack, model, state)


def _judge(state: State, attack: Attack, model: Model) -> AttackResult:
    return attack.finish(model, state)


@functools.partial(jax.jit, static_argnums=0)
def _finish(judge, attack, model, state):
    return judge(state, attack, model)
