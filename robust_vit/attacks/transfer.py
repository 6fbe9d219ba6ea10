"""Transfer: adversarial examples of each model tried on every other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit import classifier, errors, mesh
from robust_vit import programs as compiled
from robust_vit.attacks import evaluation, skeleton


class Transfer(NamedTuple):
    """What the adversarial examples of each source did to each target.

    Attributes:
      names: of the models, the order of both axes.
      success: the target errs on the source's adversarial image; raw, also where it errs on the clean one.
      both: source and target are right on the clean image.
    """

    names: tuple[str, ...]
    success: Bool[np.ndarray, "source target batch"]
    both: Bool[np.ndarray, "source target batch"]

    @property
    def rates(self) -> Float[np.ndarray, "source target"]:
        """Success over the images that source and target both get right; NaN where there are none."""
        with np.errstate(invalid="ignore"):
            return (self.success & self.both).sum(axis=-1) / self.both.sum(axis=-1)

    @property
    def raw(self) -> Float[np.ndarray, "source target"]:
        """Error of the target on the source's adversarial images, over all images."""
        return self.success.mean(axis=-1)


@jax.jit
def predict(model: evaluation.Model, keys: Key[Array, " batch"], images: jax.Array) -> Int[Array, " batch"]:
    """The class that a model in float32 gives each image, a stochastic one under draws that no attack has seen. One pass."""
    with jax.default_matmul_precision("highest"):
        logits = evaluation.logits(classifier.in_float32(model), images, keys, skeleton.JUDGE)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def row(
    source: evaluation.Model,
    targets: Iterable[evaluation.Model],
    attack: skeleton.Attack,
    keys: Key[Array, " batch"],
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
) -> tuple[skeleton.AttackResult, list[jax.Array]]:
    """What the attack makes of the images on the source, and the class that each target gives these. A pass a target.

    An attack that stops as soon as it has success on the source leaves its images at the source's boundary, where few others
    are fooled: give one that takes all its steps (`stop_on_success=False`), of a loss that goes on growing.

    Args:
      source: the model that is attacked.
      targets: models that the images are tried on.
      attack: untargeted.
      keys: one typed key an example.
      images: canonical pixels in [0, 1].
      labels: true labels.

    Raises:
      errors.UserError: a targeted attack, whose success is another question.
    """
    if attack.goal is not skeleton.UNTARGETED:
        raise errors.UserError(f"the attack is {attack.goal.name}: transfer is measured of untargeted attacks.")
    result = attack(source, keys, images, labels)
    return result, [predict(target, keys, result.images) for target in targets]


def matrix(
    models: Mapping[str, evaluation.Model],
    attack: skeleton.Attack,
    keys: Key[Array, " batch"],
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
) -> Transfer:
    """Adversarial examples of each model tried on all, itself included.

    Cost: the attack once a model, and a forward pass for each pair and each model's clean look. Arguments as in `row`.

    Args:
      models: name -> canonical pixels to logits, of images of one size.
      attack: untargeted; `transfer.row` says which transfers.
      keys: one typed key an example, the same for all models.
      images: canonical pixels in [0, 1].
      labels: true labels.
    """
    truth = np.asarray(labels)
    clean = [mesh.fetch(predict(model, keys, images)) == truth for model in models.values()]
    rows = [row(source, models.values(), attack, keys, images, labels)[1] for source in models.values()]
    success = np.stack([np.stack([mesh.fetch(found) != truth for found in line]) for line in rows])
    right = np.stack(clean)
    return Transfer(tuple(models), success, right[:, None] & right[None, :])


def programs(
    source: evaluation.Model,
    targets: Iterable[evaluation.Model],
    attack: skeleton.Attack,
    images: jax.ShapeDtypeStruct,
) -> list[compiled.Program]:
    """The compiled programs of `row` with how often each runs, for planning; arrays may be shapes."""
    keys = jax.eval_shape(lambda x: jax.random.split(jax.random.key(0), len(x)), images)
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=images.sharding)
    tried = [compiled.Program("target", predict, (target, keys, images)) for target in targets]
    return [*skeleton.programs(attack, source, images), *tried]
