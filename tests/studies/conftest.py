"""Subjects for the tests of studies: a linear model on real images, streams in memory, no training."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, studies

# Studies whose programs take longest to compile: `-m slow` runs what holds of every study for them.
LONGEST = {
    "auto_attack",
    "boundary_travel",
    "certificate",
    "input_curvature",
    "patch_attack",
    "physical_attack",
    "sharpness",
    "spatial_attack",
}


def each_study() -> list:
    """The parameters of a test of every study."""
    return [pytest.param(name, marks=pytest.mark.slow if name in LONGEST else ()) for name in sorted(studies.STUDIES)]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """An evaluation stream over arrays in memory, with the ragged last batch padded and masked."""

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    size: int = 64

    def with_batch(self, batch, limit=None):
        return dataclasses.replace(
            self, images=self.images[:limit], labels=self.labels[:limit], rows=self.rows[:limit], size=batch
        )

    @property
    def num_examples(self):
        return len(self.rows)

    def __len__(self):
        return -(-len(self.rows) // self.size)

    def batch(self, index):
        chosen = np.arange(index * self.size, (index + 1) * self.size)
        mask = chosen < len(self.rows)
        chosen = np.where(mask, chosen, 0)
        image = self.images[chosen]
        image[~mask] = np.nan  # Whatever reads padding is found out.
        return {"image": image, "label": self.labels[chosen], "row": self.rows[chosen], "mask": mask}


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """A training stream over arrays in memory."""

    images: np.ndarray
    labels: np.ndarray
    batch_size: int = 16

    def with_batch(self, batch):
        return dataclasses.replace(self, batch_size=batch)

    def batch(self, step):
        chosen = (np.arange(self.batch_size) + step * self.batch_size) % len(self.labels)
        mask = np.ones(len(chosen), bool)
        return {
            "image": self.images[chosen],
            "label": self.labels[chosen],
            "row": chosen.astype(np.int32),
            "mask": mask,
        }


def linear(variables, images):
    """A linear classifier of flat pixels."""
    return images.reshape(images.shape[0], -1) @ variables["kernel"] + variables["bias"][None, :]


def make_stream(images, labels):
    return Stream(images.astype(np.float32), labels.astype(np.int32), np.arange(len(labels), dtype=np.int32))


@pytest.fixture
def subject():
    """A linear model of three classes on blurred noise, about 80 % right, with all streams."""
    return make_subject(seed=0)


def make_subject(*, seed=0, noise=0.25, examples=150, name="linear", scale=6.0):
    generator = np.random.default_rng(7)
    centers = generator.uniform(0.2, 0.8, (3, 6, 6, 1))
    labels = generator.integers(0, 3, 3 * examples)
    images = np.clip(centers[labels] + generator.normal(0.0, 0.45, (3 * examples, 6, 6, 1)), 0.0, 1.0)
    # The model is the centres' matched filter with some noise of its own: another seed is another model.
    kernel = (centers - centers.mean(axis=0)).reshape(3, -1).T
    kernel = kernel + noise * np.random.default_rng(seed).normal(0.0, kernel.std(), kernel.shape)
    flat = centers.reshape(3, -1)
    bias = -0.5 * np.diag(flat @ kernel) - 0.5 * (flat.mean(axis=0) @ kernel)
    variables = {"kernel": jnp.asarray(scale * kernel, jnp.float32), "bias": jnp.asarray(scale * bias, jnp.float32)}
    parts = [slice(i * examples, (i + 1) * examples) for i in range(3)]
    return studies.Subject(
        classifier=classifier.wrap(linear, variables),
        test=make_stream(images[parts[0]], labels[parts[0]]),
        validation=make_stream(images[parts[1]], labels[parts[1]]),
        train=Training(images[parts[2]].astype(np.float32), labels[parts[2]].astype(np.int32)),
        num_classes=3,
        class_names=("ash", "birch", "cedar"),
        name=name,
        image_source="blurred noise",
        threat="noise/linf-0.1",
        weight_decay=0.01,
    )


def linear_hessian(params, images):
    """The Hessian of the cross-entropy of `linear`, mean over images, in float64: `J' (diag p - pp') J`, bias first."""
    flat = np.asarray(images, np.float64).reshape(len(images), -1)
    logits = flat @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    total = 0.0
    for pixels, p in zip(flat, shares, strict=True):
        jacobian = np.kron(np.concatenate([[1.0], pixels])[None, :], np.eye(len(p)))
        total += jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian
    return total / len(flat)
