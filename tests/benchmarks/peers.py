"""The torch side of `throughput.py`: a process of its own, idle while the other side runs.

It reads one JSON request a line and answers with one JSON line. Torch and `transformers` are imported here only, so this file
may run in another environment than JAX's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers

ATTENTIONS = ("eager", "sdpa")


class _Shortcut(torch.nn.Module):
    """Option A of He et al. 2016: every second pixel, zeros for the new channels."""

    def __init__(self, missing: int):
        super().__init__()
        self.missing = missing

    def forward(self, x):
        half = self.missing // 2
        return torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.missing - half))


class _Block(torch.nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1 = torch.nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(after)
        self.conv2 = torch.nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(after)
        self.shortcut = torch.nn.Identity() if stride == 1 else _Shortcut(after - before)

    def forward(self, x):
        branch = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(branch)) + self.shortcut(x))


class ResNet20(torch.nn.Module):
    """ResNet-20 for 32 px (He et al. 2016, section 4.2), under the names of Y. Idelbayev's weights."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        for stage, (before, after) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            blocks = [_Block(before, after), _Block(after, after), _Block(after, after)]
            setattr(self, f"layer{stage}", torch.nn.Sequential(*blocks))
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


class _Logits(torch.nn.Module):
    """A model of `transformers` that answers with the logits alone."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images).logits


def vit(attention: str, *, width: int, depth: int, heads: int, mlp_width: int, patch: int, size: int, classes: int):
    """`transformers`' ViT with random weights of which none is zero."""
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp_width,
        image_size=size,
        patch_size=patch,
        num_labels=classes,
        layer_norm_eps=1e-6,
        attn_implementation=attention,
    )
    network = transformers.ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.parameters():
            scale = 0.1 if tensor.ndim < 2 else float(np.prod(tensor.shape[1:])) ** -0.5
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    return network.eval()


class Peer:
    """The models of one row, and its four passes."""

    def __init__(self, model: str, given: dict, images: str, labels: str, weights: str):
        self.images = torch.from_numpy(np.load(images).transpose(0, 3, 1, 2).copy())
        self.labels = torch.from_numpy(np.load(labels)).long()
        if model == "resnet":
            network = ResNet20().eval()
            if os.path.exists(weights):
                arrays = np.load(weights)
                state = {name.removeprefix("module."): torch.from_numpy(arrays[name]) for name in arrays.files}
                network.load_state_dict(state, strict=False)
            else:
                np.savez(weights, **{name: tensor.numpy() for name, tensor in network.state_dict().items()})
            self.networks = {"": network}
            return
        networks = {name: vit(name, **given) for name in ATTENTIONS}
        networks["sdpa"].load_state_dict(networks["eager"].state_dict())
        np.savez(weights, **{name: tensor.numpy() for name, tensor in networks["eager"].state_dict().items()})
        self.networks = {name: _Logits(network) for name, network in networks.items()}

    def logits(self, name: str) -> np.ndarray:
        """Logits of the row's images."""
        with torch.inference_mode():
            return self.networks[name](self.images).numpy()

    def runner(self, variant: str, name: str, size: int | None) -> Callable[[], object]:
        """A pass over the whole batch, or over a slice of `size` images after the other, results joined or summed."""
        network = self.networks[variant]
        network.requires_grad_(name == "parameter_gradient")
        one = getattr(self, name)(network)
        if size is None:
            return lambda: one(self.images, self.labels)
        parts = list(zip(self.images.split(size), self.labels.split(size), strict=True))

        def sliced():
            found = [one(images, labels) for images, labels in parts]
            if name in ("forward", "input_gradient"):
                return torch.cat(found)
            return [sum(leaves[1:], start=leaves[0]) for leaves in zip(*found, strict=True)]

        return sliced

    def forward(self, network: torch.nn.Module) -> Callable:
        """Logits."""

        def run(images, labels):
            with torch.inference_mode():
                return network(images)

        return run

    def input_gradient(self, network: torch.nn.Module) -> Callable:
        """The gradient in the images."""

        def run(images, labels):
            images = images.clone().requires_grad_()
            return torch.autograd.grad(_loss(network(images), labels), images)[0]

        return run

    def parameter_gradient(self, network: torch.nn.Module) -> Callable:
        """The gradient in the parameters."""
        leaves = list(network.parameters())
        return lambda images, labels: torch.autograd.grad(_loss(network(images), labels), leaves)

    def hvp(self, network: torch.nn.Module) -> Callable:
        """The Hessian times a vector, forward over reverse."""
        parameters = {key: value.detach() for key, value in network.named_parameters()}
        buffers = dict(network.named_buffers())
        generator = torch.Generator().manual_seed(1)
        vector = {key: torch.randn(value.shape, generator=generator) for key, value in parameters.items()}

        def run(images, labels):
            def loss(values):
                return _loss(torch.func.functional_call(network, (values, buffers), (images,)), labels)

            return list(torch.func.jvp(torch.func.grad(loss), (parameters,), (vector,))[1].values())

        return run


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def _seconds(function: Callable[[], object], calls: int) -> list[float]:
    found = []
    for _ in range(calls):
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return found


def _answer(request: dict, peers: dict) -> dict:
    if request["do"] == "version":
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if request["do"] == "build":
        peers["row"] = Peer(*(request[key] for key in ("model", "given", "images", "labels", "weights")))
        return {"variants": list(peers["row"].networks)}
    peer = peers["row"]
    if request["do"] == "logits":
        return {"logits": peer.logits(request["variant"]).tolist()}
    try:
        run = peer.runner(request["variant"], request["pass"], request["slice"])
        return {"seconds": _seconds(run, request["calls"])}
    except (RuntimeError, NotImplementedError) as error:  # A fused kernel without the derivative that is asked for.
        return {"error": str(error).splitlines()[0]}


def main() -> None:
    """Answers requests until the input ends."""
    peers: dict = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), peers)), file=answers, flush=True)


if __name__ == "__main__":
    main()
