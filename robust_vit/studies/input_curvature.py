"""Curvature in the input: how sharply does the loss bend in the pixels of each image, and how much do the logits stretch them?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from matplotlib import figure as matplotlib_figure

from robust_vit import attacks, curvature, errors, mesh, programs, tables
from robust_vit import classifier as classifiers
from robust_vit.curvature import per_example
from robust_vit.metrics import classification, statistics
from robust_vit.studies import forward, input_figures, study

_PURPOSE = 0x696E7075  # "inpu": keeps the starting vectors apart from every other draw under the same seed.
_CHECK_EVERY = 6  # Lanczos steps between two looks at which images have converged.
_FLOOR = 1e-12  # Of what a logarithm is taken: what is below is flat.
_PIECEWISE = 1e-3  # The softmax's share of all curvature this near to one: the network itself has none.
QUANTITIES = {
    "top": "largest eigenvalue λ₁",
    "bottom": "smallest eigenvalue",
    "gradient": "gradient norm",
    "jacobian": "Jacobian norm σ₁",
}


def loss(images: jax.Array, labels: jax.Array, model: Any) -> jax.Array:
    """Cross-entropy of each image in nats, accurate to the last digit of its derivatives where the model is sure and right.

    It is `softplus(a)`, a the log-sum-exp of the other logits less the true one. Written as a log-softmax, `1 - p` of an image
    with p near one is rounding, and so is its curvature below 1e-7 of that of the logits.
    """
    scores = logits(images, model)
    is_true = jax.nn.one_hot(labels, scores.shape[-1], dtype=bool)
    true = jnp.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]
    others = jax.nn.logsumexp(scores, axis=-1, where=~is_true)
    return jax.nn.softplus(others - true)


def logits(images: jax.Array, model: Any) -> jax.Array:
    """The logits `[batch, classes]`."""
    found = model(images)
    return found.astype(jnp.promote_types(found.dtype, jnp.float32))


def probabilities(images: jax.Array, model: Any) -> jax.Array:
    """Their softmax."""
    return jax.nn.softmax(logits(images, model))


OUTPUTS = {"logits": logits, "probabilities": probabilities}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputCurvature(study.Study):
    """For each test image: both ends of the spectrum of the loss's input Hessian, the gradient's norm and the Jacobian's.

    Moosavi-Dezfooli et al. 2019 (arXiv 1811.09716) show sorted eigenvalues of the Hessian of the loss in the input, and that
    adversarial training lowers them; Novak et al. 2018 (arXiv 1802.08760) and Hoffman et al. 2019 (arXiv 1908.02729) take the
    norm of the Jacobian of probabilities and of logits for the sensitivity of a model.

    Departures: of the Hessian the largest and the smallest eigenvalue of every image rather than whole profiles, with residuals;
    of the Jacobian the spectral norm, which is the most that a small change of the image can do, rather than Frobenius's, which
    lies between it and √classes times as much; at the images only, not along paths between them. The loss is the cross-entropy
    of the true label without smoothing, in float32. Pixels are canonical, in [0, 1], so that models of other normalisation
    compare; an eigenvalue has the unit nats per squared pixel range. Of a network of ReLUs and linear layers the Hessian
    sees the curvature of the softmax alone: the kinks have no second derivative. How much of the largest curvature is the
    softmax's is measured image by image: `v'J'(diag p - pp')Jv / v'Hv` for the top eigenvector v.

    The figures are ours: a profile of sorted eigenvalues takes as many products as it has eigenvalues and shows a few images; two
    ends with residuals are cheap enough for all images, and can be set against the confidence and compared in pairs.

    Attributes:
      examples: how many test images, the first in the order of the data set, or None for all.
      batch: images a compiled step; one batch is one chunk; or "auto", as many as the device has use and memory for.
      rank: Lanczos steps at most; a step is a Hessian-vector product of all images of a batch, 8/3 of an input gradient.
      tolerance: relative residual at which a value counts as converged.
      output: whose Jacobian: `logits` or `probabilities`.
      exhibits: how many of the first images to keep for the figure; they are not selected.
    """

    name: ClassVar[str] = "input_curvature"
    title: ClassVar[str] = "Curvature in the input"
    question: ClassVar[str] = (
        "How sharply does the loss bend in the pixels of an image, and how far can a small change move the answer?"
    )
    paper: ClassVar[str] = (
        "Moosavi-Dezfooli et al. 2019, arXiv 1811.09716; Hoffman et al. 2019, arXiv 1908.02729; "
        "Novak et al. 2018, arXiv 1802.08760"
    )
    captions: ClassVar[Mapping[str, str]] = {
        "input_curvature": (
            "Of each test image the largest eigenvalue λ₁ of the Hessian of the loss in the pixels and the largest singular "
            "value σ₁ of the Jacobian: how they are distributed, λ₁ against the confidence (lines are medians over tenths of the "
            "images), and the downward curvature beside the upward one, equal on the dotted line"
        ),
        "input_curvature_map": (
            "The first test images, not selected, and the pattern along which the loss bends most: the eigenvector of λ₁, grey "
            "where it is zero. Its sign is arbitrary"
        ),
    }

    examples: int | None = 128
    batch: int | str = 32
    rank: int = 24
    tolerance: float = 1e-2
    output: str = "logits"
    exhibits: int = 6

    def __post_init__(self):
        super().__post_init__()
        if self.output not in OUTPUTS:
            raise errors.unknown("output", self.output, OUTPUTS)
        if self.rank < 2 or not self.tolerance > 0:
            raise errors.UserError(
                f"rank is {self.rank} and tolerance {self.tolerance}: expected a rank from 2, for both ends, and a tolerance "
                "above 0."
            )

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs a model that can be differentiated twice."""
        reason = forward.not_differentiable(subject)
        if reason is None:
            try:
                self._parts(subject, 1)
            except errors.UserError as error:
                return str(error)
        return reason

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.examples)

    def _model(self, subject: study.Subject) -> Any:
        # Half precision would make every small eigenvalue noise, so the float32 twin is what is differentiated.
        return classifiers.in_float32(subject.classifier)

    def _parts(self, subject: study.Subject, batch: int) -> tuple[Any, ...]:
        """Model, images, labels, keys and operator, as shapes."""
        model, images = self._model(subject), forward.images(subject, batch)
        labels, rows = subject.shape((batch,), jnp.int32), subject.shape((batch,), jnp.uint32)
        keys = jax.eval_shape(lambda rows: attacks.example_keys(subject.seed, rows), rows)
        keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows.sharding)
        return model, images, labels, keys, curvature.input_hessian(loss, images, labels, model)

    def chunks(self, subject: study.Subject) -> int:
        """One a batch."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """At most: a Hessian product counts as two forward and two backward passes, one with the Jacobian as three and one."""
        images, steps = self.chunks(subject) * self.batch, self._steps()
        outer = min(steps, subject.num_classes)
        return images * (2 * steps + 3 * outer + 4), images * (2 * steps + outer + 1)

    def _steps(self) -> int:
        chunk = min(_CHECK_EVERY, self.rank)
        return -(-self.rank // chunk) * chunk

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Forward pass, both decompositions, gradients, and the softmax's part."""
        chunks, options = self.chunks(subject), {"rank": self.rank, "check_every": _CHECK_EVERY}
        model, images, labels, keys, operator = self._parts(subject, self.batch)
        steps = [
            *per_example.planned(operator, keys, **options),
            *per_example.planned_singular_values(OUTPUTS[self.output], images, model, keys=keys, **options),
            programs.Program("gradient", per_example.gradient_norms, (images, labels, model), static=(loss,)),
            programs.Program("softmax", _softmax_part, (model, images, images)),
        ]
        steps = [dataclasses.replace(step, times=chunks * step.times) for step in steps]
        return [forward.program(subject, self.batch, times=chunks), *steps]

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """For each image the ends of the spectrum, the norms, their residuals, and what the model says of the image."""
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        scores, real = forward.logits(subject, batch)
        given = real["label"].astype(np.int32)
        images, labels, keys = forward.examples(subject, batch)
        keys = _folded(keys)
        model, options = self._model(subject), {"rank": self.rank, "check_every": _CHECK_EVERY}
        operator = curvature.input_hessian(loss, images, labels, model)
        found = per_example.lanczos(
            operator, keys, top=2, which="both ends", tolerance=self.tolerance, vectors=True, **options
        )
        stretch = per_example.singular_values(
            OUTPUTS[self.output], images, model, keys=keys, tolerance=self.tolerance, **options
        )
        patterns = found.vectors[:, 0]
        softmax = mesh.fetch(_softmax_part(model, images, patterns)).astype(np.float64)
        largest = found.values[:, 0]
        records = {
            "row": real["row"].astype(np.int32),
            "label": given,
            "prediction": scores.argmax(axis=1).astype(np.int32),
            "confidence": classification.confidence(scores),
            "margin": classification.margin(scores, given),
            "correct": scores.argmax(axis=1) == given,
            "top": largest[mask],
            "bottom": found.values[mask, 1],
            "residual/top": found.residuals[mask, 0],
            "residual/bottom": found.residuals[mask, 1],
            "converged": found.converged[mask].all(axis=1),
            "noise": found.noise[mask],
            "steps": found.steps[mask].astype(np.int32),
            "gradient": mesh.fetch(per_example.gradient_norms(loss, images, labels, model))[mask].astype(np.float64),
            "jacobian": stretch.values[mask, 0],
            "residual/jacobian": stretch.residuals[mask, 0],
            "converged/jacobian": stretch.converged[mask, 0],
            "softmax_share": (np.where(largest > found.noise, softmax / np.where(largest > 0, largest, 1.0), 1.0))[
                mask
            ],
            "exhibit/applications": np.asarray([[found.applications, stretch.applications]], np.int32),
        }
        if index == 0:
            shown = min(self.exhibits, int(mask.sum()))
            records["exhibit/images"] = np.asarray(real["image"][:shown], np.float32)
            records["exhibit/patterns"] = mesh.fetch(patterns)[:shown].astype(np.float32)
            records["exhibit/class_names"] = forward.class_names(subject)
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Medians over images with intervals, the share that bends downwards, and the rank correlation with confidence."""
        count = len(records["row"])
        noise, bottom = records["noise"], records["bottom"]
        confidence = np.asarray(records["confidence"], np.float64)
        summary: dict[str, Any] = {
            "examples": count,
            **{name: _plain(statistics.bootstrap(np.median, records[name])) for name in QUANTITIES},
            "mean_top": _plain(statistics.mean(records["top"])),
            "negative": _plain(statistics.proportion(int((bottom < -noise).sum()), count)),
            "softmax_share": _plain(statistics.bootstrap(np.median, records["softmax_share"])),
            "correlation": _plain(statistics.bootstrap(_correlation, confidence, records["top"], draws=500)),
            "correct": _plain(statistics.proportion(int(records["correct"].sum()), count)),
            "converged": float(records["converged"].mean()),
            "applications": [int(total) for total in records["exhibit/applications"].sum(axis=0)],
            "bins": input_figures.bins(confidence, records["top"]),
        }
        caveats = []
        for name, words in (("converged", "ends of the spectrum"), ("converged/jacobian", "Jacobian norm")):
            share = float(records[name].mean())
            if share < 1.0:
                caveats.append(
                    f"The {words} of {1 - share:.1%} of the images did not reach a relative residual of {self.tolerance:g} in "
                    f"{self.rank} Lanczos steps: their values are lower bounds in size."
                )
        if np.all(np.abs(records["softmax_share"] - 1.0) < _PIECEWISE):
            caveats.append(
                "All of the largest curvature is the softmax's: the logits are piecewise linear in the pixels, as those of a "
                "network of ReLUs are. What such a network bends at its kinks has no second derivative, and is not in these "
                "numbers."
            )
        flat = float((records["top"] <= noise).mean())
        if flat > 0:
            caveats.append(
                f"On {flat:.1%} of the images the loss bends upwards by no more than the rounding of the arithmetic."
            )
        return {**summary, "caveats": caveats}

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Distributions and confidence; the first images with their patterns."""
        if not findings:
            return {}
        figures = {"input_curvature": input_figures.distributions(findings, self.output)}
        if self.exhibits:
            figures["input_curvature_map"] = input_figures.patterns(findings)
        return figures

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """The median largest eigenvalue."""
        return {"top input-Hessian eigenvalue (median)": study.number(finding.summary["top"], ".3g")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run."""
        rows = []
        for run, finding in findings.items():
            summary = finding.summary
            values = [study.number(summary[name], ".3g") for name in QUANTITIES]
            rows.append(
                (
                    run,
                    summary["examples"],
                    *values,
                    study.number(summary["negative"], ".0%"),
                    study.number(summary["softmax_share"], ".0%"),
                    study.number(summary["correlation"], ".2f"),
                    tables.Number(summary["converged"], format=".0%"),
                )
            )
        return {
            "input_curvature": tables.Table(
                "Curvature and slope of the loss in the pixels",
                (
                    "run",
                    "images",
                    *(f"{words} (median)" for words in QUANTITIES.values()),
                    "bends downwards too",
                    "softmax's share of λ₁ (median)",
                    "rank correlation of λ₁ with confidence",
                    "converged",
                ),
                rows,
                f"Hessian and gradient of the cross-entropy (nats) in pixels of [0, 1]; Jacobian of the {self.output}. 95 % "
                "intervals over images: bootstrap of the median; Clopper-Pearson for shares.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Mean difference of the logarithms of λ₁, the gradient's norm and σ₁ on the same images."""
        left, right = study.pair(first, second)
        found = []
        for name in ("top", "gradient", "jacobian") if len(left) else ():
            pair = [
                np.log10(np.maximum(finding.records[name][rows], _FLOOR))
                for finding, rows in ((first, left), (second, right))
            ]
            difference, test = statistics.paired_difference(*pair), statistics.sign_flip(*pair)
            found.append(study.comparison(f"mean log10 of the {QUANTITIES[name]}", difference, test, "+.2f"))
        return found

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """The counts besides."""
        kept = {key: finding.summary[key] for key in ("converged", "applications", "softmax_share")}
        return {**super().card(finding), **kept, "subset": "the first images in the order of the data set"}


@jax.jit
def _softmax_part(model: Any, images: jax.Array, patterns: jax.Array) -> jax.Array:
    """`v'J'(diag p - pp')Jv` of each image: what of the loss's curvature along v is the softmax's, `[batch]`."""
    with jax.default_matmul_precision("highest"):
        found, tangent = jax.jvp(lambda images: logits(images, model), (images,), (patterns.astype(images.dtype),))
    chances = jax.nn.softmax(found)
    centred = tangent - jnp.sum(chances * tangent, axis=-1, keepdims=True)
    return jnp.sum(chances * centred**2, axis=-1)


@jax.jit
def _folded(keys: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, _PURPOSE)


def _correlation(confidence: np.ndarray, values: np.ndarray) -> float:
    """Spearman's, zero where one of the two does not vary."""
    if np.ptp(confidence) == 0 or np.ptp(values) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(confidence, values).statistic)


def _plain(interval: statistics.Interval) -> dict[str, Any]:
    return dataclasses.asdict(interval)
