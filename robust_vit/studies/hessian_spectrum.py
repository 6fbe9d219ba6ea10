"""The Hessian's extreme eigenvalues: how sharply, and in which direction, does the loss curve around the weights?"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker

from robust_vit import classifier as classifiers
from robust_vit import curvature, errors, losses, plots, programs, tables, trees
from robust_vit.metrics import statistics
from robust_vit.studies import forward, study

_PURPOSE = 0x68657373  # "hess": keeps the starting vectors apart from every other draw under the same seed.
_CHECK_EVERY = 10  # Lanczos steps between two looks at what has converged.


@dataclasses.dataclass(frozen=True)
class MeanLoss:
    """Mean cross-entropy of a mini-batch in nats, in evaluation mode; equal for equal smoothing, so compiled once.

    Attributes:
      smoothing: label smoothing of the training objective.
    """

    smoothing: float = 0.0

    def __call__(self, params: Any, batch: Mapping[str, jax.Array], classifier: Any) -> jax.Array:
        """The loss of `classifier` with other parameters."""
        logits = classifier.with_params(params)(batch["image"])
        return jnp.mean(losses.cross_entropy(logits, batch["label"], smoothing=self.smoothing))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HessianSpectrum(study.Study):
    """Top eigenvalues of the Hessian of the training loss, one mini-batch at a time, pooled into a density.

    Protocol of Park & Kim 2022 (arXiv 2202.06709, figures 1c and 4; their code for it was never released): mini-batches of
    16 of the *augmented training stream*, objective NLL + L2, the five eigenvalues of largest magnitude of each, their
    density over mini-batches, NEP = share of negative ones and APE = mean of the positive ones. Departures: Lanczos with
    residuals in place of PyHessian's power iteration with deflation (100 iterations, relative tolerance 1e-3, which returns
    λ2 for λ1 where they are close); ten mini-batches in place of a tenth of the training set; BatchNorm uses its running
    statistics and dropout is off, so that the operator is one linear map; mixed labels (mixup, cutmix) are left out. The L2
    term adds the weight decay to every eigenvalue exactly, over all parameters; decoupled decay (AdamW) is shifted by the
    same number, though it is no part of a loss. A value closer to zero than the rounding of the arithmetic has no sign.

    Attributes:
      batch: images a mini-batch.
      mini_batches: how many; one is a chunk.
      top: eigenvalues a mini-batch, by magnitude.
      rank: Lanczos steps at most; a step is a Hessian-vector product, 8/3 of a gradient.
      tolerance: relative residual at which a value counts as converged.
      label_smoothing: of the loss, or None for the subject's.
      weight_decay: of the L2 term, or None for the subject's.
      microbatch: images differentiated at a time; None for the mini-batch at once; or "auto", as many as there is memory for.
    """

    name: ClassVar[str] = "hessian_spectrum"
    title: ClassVar[str] = "Hessian spectrum"
    question: ClassVar[str] = (
        "How sharply does the training loss curve around the weights, and does it curve downwards?"
    )
    paper: ClassVar[str] = "Park & Kim 2022, arXiv 2202.06709, figures 1c and 4"
    captions: ClassVar[Mapping[str, str]] = {
        "hessian_spectrum": (
            "Density of the eigenvalues of largest magnitude, pooled over mini-batches; each stroke is an eigenvalue. "
            "To the left of the dashed line the loss curves downwards"
        ),
    }

    automatic: ClassVar[str] = "microbatch"

    batch: int = 16
    mini_batches: int = 10
    top: int = 5
    rank: int = 40
    tolerance: float = 1e-2
    label_smoothing: float | None = None
    weight_decay: float | None = None
    microbatch: int | str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch", "mini_batches", "top", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                # The mini-batch is what is measured, so memory cannot choose it: it chooses the part differentiated at a time.
                hint = ' (microbatch="auto" is what saves memory here)' if value == programs.AUTO else ""
                raise errors.UserError(f"{name} is {value!r}: expected a whole number from 1{hint}.")

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs parameters and a training stream."""
        if not jax.tree.leaves(subject.classifier.params):
            return "the model was wrapped without its variables, so its loss has no parameters to curve in"
        if subject.train is None:
            return "there are no training images: the spectrum is that of the training loss"
        return None

    def chunks(self, subject: study.Subject) -> int:
        """One a mini-batch."""
        del subject
        return self.mini_batches

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """At most: each Hessian-vector product counts as two forward and two backward passes an image; the loss is one more."""
        del subject
        products = 2 * self.mini_batches * self.rank * self.batch
        return products + self.mini_batches * self.batch, products

    def most(self, subject: study.Subject) -> int:
        """The mini-batch."""
        del subject
        return self.batch

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Lanczos over the Hessian of a mini-batch, and its loss."""
        shape = (
            subject.train.image_shape if hasattr(subject.train, "image_shape") else forward.images(subject, 1).shape[1:]
        )
        batch = {
            "image": subject.shape((self.batch, *shape), jnp.float32),
            "label": subject.shape((self.batch,), jnp.int32),
        }
        classifier = classifiers.in_float32(subject.classifier)
        loss = self._loss(subject)
        operator = self._operator(subject, classifier, batch)
        steps = curvature.programs(operator, rank=self.rank, check_every=min(_CHECK_EVERY, self.rank))
        value = programs.Program("loss", _value, (classifier, batch), times=1, static=(loss,))
        return [dataclasses.replace(one, times=one.times * self.mini_batches) for one in (*steps, value)]

    def _loss(self, subject: study.Subject) -> MeanLoss:
        return MeanLoss(float(subject.label_smoothing if self.label_smoothing is None else self.label_smoothing))

    def _decay(self, subject: study.Subject) -> float:
        return float(subject.weight_decay if self.weight_decay is None else self.weight_decay)

    def _operator(self, subject: study.Subject, classifier: Any, batch: Mapping[str, jax.Array]) -> curvature.Operator:
        loss, decay = self._loss(subject), self._decay(subject)
        options = {
            "microbatch": self.microbatch,
            "weight_decay": decay,
            "separable": False,
        }  # In evaluation mode it is one.
        return curvature.hessian(loss, classifier.params, batch, classifier, **options)

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """Eigenvalues, residuals and the loss of one mini-batch: one record."""
        batch = forward.training_examples(subject.train, index * self.batch, self.batch)
        # Half precision would make every small eigenvalue noise, so the float32 twin is what is differentiated.
        classifier = classifiers.in_float32(subject.classifier)
        inputs = subject.put({"image": batch["image"], "label": batch["label"]})
        operator = self._operator(subject, classifier, inputs)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(subject.seed), _PURPOSE), index)
        found = curvature.lanczos(
            operator,
            key,
            rank=self.rank,
            top=self.top,
            tolerance=self.tolerance,
            check_every=min(_CHECK_EVERY, self.rank),
        )
        return {
            "row": np.asarray([index], np.int32),
            "label": np.asarray([-1], np.int32),
            "rows": np.asarray(batch["row"], np.int32)[None],
            "eigenvalues": np.asarray(found.values, np.float64)[None],
            "residuals": np.asarray(found.residuals, np.float64)[None],
            "converged": np.asarray(found.converged, bool)[None],
            "noise": np.asarray([found.noise], np.float64),
            "applications": np.asarray([found.applications], np.int32),
            "loss": np.asarray([_value(self._loss(subject), classifier, inputs)], np.float64),
            "weight_decay": np.asarray([self._decay(subject)], np.float64),
            "parameters": np.asarray([trees.count(classifier.params)], np.int64),
        }

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """NEP, APE and the largest eigenvalue, with intervals over mini-batches."""
        values, noise = records["eigenvalues"], records["noise"][:, None]
        negative, positive = values < -noise, values > noise
        relative = records["residuals"] / np.maximum(np.abs(values), 1e-300)
        caveats = []
        share = float(records["converged"].mean())
        if share < 1.0:
            caveats.append(
                f"{1 - share:.0%} of the eigenvalues did not reach a relative residual of {self.tolerance:g} in {self.rank} "
                f"Lanczos steps (the worst has {relative.max():.1e}): raise `rank` before reading small differences."
            )
        unresolved = float(1.0 - (negative | positive).mean())
        if unresolved > 0:
            caveats.append(
                f"{unresolved:.0%} of the eigenvalues are closer to zero than the rounding of the arithmetic: they have no "
                "sign and count neither as negative nor as positive."
            )

        def average_positive(values: np.ndarray, positive: np.ndarray) -> float:
            return float(values[positive].mean()) if positive.any() else 0.0

        over = "mini-batches"
        return {
            "mini_batches": len(values),
            "parameters": int(records["parameters"][0]),
            "weight_decay": float(records["weight_decay"][0]),
            "nep": dataclasses.asdict(statistics.mean(negative.mean(axis=1), over=over)),
            "ape": dataclasses.asdict(statistics.bootstrap(average_positive, values, positive, over=over)),
            "largest": dataclasses.asdict(statistics.mean(values.max(axis=1), over=over)),
            "smallest": dataclasses.asdict(statistics.mean(values.min(axis=1), over=over)),
            "loss": dataclasses.asdict(statistics.mean(records["loss"], over=over)),
            "converged": share,
            "median_relative_residual": float(np.median(relative)),
            "unresolved": unresolved,
            "applications": int(records["applications"].sum()),
            "caveats": caveats,
        }

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """The density of the pooled eigenvalues, one ridge a run."""
        return {"hessian_spectrum": _ridges(findings)} if findings else {}

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """The largest eigenvalue."""
        return {"top Hessian eigenvalue": study.number(finding.summary["largest"], ".3g")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run."""
        rows = [
            (
                run,
                study.number(finding.summary["largest"], ".4g"),
                study.number(finding.summary["smallest"], ".4g"),
                study.number(finding.summary["ape"], ".4g"),
                study.number(finding.summary["nep"], ".1%"),
                tables.Number(finding.summary["converged"], format=".0%"),
                tables.Number(finding.summary["median_relative_residual"], format=".1e"),
                tables.Number(finding.summary["loss"]["value"], format=".3f"),
                finding.summary["parameters"],
            )
            for run, finding in findings.items()
        ]
        return {
            "hessian_spectrum": tables.Table(
                f"Top {self.top} Hessian eigenvalues by magnitude",
                (
                    "run",
                    "largest λ",
                    "smallest of the top λ",
                    "APE (mean positive λ)",
                    "NEP (negative share)",
                    "converged",
                    "median relative residual",
                    "loss (nats)",
                    "parameters",
                ),
                rows,
                f"{self.mini_batches} mini-batches of {self.batch} from the augmented training stream; loss NLL + L2; "
                "BatchNorm with running statistics, dropout off. 95 % bootstrap intervals over mini-batches.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """The difference of the largest eigenvalue, paired where both runs saw the same images in the same mini-batches."""
        left, right = study.pair(first, second)
        if len(left) < 2 or not np.array_equal(first.records["rows"][left], second.records["rows"][right]):
            return []
        pair = [finding.records["eigenvalues"][rows].max(axis=1) for finding, rows in ((first, left), (second, right))]
        difference = statistics.paired_difference(*pair, over="mini-batches")
        test = statistics.sign_flip(*pair, over="mini-batches")
        return [study.comparison("largest Hessian eigenvalue", difference, test, "+.3g")]


@functools.partial(jax.jit, static_argnums=0)
def _value(loss: MeanLoss, classifier: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return loss(classifier.params, batch, classifier)


def _ridges(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    pooled = {run: np.sort(finding.records["eigenvalues"].ravel()) for run, finding in findings.items()}
    everything = np.concatenate(list(pooled.values()))
    sizes = np.abs(everything[everything != 0.0])
    largest = sizes.max() if len(sizes) else 1.0
    # Runs differ by orders of magnitude: linear near zero, logarithmic beyond, so that signs and tails both show.
    smallest = max(np.quantile(sizes, 0.05) if len(sizes) else 1.0, largest * 1e-4)
    width = 10.0 ** math.floor(math.log10(smallest))
    low, high = np.arcsinh(everything.min() / width), np.arcsinh(everything.max() / width)
    pad = 0.12 * max(high - low, 0.5)
    grid = np.linspace(min(low, 0.0) - pad, high + pad, 400)
    with plots.style():
        figure, axes = plots.figure(len(pooled), 1, height=1.0 + 1.15 * len(pooled), share_x=True)
        for index, (run, values) in enumerate(pooled.items()):
            axis = axes[index, 0]
            points = np.arcsinh(values / width)
            color = plots.color(index)
            if np.ptp(points) > 1e-6:
                density = _density(points, grid)
                axis.fill_between(np.sinh(grid) * width, density, color=color, alpha=0.25, linewidth=0)
                axis.plot(np.sinh(grid) * width, density, color=color)
                axis.set_ylim(-0.22 * density.max(), 1.12 * density.max())
                axis.plot(values, np.full(len(values), -0.1 * density.max()), "|", color=color, alpha=0.8, markersize=7)
            else:
                axis.plot(values, np.zeros(len(values)), "|", color=color, markersize=9)
            axis.axvline(0.0, color=plots.INK, linewidth=1.0, linestyle=(0, (4, 3)))
            axis.set_xscale("asinh", linear_width=width)
            decades = width * 10.0 ** np.arange(math.ceil(math.log10(largest / width)) + 1)
            axis.xaxis.set_major_locator(ticker.FixedLocator([*-decades[::-1], 0.0, *decades]))
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
            axis.set_xlim(np.sinh(grid[0]) * width, np.sinh(grid[-1]) * width)
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
            summary = findings[run].summary
            axis.set_title(run, fontsize=10, pad=4)
            axis.set_title(
                f"negative {summary['nep']['value']:.0%}, mean positive {summary['ape']['value']:.3g}",
                loc="right",
                fontsize=9,
                fontweight="normal",
                pad=4,
            )
        axes[-1, 0].set_xlabel(f"Hessian eigenvalue of a mini-batch (top {_top(findings)} by magnitude)")
    return figure


def _density(points: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Kernel density reflected at zero, so that smoothing moves no mass across the sign."""
    width = 0.25 * max(points.std(), 1e-3)
    kernels = scipy.stats.norm.pdf((grid[:, None] - points) / width) + scipy.stats.norm.pdf(
        (grid[:, None] + points) / width
    )
    return np.where((grid[:, None] >= 0) == (points >= 0), kernels, 0.0).mean(axis=1) / width


def _top(findings: Mapping[str, study.Finding]) -> int:
    return max(finding.records["eigenvalues"].shape[1] for finding in findings.values())
