"""Trained models and exact CIFAR-10 images of the data folder, for benchmarks and parity."""

from __future__ import annotations

import pathlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import classifier, data, models
from robust_vit.models import attention

HEADS, LAYERS = 8, 6


@flax.struct.dataclass
class PostNormViT(classifier.Wrapped):
    """The post-norm ViT, which names the normed class token before its head."""

    def features(self, images: jax.Array, gates: None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits and `pre_logits` `[batch, 128]`."""
        if gates is not None:
            raise ValueError("this model has no gates")
        token = _class_token(self.variables, images)
        return _logits(self.variables, token), {"pre_logits": token}


def images(folder: pathlib.Path | str, *, rows: int) -> dict[str, np.ndarray]:
    """The exact CIFAR-10 test images with `row < rows` as canonical pixels: `image`, `label`, `row`."""
    source = data.open_source("cifar10_exact", split="test", data_dir=pathlib.Path(folder) / "tfds")
    examples = [source[index] for index in range(len(source))]
    found = {
        "image": np.stack([example["image"] for example in examples]).astype(np.float32) / 255,
        "label": np.asarray([example["label"] for example in examples], np.int32),
        "row": np.asarray([example["row"] for example in examples], np.int32),
    }
    return {name: array[found["row"] < rows] for name, array in found.items()}


def resnet20(folder: pathlib.Path | str) -> classifier.Classifier:
    """The ResNet-20 of Y. Idelbayev, 91.64 % on the 1,017 exact test images."""
    spec = classifier.ImageSpec(size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    module = models.build("resnet", num_classes=10, depth=20)
    fresh = jax.eval_shape(lambda key: models.init(module, spec, key), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), fresh)
    path = pathlib.Path(folder) / "weights" / "resnet20-12fca82f.npz"
    return classifier.Classifier(models.load_weights(path, zeros), module, spec)


def vit(folder: pathlib.Path | str) -> PostNormViT:
    """The post-norm ViT of smmk47 (patch 4, width 128, depth 6), 70.89 % on the 1,017 exact test images."""
    arrays = np.load(pathlib.Path(folder) / "weights" / "smmk47_vit_cifar10.npz")
    weights = {name: jnp.asarray(arrays[name]) for name in arrays.files}
    # Matrices as `x @ kernel` takes them.
    weights = {name: value.T if value.ndim == 2 else value for name, value in weights.items()}
    return PostNormViT(variables=weights, apply=_vit)


def _vit(weights, pixels):
    return _logits(weights, _class_token(weights, pixels))


def _logits(weights, token):
    return token @ weights["mlp_head.1.weight"] + weights["mlp_head.1.bias"][None]


def _class_token(weights, pixels):
    mean, std = jnp.asarray([0.4914, 0.4822, 0.4465]), jnp.asarray([0.2023, 0.1994, 0.2010])
    pixels = (pixels - mean[None, None, None]) / std[None, None, None]
    count, side = pixels.shape[0], pixels.shape[1] // 4
    patches = pixels.reshape(count, side, 4, side, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(count, side * side, 48)
    kernel = weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0).reshape(48, -1)
    tokens = patches @ kernel + weights["patch_embed.proj.bias"][None, None]
    width = tokens.shape[-1]
    tokens = jnp.concatenate([jnp.broadcast_to(weights["cls_token"], (count, 1, width)), tokens], axis=1)
    tokens = tokens + weights["pos_embed"]
    for layer in range(LAYERS):
        name = f"transformer.layers.{layer}."
        # What the last layer makes of the patches, no logit reads.
        asking = tokens[:, :1] if layer == LAYERS - 1 else tokens
        mixed = _attention(asking, tokens, weights, name + "self_attn.")
        tokens = _layer_norm(asking + mixed, weights, name + "norm1.")
        hidden = jax.nn.relu(_dense(tokens, weights, name + "linear1."))
        tokens = _layer_norm(tokens + _dense(hidden, weights, name + "linear2."), weights, name + "norm2.")
    return _layer_norm(tokens, weights, "mlp_head.0.")[:, 0]


def _dense(tokens, weights, name):
    return tokens @ weights[name + "weight"] + weights[name + "bias"][None, None]


def _layer_norm(tokens, weights, name):
    centered = tokens - tokens.mean(axis=-1, keepdims=True)
    scaled = centered * jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-5)
    return scaled * weights[name + "weight"][None, None] + weights[name + "bias"][None, None]


def _attention(asking, tokens, weights, name):
    width = tokens.shape[-1]
    kernel, bias = weights[name + "in_proj_weight"], weights[name + "in_proj_bias"]
    if asking is tokens:
        query, key, value = jnp.split(tokens @ kernel + bias[None, None], 3, axis=-1)
    else:
        query = asking @ kernel[:, :width] + bias[None, None, :width]
        key, value = jnp.split(tokens @ kernel[:, width:] + bias[None, None, width:], 2, axis=-1)
    parts = (part.reshape(*part.shape[:2], HEADS, -1).swapaxes(1, 2) for part in (query, key, value))
    mixed, _ = attention.attend(*parts)
    return _dense(mixed.swapaxes(1, 2).reshape(asking.shape), weights, name + "out_proj.")
