"""Weights under torch names and layouts, turned into this library's variables. Arrays in, arrays out: torch is not needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from robust_vit import errors

PyTree = Any
_LISTED = 6


def _linear(weight: np.ndarray) -> np.ndarray:
    return weight.T


def _convolution(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0)


def _patches(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _same(weight: np.ndarray) -> np.ndarray:
    return weight


def _table(weight: np.ndarray) -> np.ndarray:
    return weight[0]


# Layers of one kind: torch parameter name -> (collection, this library's parameter name, change of layout).
_DENSE = {"weight": ("params", "kernel", _linear), "bias": ("params", "bias", _same)}
_PATCHES = {"weight": ("params", "kernel", _patches), "bias": ("params", "bias", _same)}
_CONVOLUTION = {"weight": ("params", "kernel", _convolution)}
_LAYER_NORM = {"weight": ("params", "scale", _same), "bias": ("params", "bias", _same)}
_BATCH_NORM = {
    **_LAYER_NORM,
    "running_mean": ("batch_stats", "mean", _same),
    "running_var": ("batch_stats", "var", _same),
}

# For each layout: (pattern of a torch module, format of this library's path, kind). Groups are numbers of blocks or stages; the
# first match wins.
_TIMM_VIT = (
    (r"patch_embed\.proj", "embedding", _PATCHES),
    (r"blocks\.(\d+)\.norm1", "block{0:02d}/attention_norm", _LAYER_NORM),
    (r"blocks\.(\d+)\.norm2", "block{0:02d}/mlp_norm", _LAYER_NORM),
    (r"blocks\.(\d+)\.attn\.qkv", "block{0:02d}/query_key_value", _DENSE),
    (r"blocks\.(\d+)\.attn\.proj", "block{0:02d}/project", _DENSE),
    (r"blocks\.(\d+)\.mlp\.fc1", "block{0:02d}/mlp/expand", _DENSE),
    (r"blocks\.(\d+)\.mlp\.fc2", "block{0:02d}/mlp/contract", _DENSE),
    (r"blocks\.(\d+)\.ls1", "block{0:02d}", {"gamma": ("params", "attention_scale", _same)}),
    (r"blocks\.(\d+)\.ls2", "block{0:02d}", {"gamma": ("params", "mlp_scale", _same)}),
    (r"norm", "norm", _LAYER_NORM),
    (r"head", "head", _DENSE),
    (r"", "", {"cls_token": ("params", "class_token", _same), "pos_embed": ("params", "position", _table)}),
)
_HUGGINGFACE_VIT = (
    (r"vit\.embeddings\.patch_embeddings\.projection", "embedding", _PATCHES),
    (
        r"vit\.embeddings",
        "",
        {"cls_token": ("params", "class_token", _same), "position_embeddings": ("params", "position", _table)},
    ),
    (r"vit\.(?:encoder\.layer|layers)\.(\d+)\.layernorm_before", "block{0:02d}/attention_norm", _LAYER_NORM),
    (r"vit\.(?:encoder\.layer|layers)\.(\d+)\.layernorm_after", "block{0:02d}/mlp_norm", _LAYER_NORM),
    (r"vit\.encoder\.layer\.(\d+)\.attention\.attention\.query", "block{0:02d}/query", _DENSE),
    (r"vit\.encoder\.layer\.(\d+)\.attention\.attention\.key", "block{0:02d}/key", _DENSE),
    (r"vit\.encoder\.layer\.(\d+)\.attention\.attention\.value", "block{0:02d}/value", _DENSE),
    (r"vit\.encoder\.layer\.(\d+)\.attention\.output\.dense", "block{0:02d}/project", _DENSE),
    (r"vit\.encoder\.layer\.(\d+)\.intermediate\.dense", "block{0:02d}/mlp/expand", _DENSE),
    (r"vit\.encoder\.layer\.(\d+)\.output\.dense", "block{0:02d}/mlp/contract", _DENSE),
    (r"vit\.layers\.(\d+)\.attention\.q_proj", "block{0:02d}/query", _DENSE),
    (r"vit\.layers\.(\d+)\.attention\.k_proj", "block{0:02d}/key", _DENSE),
    (r"vit\.layers\.(\d+)\.attention\.v_proj", "block{0:02d}/value", _DENSE),
    (r"vit\.layers\.(\d+)\.attention\.o_proj", "block{0:02d}/project", _DENSE),
    (r"vit\.layers\.(\d+)\.mlp\.fc1", "block{0:02d}/mlp/expand", _DENSE),
    (r"vit\.layers\.(\d+)\.mlp\.fc2", "block{0:02d}/mlp/contract", _DENSE),
    (r"vit\.layernorm", "norm", _LAYER_NORM),
    (r"classifier", "head", _DENSE),
)
# torchvision's names; Y. Idelbayev's CIFAR networks differ by `linear` for `fc`.
_TORCHVISION_RESNET = (
    (r"conv1", "stem", _CONVOLUTION),
    (r"bn1", "stem_norm", _BATCH_NORM),
    (r"layer(\d+)\.(\d+)\.conv(\d+)", "stage{0}_block{1:02d}/convolution{2}", _CONVOLUTION),
    (r"layer(\d+)\.(\d+)\.bn(\d+)", "stage{0}_block{1:02d}/norm{2}", _BATCH_NORM),
    (r"layer(\d+)\.(\d+)\.downsample\.0", "stage{0}_block{1:02d}/shortcut", _CONVOLUTION),
    (r"layer(\d+)\.(\d+)\.downsample\.1", "stage{0}_block{1:02d}/shortcut_norm", _BATCH_NORM),
    (r"fc|linear", "head", _DENSE),
)
_HUGGINGFACE_RESNET = (
    (r"resnet\.embedder\.embedder\.convolution", "stem", _CONVOLUTION),
    (r"resnet\.embedder\.embedder\.normalization", "stem_norm", _BATCH_NORM),
    (
        r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution",
        "stage{0}_block{1:02d}/convolution{2}",
        _CONVOLUTION,
    ),
    (
        r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization",
        "stage{0}_block{1:02d}/norm{2}",
        _BATCH_NORM,
    ),
    (
        r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution",
        "stage{0}_block{1:02d}/shortcut",
        _CONVOLUTION,
    ),
    (
        r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization",
        "stage{0}_block{1:02d}/shortcut_norm",
        _BATCH_NORM,
    ),
    (r"classifier\.1", "head", _DENSE),
)
LAYOUTS = {
    "timm_vit": _TIMM_VIT,
    "huggingface_vit": _HUGGINGFACE_VIT,
    "torchvision_resnet": _TORCHVISION_RESNET,
    "huggingface_resnet": _HUGGINGFACE_RESNET,
}
# One name that each layout has and no other.
_SIGNS = {
    "patch_embed.proj.weight": "timm_vit",
    "vit.embeddings.patch_embeddings.projection.weight": "huggingface_vit",
    "layer1.0.conv1.weight": "torchvision_resnet",
    "resnet.embedder.embedder.convolution.weight": "huggingface_resnet",
}
# Groups of these layouts count from 0 where this library counts from 1: (groups to add one to).
_FROM_ZERO = {"huggingface_resnet": (0, 2)}
# Of no use for logits.
_UNUSED = re.compile(r"num_batches_tracked$|^vit\.pooler\.")


def recognise(names: Iterable[str]) -> str | None:
    """The layout of tensors with these names, a key of `LAYOUTS`, or None where they are not torch's."""
    plain = {_plain(name) for name in names}
    return next((layout for sign, layout in _SIGNS.items() if sign in plain), None)


def from_torch(arrays: Mapping[str, np.ndarray], *, layout: str) -> PyTree:
    """Variable collections of a loop ViT or a ResNet, from the arrays of a torch state dictionary.

    Args:
      arrays: torch names to arrays of torch's layout (convolutions out, in, height, width; dense layers out, in).
      layout: a key of `LAYOUTS`.

    Raises:
      errors.UserError: an unknown layout, or names that it does not have; the first of them are listed.
    """
    if layout not in LAYOUTS:
        raise errors.unknown("weight layout", layout, LAYOUTS)
    flat: dict[str, np.ndarray] = {}
    strange = []
    for name, value in arrays.items():
        if _UNUSED.search(_plain(name)):
            continue
        found = _translate(_plain(name), layout)
        if found is None:
            strange.append(name)
        else:
            path, change = found
            flat[path] = np.ascontiguousarray(change(np.asarray(value, np.float32)))
    if strange:
        raise errors.UserError(
            f"{len(strange)} tensors have names that the layout {layout} does not know: {', '.join(strange[:_LISTED])}. "
            "Remove them, or rename them to that layout."
        )
    return flax.traverse_util.unflatten_dict(_fused(flat), sep="/")


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def _translate(name: str, layout: str) -> tuple[str, Callable[[np.ndarray], np.ndarray]] | None:
    module, _, parameter = name.rpartition(".")
    for pattern, path, kind in LAYOUTS[layout]:
        match = re.fullmatch(pattern, module)
        if match and parameter in kind:
            one_more = _FROM_ZERO.get(layout, ())
            groups = [int(group) + (index in one_more) for index, group in enumerate(match.groups())]
            collection, own, change = kind[parameter]
            return "/".join(part for part in (collection, path.format(*groups), own) if part), change
    return None


def _fused(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Query, key and value, where they are apart, side by side in one projection."""
    fused = dict(flat)
    for path in flat:
        match = re.fullmatch(r"(.*)/query/(kernel|bias)", path)
        if match:
            parts = [fused.pop(f"{match[1]}/{part}/{match[2]}") for part in ("query", "key", "value")]
            fused[f"{match[1]}/query_key_value/{match[2]}"] = np.concatenate(parts, axis=-1)
    return fused
