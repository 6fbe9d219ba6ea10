"""Travel to the decision boundary: how far an image goes along one direction before the model gives it another class."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit import classifier, errors, losses
from robust_vit import mesh as meshes
from robust_vit import programs as compiled
from robust_vit.attacks import evaluation, norms

HALVINGS = 24  # Of a bracket of 1e-3: it ends below 1e-10.
_JUMP = 0x6A756D70  # "jump": keeps the draws of a random direction apart from those of the model.


class Travel(NamedTuple):
    """Where each image first met the boundary.

    Attributes:
      epsilon: length of travel in units of the direction, upper end of the last bracket; 0 where the image had another class
        to begin with, and the limit where no boundary was met (censored: the length is at least that).
      crossed: whether a boundary was met.
      forward_passes: that the search needed for the image.
      executed: forward passes of one image that were computed for the batch, idle rows included.
    """

    epsilon: Float[np.ndarray, " batch"]
    crossed: Bool[np.ndarray, " batch"]
    forward_passes: Int[np.ndarray, " batch"]
    executed: int


def normalise(directions: Float[Array, "batch height width channels"]) -> jax.Array:
    """Directions with ||d||_2 = sqrt(D), D pixels and channels, so that epsilon is the root mean square change of a pixel."""
    return norms.L2.ascend(directions) * np.sqrt(directions[0].size).astype(directions.dtype)


@jax.jit
def gradient_directions(
    model: evaluation.Model, keys: Key[Array, " batch"], images: jax.Array, labels: Int[Array, " batch"]
) -> tuple[Float[Array, "batch height width channels"], Bool[Array, " batch"]]:
    """The FGSM direction of each image, and whether its gradient vanished. One forward and backward pass, in float32.

    The sign of the cross-entropy's gradient in the pixels, with ||d||_2 = sqrt(D): where a pixel has no gradient, the others
    go a little further than 1. Kim et al. 2022, arXiv 2210.05742.
    """
    with jax.default_matmul_precision("highest"):
        found = evaluation.ascent(losses.cross_entropy, classifier.in_float32(model), images, keys, labels)
    return normalise(jnp.sign(found.gradients)), found.vanished


@jax.jit
def random_directions(keys: Key[Array, " batch"], images: jax.Array) -> Float[Array, "batch height width channels"]:
    """A direction an image, uniform on the sphere ||d||_2 = sqrt(D); `keys` are random."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, _JUMP))(keys)
    return normalise(jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys))


@functools.partial(jax.jit, static_argnames="clip")
def move(images: jax.Array, directions: jax.Array, sizes: Float[Array, " batch"], *, clip: bool = True) -> jax.Array:
    """Images moved by a size each along their directions, and put back into [0, 1] where `clip` says so."""
    moved = images + jnp.asarray(sizes, images.dtype).reshape(-1, *(1,) * (images.ndim - 1)) * directions
    return jnp.clip(moved, 0.0, 1.0) if clip else moved


@functools.partial(jax.jit, static_argnums=0)
def _holds(
    clip: bool,
    model: evaluation.Model,
    keys: Key[Array, " batch"],
    images: jax.Array,
    directions: jax.Array,
    labels: jax.Array,
    rows: Int[Array, " rows"],
    sizes: Float[Array, " rows"],
) -> Bool[Array, " rows"]:
    """Whether the model in float32 gives image `rows[i]`, moved by `sizes[i]`, its label. One forward pass a row."""
    moved = move(images[rows], directions[rows], sizes, clip=clip)
    with jax.default_matmul_precision("highest"):
        # The same draws at every size: along its ray a stochastic model is one function.
        logits = evaluation.logits(classifier.in_float32(model), moved, keys[rows])
    return jnp.argmax(logits, axis=-1) == labels[rows]


def search(
    model: evaluation.Model,
    keys: Key[Array, " batch"],
    images: Float[Array, "batch height width channels"],
    directions: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    *,
    stride: float = 1e-3,
    limit: float = 1.0,
    halvings: int = HALVINGS,
    clip: bool = True,
    mesh: Mesh | None = None,
) -> Travel:
    """The first size at which each image loses its label, by a scan and then by halving the bracket.

    The first crossing that the stride shows, not the smallest there is: a class left and found again between two points of the
    scan is not seen. Kim et al. 2022, arXiv 2210.05742, and the first author's search (github.com/yupeeee/WAH, travel.py):
    stride 1e-3, halved until below 1e-10. Pixels are float32, so what lies below 1e-7 is the arithmetic's, not the model's.

    A host loop over one compiled call of `batch` rows, each an image at a size: images that have crossed leave their rows to
    the others, which then look at several points at once. Cost: about epsilon / stride + halvings + 1 forward passes an image,
    (limit / stride) + halvings + 1 at most.

    Args:
      model: canonical pixels to logits.
      keys: one typed key an example, for a stochastic model.
      images: canonical pixels.
      directions: one an image; `normalise` gives them the length that epsilon is measured in.
      labels: the class to lose.
      stride: between the points of the scan.
      limit: end of the scan.
      halvings: of the bracket.
      clip: put moved images back into [0, 1].
      mesh: the devices that share the rows of a call.

    Raises:
      errors.UserError: a stride or limit that makes no scan.
    """
    if not 0 < stride <= limit or halvings < 0:
        raise errors.UserError(
            f"stride is {stride}, limit {limit} and halvings {halvings}: expected 0 < stride <= limit and halvings from 0."
        )
    batch, points = len(images), round(limit / stride)
    calls = 0

    def ask(rows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        placed = meshes.put_global(mesh, (rows.astype(np.int32), sizes.astype(images.dtype)))
        return meshes.fetch(_holds(clip, model, keys, images, directions, labels, *placed))

    every = np.arange(batch)
    wrong = ~ask(every, np.zeros(batch))
    passed, crossing = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    while True:
        left = np.flatnonzero(~wrong & (crossing == 0) & (passed < points))
        if not len(left):
            break
        width = batch // len(left)
        steps = passed[left, None] + 1 + np.arange(width)
        rows = np.resize(np.repeat(left, width), batch)
        kept = ask(rows, np.resize(np.minimum(steps, points).ravel(), batch) * stride)[: steps.size].reshape(
            steps.shape
        )
        lost = ~kept & (steps <= points)
        crossing[left] = np.where(lost.any(axis=1), np.take_along_axis(steps, lost.argmax(axis=1)[:, None], 1)[:, 0], 0)
        passed[left] = steps[:, -1]
    found = crossing > 0
    low, high = (crossing - 1) * stride, crossing * stride
    for _ in range(halvings if found.any() else 0):
        middle = 0.5 * (low + high)
        kept = ask(every, np.where(found, middle, 0.0))
        low, high = np.where(kept, middle, low), np.where(kept, high, middle)
    return Travel(
        epsilon=np.where(found, high, np.where(wrong, 0.0, points * stride)),
        crossed=found | wrong,
        forward_passes=1 + np.where(wrong, 0, np.where(found, crossing + halvings, points)),
        executed=calls * batch,
    )


def most_passes(stride: float, limit: float, halvings: int = HALVINGS) -> int:
    """Forward passes that `search` takes at most of an image: those of one that meets the boundary at the very end."""
    return 1 + round(limit / stride) + halvings


def programs(
    model: evaluation.Model, images: jax.ShapeDtypeStruct, *, stride: float, limit: float, clip: bool
) -> list[compiled.Program]:
    """The compiled programs of `gradient_directions` and `search`, the latter as often as it runs at most, for planning."""
    keys, labels = jax.eval_shape(
        lambda x: (jax.random.split(jax.random.key(0), len(x)), jnp.zeros(len(x), jnp.int32)), images
    )
    keys, labels, sizes = (
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=images.sharding)
        for leaf in (keys, labels, jax.ShapeDtypeStruct(labels.shape, images.dtype))
    )
    return [
        compiled.Program("direction", gradient_directions, (model, keys, images, labels)),
        compiled.Program(
            "scan",
            _holds,
            (model, keys, images, images, labels, labels, sizes),
            times=most_passes(stride, limit),
            static=(clip,),
        ),
    ]
