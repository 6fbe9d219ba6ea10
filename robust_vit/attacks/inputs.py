"""What is looked at before the first step: pixels, labels, targets, and a model whose answers no attack could be right about."""

from __future__ import annotations

import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from robust_vit import errors
from robust_vit import mesh as meshes
from robust_vit.attacks import evaluation

# Relative L2 differences of logits: AutoAttack's `check_randomized` uses the first; the second bounds the rounding of bfloat16.
SAME = 1e-4
ALIKE = 1e-2
SUMS = 1e-4  # How near to one the sums of probabilities are.
LOOKED_AT = 64  # Images of a batch on which a model is looked at before an attack.
REMEMBERED = 64  # Models that need not be looked at again.

_NUMBERS = np.generic | float | int
_passed: dict[Any, list[weakref.ref]] = {}


def check_arrays(
    keys: Key[Array, " batch"], images: Float[Array, "batch height width channels"], labels: Int[Array, " batch"]
) -> None:
    """Refuses arrays of another shape or type than an attack takes; no compute."""
    _check_images(images)
    _check_labels(labels, images.shape[0])
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != images.shape[:1]:
        raise errors.UserError(
            f"keys are {_describe(keys)}: expected one typed key an example, ({images.shape[0]},): "
            "jax.random.split(jax.random.key(0), batch)."
        )


def check_values(model: evaluation.Model, images: Any, labels: Any) -> None:
    """Refuses pixels outside [0, 1] and labels that the model has no logit for. One reduction, no pass; tracers pass.

    Args:
      model: canonical pixels to logits; its shapes alone are asked.
      images: `[batch, height, width, channels]`, of NumPy or JAX.
      labels: class indices `[batch]`.
    """
    _check_images(images)
    _check_labels(labels, images.shape[0])
    if isinstance(images, jax.core.Tracer) or isinstance(labels, jax.core.Tracer) or not images.size:
        return
    library = np if isinstance(images, np.ndarray) and isinstance(labels, np.ndarray) else jnp
    low, high, least, most = (float(v) for v in (_extent_on_host if library is np else _extent)(images, labels))
    if not (low >= 0 and high <= 1):  # A NaN fails this too.
        raise errors.UserError(
            f"images span [{low:.4g}, {high:.4g}]: expected canonical pixels in [0, 1]; {_remedy(low, high)}."
        )
    classes = evaluation.count_classes(model, images.shape)
    if least < 0 or most >= classes:
        raise errors.UserError(
            f"labels are {_describe(labels)} from {least:.0f} to {most:.0f}: expected one class index an image, 0 to "
            f"{classes - 1}, which is what the model has logits for."
        )


def check_targets(targets: Any, labels: Any) -> None:
    """Refuses targets that are the labels: an attack would have nothing to reach."""
    targets, labels = np.asarray(targets), np.asarray(labels)
    _check_labels(targets, len(labels))
    same = np.flatnonzero(targets == labels)
    if len(same):
        raise errors.UserError(
            f"{len(same)} of {len(labels)} targets equal the label (the first at position {same[0]}): give each image another "
            "class to reach, for example (labels + 1) % classes."
        )


def check_model(
    model: evaluation.Model,
    images: Float[np.ndarray, "batch height width channels"],
    *,
    targets: Int[np.ndarray, " batch"] | None = None,
    mesh: Mesh | None = None,
) -> int:
    """Runs one batch up to three times and refuses a model that an attack would be wrong about. Three forward passes.

    Args:
      model: canonical pixels to logits.
      images: canonical pixels, in [0, 1]; of one, two copies are looked at.
      targets: the classes that a targeted attack is to reach.
      mesh: devices that share the batch.

    Returns:
      How many logits the model gives.

    Raises:
      errors.UserError: logits of another shape, not finite, or that are probabilities; answers that differ from pass to
        pass or with the neighbours in the batch; targets that the model predicts for most images as they are.
    """
    images = np.asarray(images, np.float32)
    images = np.concatenate([images, images]) if len(images) == 1 else images

    def ask(batch: np.ndarray) -> np.ndarray:
        given = meshes.put_global(mesh, (batch, np.arange(len(batch), dtype=np.uint32)))
        return np.asarray(meshes.fetch(_answers(model, *given)), np.float64)

    logits = ask(images)
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise errors.UserError(
            f"the model gives shape {logits.shape} for {len(images)} images: expected logits [{len(images)}, classes], of two "
            "classes at least."
        )
    if not np.isfinite(logits).all():
        broken = int((~np.isfinite(logits)).any(axis=1).sum())
        raise errors.UserError(
            f"the model gives NaN or infinite logits for {broken} of {len(images)} images: check its weights, its normalisation "
            "and the precision that it computes in."
        )
    if are_probabilities(logits):
        raise errors.UserError(
            "the model gives probabilities (rows in [0, 1] that sum to 1): hand over the logits before the softmax, whose "
            "gradient vanishes where the model is sure."
        )
    if difference(logits, ask(images)).max() > SAME:
        raise errors.UserError(
            "the model gives other logits in a second pass over the same images: switch dropout off (train=False); if the "
            "defence is random by design, give a model with stochastic=True and sample(images, keys), which attacks average over."
        )
    half = (len(images) + 1) // 2
    beside = np.concatenate([images[:half], 1.0 - images[half:]])
    if difference(logits, ask(beside))[:half].max() > ALIKE:
        raise errors.UserError(
            "the model's logits of an image depend on the other images of the batch: it is in training mode (BatchNorm over the "
            "batch); evaluate it with its stored statistics (train=False)."
        )
    if targets is not None and len(targets) >= 4:
        reached = float(np.mean(logits.argmax(axis=1)[: len(targets)] == np.asarray(targets)))
        if reached > 0.5:
            raise errors.UserError(
                f"the model gives {reached:.0%} of the images the class that the attack is to reach as they are: targets look "
                "like the labels; give each image another class, for example (labels + 1) % classes."
            )
    return logits.shape[1]


def check_once(
    model: evaluation.Model, images: Float[Array, "batch height width channels"], *, mesh: Mesh | None = None
) -> None:
    """`check_model` of a model that it has not passed yet, on a third of the images, so that it costs one forward pass of them.

    A model is known again by its structure and by its arrays, the same objects. Tracers pass, and so does what several processes
    hold in parts: `robust_vit.attacks.run` looks at those.

    Args:
      model: canonical pixels to logits.
      images: canonical pixels, in [0, 1]; at most `LOOKED_AT` of them are looked at.
      mesh: devices that share the images, all of which are looked at then.

    Raises:
      errors.UserError: what `check_model` refuses.
    """
    leaves, structure = jax.tree.flatten(model)
    if any(
        isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "is_fully_addressable", True)
        for leaf in (*leaves, images)
    ):
        return
    name = structure, tuple(leaf if isinstance(leaf, _NUMBERS) else id(leaf) for leaf in leaves)
    arrays = [leaf for leaf in leaves if not isinstance(leaf, _NUMBERS)]
    # The number of an array that is gone may be that of another one.
    if name in _passed and all(holds() is array for holds, array in zip(_passed[name], arrays, strict=True)):
        return
    count = len(images) if mesh is not None else max(2, min(len(images) // 3, LOOKED_AT))
    check_model(model, np.asarray(images[:count]), mesh=mesh)
    _passed.pop(name, None)
    _passed[name] = [weakref.ref(array) for array in arrays]
    if len(_passed) > REMEMBERED:
        del _passed[next(iter(_passed))]


def check_losses(losses: Float[Array, " batch"]) -> None:
    """Refuses losses that are not finite: what was found on such logits is no success. Tracers pass."""
    if isinstance(losses, jax.core.Tracer):
        return
    broken = int(_count_broken(losses))
    if broken:
        raise errors.UserError(
            f"the model's loss is not finite on {broken} of {len(losses)} attacked images: check the weights, and the precision "
            "that the model computes in."
        )


def check_inputs(
    model: evaluation.Model,
    images: Float[np.ndarray, "batch height width channels"],
    labels: Int[np.ndarray, " batch"],
    targets: Int[np.ndarray, " batch"] | None = None,
    *,
    mesh: Mesh | None = None,
) -> int:
    """Everything that would make an evaluation silently wrong, refused before any step is taken. Three forward passes.

    Args:
      model: canonical pixels to logits.
      images: pixels; wrong are those outside [0, 1], already normalised, NaN, or whole numbers up to 255.
      labels: class indices `[batch]`; wrong are one-hot rows, floats, and indices that the model has no logit for.
      targets: the classes that a targeted attack is to reach.
      mesh: devices that share the batch.

    Returns:
      How many logits the model gives.

    Raises:
      errors.UserError: in one line: what was given, what is expected, what to do. The model's part is that of `check_model`.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    check_values(model, images, labels)
    if targets is not None:
        check_targets(targets, labels)
    return check_model(model, images, targets=targets, mesh=mesh)


def are_probabilities(logits: Float[np.ndarray, "batch classes"]) -> bool:
    """Whether rows are in [0, 1] and sum to one."""
    logits = np.asarray(logits, np.float64)
    return bool(logits.min() >= -SUMS and np.allclose(logits.sum(axis=1), 1.0, atol=SUMS))


def difference(first: Float[np.ndarray, "batch classes"], second: Float[np.ndarray, "batch classes"]) -> np.ndarray:
    """`[batch]`: the L2 distance of two answers, relative to the first."""
    return np.linalg.norm(second - first, axis=1) / (np.linalg.norm(first, axis=1) + 1e-10)


@jax.jit
def _answers(model: evaluation.Model, images: jax.Array, rows: jax.Array) -> jax.Array:
    # An example's draws are its own: of a model that declares itself random, the same in every pass.
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), rows)
    return evaluation.logits(model, images, keys)


@jax.jit
def _count_broken(losses: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(losses))


@jax.jit
def _extent(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    return jnp.min(images), jnp.max(images), jnp.min(labels), jnp.max(labels)


def _extent_on_host(images: np.ndarray, labels: np.ndarray) -> tuple[np.generic, ...]:
    return images.min(), images.max(), labels.min(), labels.max()


def _remedy(low: float, high: float) -> str:
    if np.isnan(low) or np.isnan(high):
        return "they hold NaN: look at what made them"
    if low >= 0:
        return "divide by 255" if high <= 255 else "scale them"
    return "they look normalised already: undo it, and put the normalisation inside the model, or no epsilon means what it says"


def _check_images(images: Any) -> None:
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise errors.UserError(
            f"images are {_describe(images)}: expected floating point [batch, height, width, channels] in [0, 1]; divide "
            "uint8 by 255."
        )


def _check_labels(labels: Any, batch: int) -> None:
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        remedy = "; give the argmax of one-hot rows" if labels.ndim == 2 else ""
        raise errors.UserError(
            f"labels are {_describe(labels)}: expected one class index an image, class indices ({batch},){remedy}."
        )


def _describe(array: Any) -> str:
    return f"{getattr(array, 'dtype', type(array).__name__)} {tuple(getattr(array, 'shape', ()))}"
