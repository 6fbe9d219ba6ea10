"""How the loss goes up while an attack runs: what a model says of each iterate."""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit import loops, losses
from robust_vit import programs as compiled
from robust_vit.attacks import evaluation, skeleton


class Progression(NamedTuple):
    """What the model says of the image before each step of an attack, and of the last one.

    Attributes:
      losses: cross-entropy of the true label, in nats.
      achieved: the attack's goal is reached.
      vanished: gradients that were zero everywhere or not finite.
    """

    losses: Float[Array, "batch evaluations+1"]
    achieved: Bool[Array, "batch evaluations+1"]
    vanished: Int[Array, " batch"]


class _Followed(flax.struct.PyTreeNode):
    state: skeleton.State
    losses: jax.Array
    achieved: jax.Array


def follow(
    attack: skeleton.Attack,
    model: evaluation.Model,
    keys: Key[Array, " batch"],
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
) -> Progression:
    """The progression of an attack whose state's `images` are its iterates, as those of steps along a gradient are.

    Cost: the attack, and one forward pass for the last iterate; the look at every other shares the forward pass of its step. In
    the precision that the model computes in. An attack that stops on success stands still from there on.

    Args:
      attack: its first iterate is the clean image.
      model: canonical pixels to logits.
      keys: one typed key an example.
      images: canonical pixels in [0, 1].
      labels: true labels, or for a targeted attack the classes to reach.
    """
    followed = _begin(attack, keys, images, labels)
    step = skeleton.by_device(_advance, images, model)
    followed = loops.repeat(step, followed, attack.evaluations, attack, model)
    followed = _look(followed, jnp.int32(attack.evaluations), attack, model)
    return Progression(followed.losses, followed.achieved, followed.state.vanished)


@jax.jit
def _begin(attack: skeleton.Attack, keys: jax.Array, images: jax.Array, labels: jax.Array) -> _Followed:
    state = attack.init(keys, images, labels)
    shape = (images.shape[0], attack.evaluations + 1)
    return _Followed(state, jnp.zeros(shape, jnp.promote_types(images.dtype, jnp.float32)), jnp.zeros(shape, bool))


@jax.jit
def _look(followed: _Followed, index: jax.Array, attack: skeleton.Attack, model: evaluation.Model) -> _Followed:
    state = followed.state
    logits = evaluation.logits(model, state.images, state.keys, state.count)
    loss = losses.cross_entropy(logits, state.labels)
    return followed.replace(
        losses=followed.losses.at[:, index].set(loss.astype(followed.losses.dtype)),
        achieved=followed.achieved.at[:, index].set(attack.achieves(logits, state.labels)),
    )


def _advance(followed: _Followed, index: jax.Array, attack: skeleton.Attack, model: evaluation.Model) -> _Followed:
    looked = _look(followed, index, attack, model)
    return looked.replace(state=skeleton.advance(followed.state, index, attack, model))


def programs(attack: skeleton.Attack, model: evaluation.Model, images: jax.ShapeDtypeStruct) -> list[compiled.Program]:
    """The compiled programs of `follow` with how often each runs, for planning; the model's arrays may be shapes."""
    keys, labels = jax.eval_shape(
        lambda x: (jax.random.split(jax.random.key(0), len(x)), jnp.zeros(len(x), jnp.int32)), images
    )
    start = compiled.Program("start", _begin, (attack, keys, images, labels))
    followed = jax.eval_shape(_begin, attack, keys, images, labels)
    step = loops.plan(skeleton.by_device(_advance, images, model), followed, attack.evaluations, attack, model)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    return [start, step, compiled.Program("last", _look, (compiled.beside(followed, model), index, attack, model))]
