"""Sharpness: how far does the training loss rise when the weights are moved a little, in absolute and in their own units?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import classifier as classifiers
from robust_vit import curvature, errors, mesh, programs, tables, trees
from robust_vit.curvature import operators
from robust_vit.curvature import sharpness as solvers
from robust_vit.metrics import statistics
from robust_vit.studies import sharpness_figures, study, training_loss

_PURPOSE = 0x73686172  # "shar": keeps the draws apart from every other draw under the same seed.
_CHECK_EVERY = 10  # Lanczos steps between two looks at what has converged.
_OVER = "mini-batches"
KINDS = {"raw": "raw", "adaptive": "adaptive"}
MEASURES = {"worst": "worst case", "one_step": "one step"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharpness(training_loss.TrainingLossStudy):
    """Worst-case and average-case sharpness of the training loss, raw and adaptive, over radii, one mini-batch at a time.

    Protocol of Andriushchenko et al. 2023 (arXiv 2302.07011, github.com/tml-epfl/sharpness-vs-generalization): mini-batches of
    128 training images, each with a worst case of its own (m-sharpness, Foret et al. 2021, arXiv 2010.01412), 20 steps of
    Auto-PGD from the weights with a first step of twice the radius, momentum 0.75 and step sizes halved at Auto-PGD's
    checkpoints; the average case over Gaussian perturbations of each weight; each raw (`|d| <= radius`) and adaptive
    (`|d / |w|| <= radius`, Kwon et al. 2021, arXiv 2102.11600); evaluation mode; on request (`normalised`) with logits that are
    centred and divided by their norm. One step is SAM's (ASAM's) own estimate. Beside them stands the largest eigenvalue of the
    Hessian H and of `|w| H |w|`, whose half times the squared radius is the worst case near a minimum.

    Departures: the mini-batches are those of the augmented training stream, as in `hessian_spectrum`, with the smoothing of the
    training objective (there: images without augmentation, no smoothing); mixed labels are left out. The ascent is in `d / |w|`,
    where the neighbourhood is a ball, rather than in d with a projection found by bisection. Random perturbations come in pairs
    d and -d, so that the gradient adds no noise. Radii that suit a model differ by its kind and size (there a ResNet-18 takes raw
    ones ten times those of a ViT); the defaults are near those of ViTs, the smaller ones. Sharpness found by an ascent is a
    lower bound.

    The figure is ours: theirs set the sharpness of many models, at one radius each, against how well they generalise, which takes
    dozens of trainings; here a few runs are compared over radii.

    Attributes:
      batch: images a mini-batch, the m of m-sharpness.
      mini_batches: how many; one is a chunk.
      radii: of the raw neighbourhood, ascending.
      adaptive_radii: of the adaptive one.
      spreads: of the raw average case: the standard deviation of each weight's perturbation (`linf`: half the width), ascending.
      adaptive_spreads: of the adaptive one, as shares of each weight.
      norm: of the neighbourhood: `l2`, or `linf`, for which radii are about a hundredth of these.
      steps: of the ascent; one gradient each.
      pairs: of random perturbations; two forward passes each.
      normalised: measure the loss of normalised logits.
      rank: Lanczos steps at most.
      tolerance: relative residual at which an eigenvalue counts as converged.
      label_smoothing: of the loss, or None for the subject's.
      microbatch: images differentiated at a time; None for the mini-batch at once; or "auto", as many as there is memory for.
    """

    name: ClassVar[str] = "sharpness"
    title: ClassVar[str] = "Sharpness"
    question: ClassVar[str] = (
        "How far does the training loss rise when the weights are moved a little, at worst and on average?"
    )
    paper: ClassVar[str] = (
        "Andriushchenko et al. 2023, arXiv 2302.07011; Foret et al. 2021, arXiv 2010.01412; "
        "Kwon et al. 2021, arXiv 2102.11600"
    )
    captions: ClassVar[Mapping[str, str]] = {
        "sharpness": (
            "Rise of the loss of a mini-batch when the weights are moved, in absolute units and relative to each weight. Above: "
            "at worst within a radius, solid the most that was found, dotted after SAM's one step. Below: on average over random "
            "perturbations of every weight. Bands are 95 % intervals over mini-batches"
        ),
    }
    counts: ClassVar[Mapping[str, int]] = {"batch": 1, "mini_batches": 1, "steps": 1, "pairs": 1, "rank": 1}

    batch: int = 128
    mini_batches: int = 8
    radii: tuple[float, ...] = (0.05, 0.1, 0.2)
    adaptive_radii: tuple[float, ...] = (0.25, 0.5, 1.0)
    spreads: tuple[float, ...] = (0.01, 0.02, 0.04)
    adaptive_spreads: tuple[float, ...] = (0.1, 0.2, 0.4)
    norm: str = "l2"
    steps: int = 20
    pairs: int = 10
    normalised: bool = False
    rank: int = 30
    tolerance: float = 1e-2
    label_smoothing: float | None = None
    microbatch: int | str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.norm not in solvers.NORMS:
            raise errors.unknown("norm", self.norm, solvers.NORMS)
        for name in ("radii", "adaptive_radii", "spreads", "adaptive_spreads"):
            values = getattr(self, name)
            if not values or not all(0 < low < high for low, high in zip(values, (*values[1:], np.inf), strict=True)):
                raise errors.UserError(f"{name} are {values}: expected ascending numbers above 0.")

    def chunks(self, subject: study.Subject) -> int:
        """One a mini-batch."""
        del subject
        return self.mini_batches

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """Ascents, random perturbations, and Hessian products, each of which counts as two forward and two backward passes."""
        del subject
        points, spreads = (sum(len(part[place]) for part in self._kinds().values()) for place in (0, 1))
        products = 2 * 2 * self.rank
        gradients = points * self.steps
        images = self.mini_batches * self.batch
        alone = 3 * points + 2 * (self.pairs + 1) * spreads
        return images * (products + gradients + alone), images * (products + gradients)

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Ascents, random perturbations and Lanczos, raw and adaptive."""
        batch = self._batch_shapes(subject, self.batch)
        classifier, loss, found = classifiers.in_float32(subject.classifier), self._loss(subject), []
        for kind, (radii, spreads) in self._kinds().items():
            options = {"steps": self.steps, "pairs": self.pairs, "norm": self.norm, "microbatch": self.microbatch}
            parts = solvers.planned(
                loss,
                classifier.params,
                batch,
                classifier,
                adaptive="elementwise" if kind == "adaptive" else None,
                **options,
            )
            often = [len(spreads) if part.name == "pair" else len(radii) for part in parts]
            found += [
                dataclasses.replace(part, times=count * part.times) for count, part in zip(often, parts, strict=True)
            ]
            operator = self._operator(subject, classifier, batch, kind)
            found += curvature.programs(operator, rank=self.rank, check_every=min(_CHECK_EVERY, self.rank))
        return [dataclasses.replace(part, times=self.mini_batches * part.times) for part in found]

    def _kinds(self) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        return {"raw": (self.radii, self.spreads), "adaptive": (self.adaptive_radii, self.adaptive_spreads)}

    def _loss(self, subject: study.Subject) -> training_loss.MeanLoss:
        return dataclasses.replace(super()._loss(subject), normalised=bool(self.normalised))

    def _operator(self, subject: study.Subject, classifier: Any, batch: Mapping[str, jax.Array], kind: str) -> Any:
        options = {"microbatch": self.microbatch, "separable": False}  # In evaluation mode it is one.
        operator = curvature.hessian(self._loss(subject), classifier.params, batch, classifier, **options)
        return operator if kind == "raw" else _scaled(operator)

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """Of one mini-batch the rises over the radii, raw and adaptive, and the largest eigenvalues: one record."""
        images = self._mini_batch(subject, index, self.batch)
        classifier, loss = classifiers.in_float32(subject.classifier), self._loss(subject)
        batch, key = training_loss.inputs(subject, images), training_loss.draw(subject, _PURPOSE, index)
        records: dict[str, Any] = {
            "row": np.int32(index),
            "label": np.int32(-1),
            "rows": np.asarray(images["row"], np.int32),
            "parameters": np.int64(trees.count(classifier.params)),
            "parameter_norm": np.float64(mesh.fetch(trees.norm(classifier.params))),
        }
        point = loss, classifier.params, batch, classifier
        # Of a Gaussian in so many dimensions; a cube's half width is what it is.
        factor = math.sqrt(records["parameters"]) if self.norm == "l2" else 1.0
        for kind, (radii, spreads) in self._kinds().items():
            options = {
                "norm": self.norm,
                "adaptive": "elementwise" if kind == "adaptive" else None,
                "microbatch": self.microbatch,
            }
            worst = [solvers.worst_case(*point, radius=radius, steps=self.steps, **options) for radius in radii]
            average = [
                solvers.average_case(
                    *point, key=jax.random.fold_in(key, place), radius=factor * spread, pairs=self.pairs, **options
                )
                for place, spread in enumerate(spreads)
            ]
            operator = self._operator(subject, classifier, batch, kind)
            found = curvature.lanczos(
                operator,
                jax.random.fold_in(key, len(spreads)),
                rank=self.rank,
                top=1,
                which="largest",
                tolerance=self.tolerance,
                check_every=min(_CHECK_EVERY, self.rank),
            )
            records |= {
                "loss": np.float64(worst[0].loss),
                f"radius/{kind}": np.asarray(radii, np.float64),
                f"spread/{kind}": np.asarray(spreads, np.float64),
                f"worst/{kind}": np.asarray([one.sharpness for one in worst]),
                f"one_step/{kind}": np.asarray([one.one_step for one in worst]),
                f"average/{kind}": np.asarray([one.value for one in average]),
                f"average_error/{kind}": np.asarray([one.standard_error for one in average]),
                f"slope/{kind}": np.float64(worst[0].slope),
                f"eigenvalue/{kind}": found.values[0],
                f"residual/{kind}": found.residuals[0],
                f"converged/{kind}": found.converged[0],
                f"applications/{kind}": np.int32(found.applications),
            }
        return {name: np.asarray(value)[None] for name, value in records.items()}

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Means over mini-batches with intervals: every measure at every radius, and the largest eigenvalues."""
        caveats = []
        kinds = {}
        size = records["parameter_norm"] ** 2
        for kind in KINDS:
            radii = [float(radius) for radius in records[f"radius/{kind}"][0]]
            eigenvalue = records[f"eigenvalue/{kind}"]
            kinds[kind] = {
                "radii": radii,
                **{
                    name: [_mean(records[f"{name}/{kind}"][:, place]) for place in range(len(radii))]
                    for name in MEASURES
                },
                "spreads": [float(spread) for spread in records[f"spread/{kind}"][0]],
                "average": [_mean(values) for values in records[f"average/{kind}"].T],
                "eigenvalue": _mean(eigenvalue),
                "slope": _mean(records[f"slope/{kind}"]),
                "converged": float(records[f"converged/{kind}"].mean()),
                # Half the squared radius times the largest eigenvalue: the worst case near a minimum.
                "quadratic": [float(0.5 * radius**2 * eigenvalue.mean()) for radius in radii],
            }
            caveats += self._doubts(records, kind)
        return {
            "mini_batches": len(records["row"]),
            "examples_each": int(records["rows"].shape[1]),
            "parameters": int(records["parameters"][0]),
            "loss": _mean(records["loss"]),
            "parameter_norm": float(records["parameter_norm"][0]),
            "normalised_eigenvalue": _mean(size * records["eigenvalue/raw"]),
            "kinds": kinds,
            "caveats": caveats,
        }

    def _doubts(self, records: Mapping[str, np.ndarray], kind: str) -> list[str]:
        worst, single = records[f"worst/{kind}"], records[f"one_step/{kind}"]
        caveats = []
        share = float(records[f"converged/{kind}"].mean())
        if share < 1.0:
            caveats.append(
                f"{1 - share:.0%} of the largest eigenvalues ({kind}) did not reach a relative residual of {self.tolerance:g} "
                f"in {self.rank} Lanczos steps: raise `rank`."
            )
        falls = float((np.diff(worst, axis=1) < 0).any(axis=1).mean())
        if falls > 0:
            caveats.append(
                f"On {falls:.0%} of the mini-batches the worst case found ({kind}) falls with the radius somewhere, which the "
                "true one cannot: the ascent missed it; take more `steps`."
            )
        if (records[f"slope/{kind}"] == 0).any():
            caveats.append(f"The gradient ({kind}) is exactly zero on a mini-batch: the ascent had nowhere to go.")
        if (single > worst * (1 + 1e-3) + 1e-6).any():
            caveats.append(f"One step ({kind}) found more than the whole ascent on a mini-batch: take more `steps`.")
        lost = records[f"average_error/{kind}"] > 0.5 * np.abs(records[f"average/{kind}"])
        if np.isfinite(records[f"average_error/{kind}"]).all() and lost.any():
            caveats.append(
                f"{lost.mean():.0%} of the average-case values ({kind}) have a standard error above half of themselves: take "
                "more `pairs`, or larger radii."
            )
        return caveats

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """The rise of the loss against the radius, raw and adaptive."""
        return {"sharpness": sharpness_figures.curves(findings, self.norm)} if findings else {}

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """The worst adaptive case in the middle of the radii."""
        entry = finding.summary["kinds"]["adaptive"]
        middle = (len(entry["radii"]) - 1) // 2
        return {f"adaptive sharpness (radius {entry['radii'][middle]:g})": study.number(entry["worst"][middle], ".3g")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run, kind and radius; and the largest eigenvalues."""
        rows, averages, values = [], [], []
        for run, finding in findings.items():
            summary = finding.summary
            for kind, entry in summary["kinds"].items():
                for place, radius in enumerate(entry["radii"]):
                    cells = [study.number(entry[name][place], ".3g") for name in MEASURES]
                    rows.append((run, kind, radius, *cells, tables.Number(entry["quadratic"][place], format=".3g")))
                for spread, average in zip(entry["spreads"], entry["average"], strict=True):
                    averages.append((run, kind, spread, study.number(average, ".3g")))
            kinds = summary["kinds"]
            values.append(
                (
                    run,
                    study.number(kinds["raw"]["eigenvalue"], ".4g"),
                    study.number(summary["normalised_eigenvalue"], ".3g"),
                    study.number(kinds["adaptive"]["eigenvalue"], ".4g"),
                    tables.Number(min(kind["converged"] for kind in kinds.values()), format=".0%"),
                    study.number(summary["loss"], ".4f"),
                    tables.Number(summary["parameter_norm"], format=".1f"),
                    summary["parameters"],
                )
            )
        caption = (
            f"{self.mini_batches} mini-batches of {self.batch} from the augmented training stream, evaluation mode; "
            f"neighbourhoods in {'L2' if self.norm == 'l2' else 'L∞'}; {self.steps} steps, {self.pairs} pairs of draws. 95 % "
            "bootstrap intervals over mini-batches."
        )
        return {
            "sharpness": tables.Table(
                "Rise of the training loss (nats) within a radius of the weights",
                ("run", "kind", "radius", *MEASURES.values(), "½ λ₁ radius²"),
                rows,
                caption,
            ),
            "sharpness_average": tables.Table(
                "Mean rise of the training loss (nats) under random perturbations of each weight",
                ("run", "kind", "spread", "average case"),
                averages,
                caption,
            ),
            "sharpness_eigenvalues": tables.Table(
                "Largest eigenvalue of the Hessian H, raw and in the weights' own units",
                ("run", "λ₁ of H", "|w|² λ₁", "λ₁ of |w| H |w|", "converged", "loss (nats)", "|w|", "parameters"),
                values,
                caption,
            ),
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Differences of the worst cases in the middle of the radii and of the eigenvalues, where both saw the same images."""
        pairs = training_loss.paired(first, second)
        if pairs is None:
            return []
        left, right = pairs
        found = []
        for kind in KINDS:
            radii = [finding.records[f"radius/{kind}"][0] for finding in (first, second)]
            columns = {f"largest eigenvalue, {kind}": f"eigenvalue/{kind}"}
            if np.array_equal(*radii):
                middle = (len(radii[0]) - 1) // 2
                columns[f"worst-case sharpness, {kind}, radius {radii[0][middle]:g}"] = f"worst/{kind}"
            for words, name in columns.items():
                pair = [
                    finding.records[name][rows] if name.startswith("eigen") else finding.records[name][rows, middle]
                    for finding, rows in ((first, left), (second, right))
                ]
                difference = statistics.paired_difference(*pair, over=_OVER)
                test = statistics.sign_flip(*pair, over=_OVER)
                found.append(study.comparison(words, difference, test, "+.3g"))
        return found


def _mean(values: np.ndarray) -> dict[str, Any]:
    return dataclasses.asdict(statistics.mean(values, over=_OVER))


@jax.jit
def _units(params: Any) -> Any:
    return solvers.scales(params)


def _scaled(operator: curvature.Operator) -> operators.Scaled:
    """The operator in the units of the parameters, which may be shapes."""
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(operator.like))
    return operators.Scaled(operator, operator.like if shapes else _units(operator.like))
