"""Logits and intermediates equal `transformers`' on the same random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import models
from robust_vit.models import transfer

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")


def _randomize(network):
    """Weights far from their initial values: norms and biases at work, running statistics not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                if "running_var" in name:
                    tensor.copy_(1.0 + 0.5 * torch.tanh(noise))
                elif tensor.ndim > 1:
                    tensor.copy_(noise / np.sqrt(np.prod(tensor.shape[1:])))
                else:
                    tensor.add_(0.3 * noise)
    return network.eval()


def _variables(network, module, shape):
    arrays = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    layout = transfer.recognise(arrays)
    variables = transfer.from_torch(arrays, layout=layout)
    expected = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)
    return variables


def _close(ours, theirs):
    theirs = theirs.detach().numpy()
    # The bound. Measured: 2e-6 of the largest.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def _images(size):
    return np.random.default_rng(1).standard_normal((3, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_vit(scan, qkv_bias):
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=7,
        qkv_bias=qkv_bias,
        layer_norm_eps=1e-6,
        attn_implementation="eager",
    )
    network = _randomize(transformers.ViTForImageClassification(config))
    given = {"width": 48, "depth": 3, "heads": 4, "mlp_width": 96, "patch": 8, "qkv_bias": qkv_bias}
    module = models.build("vit", num_classes=7, **given)
    images = _images(32)
    variables = _variables(network, module, images.shape)
    if scan:
        module, variables = models.build("vit", num_classes=7, **given, scan=True), models.stack_blocks(variables)
    logits, features = jax.jit(module.apply)(variables, images)
    with torch.no_grad():
        theirs = network(
            torch.from_numpy(images.transpose(0, 3, 1, 2)), output_hidden_states=True, output_attentions=True
        )
    _close(logits, theirs.logits)
    _close(features["stem"], theirs.hidden_states[0])
    for index in range(3):
        _close(features[f"block{index:02d}/attention_weights"], theirs.attentions[index])
    for index in range(2):
        _close(features[f"block{index:02d}/out"], theirs.hidden_states[index + 1])


@pytest.mark.parametrize(
    ("depth", "layer_type", "depths", "expansion"),
    [(18, "basic", [2, 2, 2, 2], 1), (50, "bottleneck", [3, 4, 6, 3], 4)],
)
def test_resnet(depth, layer_type, depths, expansion):
    width = 8
    config = transformers.ResNetConfig(
        embedding_size=width,
        hidden_sizes=[expansion * width * 2**stage for stage in range(4)],
        depths=depths,
        layer_type=layer_type,
        num_labels=7,
    )
    network = _randomize(transformers.ResNetForImageClassification(config))
    module = models.build("resnet", num_classes=7, depth=depth, width=width)
    images = _images(64)
    variables = _variables(network, module, images.shape)
    logits, features = jax.jit(module.apply)(variables, images)
    with torch.no_grad():
        theirs = network(torch.from_numpy(images.transpose(0, 3, 1, 2)), output_hidden_states=True)
    _close(logits, theirs.logits)
    for stage in range(1, 5):
        out = features[f"stage{stage}/block{depths[stage - 1] - 1:02d}/out"]
        _close(out.transpose(0, 3, 1, 2), theirs.hidden_states[stage])


def test_resnet_gradient_of_the_input():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7
    )
    network = _randomize(transformers.ResNetForImageClassification(config))
    module = models.build("resnet", num_classes=7, depth=18, width=8).clone(blocks=(1, 1))
    images = _images(32)
    variables = _variables(network, module, images.shape)
    ours = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(module.apply(variables, x)[0]))))(images)
    theirs = torch.from_numpy(images.transpose(0, 3, 1, 2)).requires_grad_()
    torch.sin(network(theirs).logits).sum().backward()
    _close(ours.transpose(0, 3, 1, 2), theirs.grad)
