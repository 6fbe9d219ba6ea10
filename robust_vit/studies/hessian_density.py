"""The Hessian's whole spectrum: how much of the loss's curvature is in few directions, and how much of it is negative?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import classifier as classifiers
from robust_vit import curvature, errors, programs, tables, trees
from robust_vit.metrics import statistics
from robust_vit.studies import density_figures, spectrum_tables, study, training_loss

_PURPOSE = 0x64656E73  # "dens": keeps the probes apart from every other draw under the same seed.
_EARLY = training_loss.EARLY
_OPERATORS = ("hessian", "gauss_newton")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HessianDensity(training_loss.TrainingLossStudy):
    """The spectral density of the Hessian of the training loss on one batch, by stochastic Lanczos quadrature.

    Protocol of Ghorbani et al. 2019 (arXiv 1901.10159) and of PyHessian (Yao et al. 2020, arXiv 1912.07145): random probes, a
    Lanczos decomposition each, their quadratures averaged, drawn on a logarithmic scale after smoothing by a Gaussian. The
    records keep the raw nodes and weights of each probe, so that another width asks for no new products. Departures: one batch
    of the augmented training stream in place of the training set; NLL + L2 in evaluation mode, as in `hessian_spectrum`, whose
    departures hold here too; probes uniform rather than Gaussian. Two shares of negative eigenvalues are told apart: by number
    among all eigenvalues, and by magnitude.

    The first figure has the form of theirs (density against eigenvalue, logarithmic) and stands for no single one: theirs are of
    whole training sets and other networks, and of none was there a curve or a number to compare with. The second is ours.

    Attributes:
      batch: images, all of which each product is a mean over.
      probes: random vectors; one is a chunk.
      rank: Lanczos steps a probe: products, each 8/3 of a gradient (Gauss-Newton: 5/3).
      operator: `hessian`; or `gauss_newton`, which is positive semidefinite: what the outputs' curvature makes of it.
      floor: share of the largest magnitude; what is nearer to zero counts neither as negative nor as positive, because Lanczos
        tells no single eigenvalues apart there. The rounding of the arithmetic, where that is more.
      label_smoothing: of the loss, or None for the subject's; of no effect on Gauss-Newton.
      weight_decay: of the L2 term, or None for the subject's.
      mixed: mix images and labels as the training of the subject does (`objective.mixup`, `objective.cutmix`), where it does.
      microbatch: images differentiated at a time; None for the batch at once; or "auto", as many as there is memory for.
      early: measure the first kept checkpoint after the warm-up as well (`checkpoint.milestones`): twice the cost.
    """

    name: ClassVar[str] = "hessian_density"
    title: ClassVar[str] = "Hessian density"
    question: ClassVar[str] = "In how many directions does the training loss curve, and in how many downwards?"
    paper: ClassVar[str] = "Ghorbani et al. 2019, arXiv 1901.10159; Yao et al. 2020, arXiv 1912.07145"
    captions: ClassVar[Mapping[str, str]] = {
        "hessian_density": (
            "Density of all eigenvalues, smoothed by a Gaussian of 1 % of their range; the band is two standard errors over "
            "probes. A bump as high as the dotted line is one eigenvalue. To the left of the dashed line the loss curves "
            "downwards; a dotted curve is the early phase of the same run"
        ),
        "hessian_density_signs": (
            "The same spectrum on an axis that is logarithmic to both sides and linear near zero: how many eigenvalues there are "
            "in a decade. Smoothed within each sign; a bump as high as the dotted line is one eigenvalue. Most of the loss's "
            "are near zero, and stand where L2 shifts them: at the weight decay"
        ),
    }

    counts: ClassVar[Mapping[str, int]] = {"batch": 1, "probes": 2, "rank": 2}
    later: ClassVar[Mapping[str, Any]] = {"mixed": True}

    batch: int = 128
    probes: int = 6
    rank: int = 50
    operator: str = "hessian"
    floor: float = 1e-3
    label_smoothing: float | None = None
    weight_decay: float | None = None
    mixed: bool = True
    microbatch: int | str | None = None
    early: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.operator not in _OPERATORS:
            raise errors.unknown("operator", self.operator, _OPERATORS)
        if not 0 <= self.floor < 1:
            raise errors.UserError(f"floor is {self.floor!r}: expected a share of the largest magnitude in [0, 1).")

    def chunks(self, subject: study.Subject) -> int:
        """One a probe."""
        del subject
        return self.probes

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """A product counts as two forward and two backward passes an image; the loss is one more."""
        spectra = len(self._phases(subject)) * self.probes
        rank = min(self.rank, trees.count(subject.classifier.params))
        products = 2 * spectra * rank * self.batch
        return products + spectra * self.batch, products

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Lanczos over the batch, and its loss."""
        batch = self._batch_shapes(subject, self.batch)
        classifier = classifiers.in_float32(subject.classifier)
        planned = curvature.programs(self._operator(subject, classifier, batch), rank=self.rank)
        planned.append(
            programs.Program("loss", training_loss.value, (classifier, batch), times=1, static=(self._loss(subject),))
        )
        times = len(self._phases(subject)) * self.probes
        return [dataclasses.replace(one, times=one.times * times) for one in planned]

    def _operator(self, subject: study.Subject, classifier: Any, batch: Mapping[str, jax.Array]) -> curvature.Operator:
        options = {"microbatch": self.microbatch, "weight_decay": self._decay(subject)}
        if self.operator == "gauss_newton":
            return curvature.gauss_newton(_logits, classifier.params, batch, classifier, **options)
        # In evaluation mode the loss is a mean over images.
        return curvature.hessian(self._loss(subject), classifier.params, batch, classifier, separable=False, **options)

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """Nodes, weights and residuals of one probe: one record."""
        batch = self._mini_batch(subject, 0, self.batch)
        inputs, key = training_loss.inputs(subject, batch), training_loss.draw(subject, _PURPOSE, index)
        records = {
            "row": np.asarray([index], np.int32),
            "label": np.asarray([-1], np.int32),
            "rows": np.asarray(batch["row"], np.int32)[None],
            "weight_decay": np.asarray([self._decay(subject)], np.float64),
            "parameters": np.asarray([trees.count(subject.classifier.params)], np.int64),
        }
        if "share" in batch:
            records["share"] = batch["share"][:1]
        for step in self._phases(subject):
            classifier = training_loss.model(subject, step)
            operator = self._operator(subject, classifier, inputs)
            # All Ritz values, so that each has a residual.
            found = curvature.lanczos(operator, key, rank=self.rank, top=self.rank, which="smallest")
            missing = (0, self.rank - len(found.ritz))
            measured = {
                "nodes": np.pad(found.ritz, missing, constant_values=np.nan),
                "weights": np.pad(found.weights, missing),
                "residuals": np.pad(found.residuals, missing, constant_values=np.nan),
                "noise": np.float64(found.noise),
                "applications": np.int32(found.applications),
                "loss": np.float64(training_loss.value(self._loss(subject), classifier, inputs)),
            }
            if step is not None:
                measured["step"] = np.int32(step)
            prefix = "" if step is None else _EARLY
            records |= {prefix + name: np.asarray(value)[None] for name, value in measured.items()}
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Trace, norm, negative shares, effective rank and both ends of each phase, with intervals over probes."""
        summary = {
            "probes": len(records["row"]),
            "parameters": int(records["parameters"][0]),
            "weight_decay": float(records["weight_decay"][0]),
            **self._summarise_phase(records, ""),
        }
        summary["caveats"].insert(
            0,
            f"Intervals are over {len(records['row'])} probes of one batch of {records['rows'].shape[1]} images: they do not "
            "hold the spread over batches.",
        )
        return self._with_early(summary, records, lambda prefix: self._summarise_phase(records, prefix))

    def _summarise_phase(self, records: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
        found = density(records, prefix)
        decay = float(records["weight_decay"][0])
        # The L2 term is the same in every direction: what counts directions is of the loss alone.
        plain = dataclasses.replace(found, nodes=found.nodes - decay)
        residuals = records[f"{prefix}residuals"]
        largest, smallest = np.nanargmax(found.nodes), np.nanargmin(found.nodes)
        floor = self._floor(found)
        summary = {
            "trace": _over_probes(lambda part: part.trace().value, plain),
            "trace_of_l2": decay * found.dimension,
            "frobenius": _over_probes(_frobenius, plain),
            "effective_rank": _over_probes(lambda part: curvature.effective_rank(part).value, plain),
            "negative_share": _over_probes(lambda part: part.negative(floor).value, found),
            "negative_mass": _over_probes(lambda part: part.negative_mass(floor).value, found),
            "negative_share_of_loss": _over_probes(lambda part: part.negative(floor).value, plain),
            "negative_mass_of_loss": _over_probes(lambda part: part.negative_mass(floor).value, plain),
            "negative_share_by_rounding": _over_probes(lambda part: part.negative().value, found),
            # The estimate of a converged residual is below the rounding of the arithmetic, the residual is not.
            "largest": _end(found, residuals, largest),
            "smallest": _end(found, residuals, smallest),
            "condition_number_at_least": _finite(_condition(found, residuals)),
            "noise": found.noise,
            "floor": floor,
            "loss": float(records[f"{prefix}loss"][0]),
            "applications": found.applications,
        }
        caveats = []
        share, rounding = summary["negative_share"]["value"], summary["negative_share_by_rounding"]["value"]
        if rounding > share:
            caveats.append(
                f"{rounding:.2%} of the eigenvalues are negative by more than rounding; what lies nearer to zero than "
                f"{floor:.2g} is not counted, because {self.rank} Lanczos steps tell no single eigenvalues apart there: a sign "
                "is that of an average."
            )
        relative = [
            summary[end]["residual"] / max(abs(summary[end]["value"]), 1e-300) for end in ("largest", "smallest")
        ]
        if relative[0] > 1e-2:
            caveats.append(
                f"The largest eigenvalue has a relative residual of {relative[0]:.1e} after {self.rank} Lanczos steps: raise "
                "`rank`."
            )
        summary["caveats"] = caveats
        return summary

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """The densities of all runs side by side, as they are published, and on an axis that shows both signs."""
        if not findings:
            return {}
        densities = {
            run: {
                phase: density(finding.records, prefix)
                for phase, prefix in (("end", ""), ("early", _EARLY))
                if f"{prefix}nodes" in finding.records
            }
            for run, finding in findings.items()
        }
        summaries = {run: finding.summary for run, finding in findings.items()}
        return {
            "hessian_density": density_figures.linear(densities, summaries),
            "hessian_density_signs": density_figures.stretched(densities, summaries),
        }

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """The trace."""
        return {f"trace of the {_words(self.operator)}": study.number(finding.summary["trace"], ".3g")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run and phase."""
        caption = (
            f"{_words(self.operator)} of NLL + L2 on {self.batch} images of the augmented training stream, {self.probes} probes "
            f"of rank {self.rank}. Negative eigenvalues: share of all by number, beyond {self.floor:g} of the largest magnitude; "
            "negative mass: their share by magnitude. Effective rank: (Σ|λ|)² / Σλ². 95 % bootstrap intervals over probes; of "
            "the two ends the residual, within which there is an eigenvalue."
        ) + training_loss.mixed(findings)
        title = f"Spectrum of the {_words(self.operator)}"
        return {"hessian_density": spectrum_tables.densities(findings, title=title, caption=caption)}

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Differences of the trace and of the negative share, where both runs saw the same images."""
        rows = training_loss.paired(first, second)
        if rows is None:
            return []
        left, right = rows
        compared = []
        for words, format, number in (
            (f"trace of the {_words(self.operator)} of the loss", "+.3g", _traces),
            ("share of negative eigenvalues", "+.2%", self._negative_shares),
        ):
            pair = [number(finding.records)[rows] for finding, rows in ((first, left), (second, right))]
            difference = statistics.paired_difference(*pair, over="probes")
            test = statistics.sign_flip(*pair, over="probes")
            compared.append(study.comparison(words, difference, test, format))
        return compared

    def _floor(self, found: curvature.Density) -> float:
        return max(self.floor * float(np.nanmax(np.abs(found.nodes))), found.noise)

    def _negative_shares(self, records: Mapping[str, np.ndarray]) -> np.ndarray:
        found = density(records)
        return np.where(np.nan_to_num(found.nodes) < -self._floor(found), found.weights, 0.0).sum(axis=1)


def density(records: Mapping[str, np.ndarray], prefix: str = "") -> curvature.Density:
    """The density of records, to be integrated or drawn with any kernel width (`Density.integral`, `Density.curve`).

    Args:
      records: of this study.
      prefix: "early/" for the early phase.
    """
    return curvature.Density(
        nodes=records[f"{prefix}nodes"],
        weights=records[f"{prefix}weights"],
        dimension=int(records["parameters"][0]),
        noise=float(records[f"{prefix}noise"].max()),
        applications=int(records[f"{prefix}applications"].sum()),
    )


def _logits(params: Any, batch: Mapping[str, jax.Array], classifier: Any) -> jax.Array:
    return classifier.with_params(params)(batch["image"])


def _over_probes(statistic, found: curvature.Density) -> dict[str, Any]:
    def of(nodes: np.ndarray, weights: np.ndarray) -> float:
        return statistic(dataclasses.replace(found, nodes=nodes, weights=weights))

    interval = statistics.bootstrap(of, found.nodes, found.weights, draws=500, over="probes")
    return dataclasses.asdict(interval)


def _frobenius(found: curvature.Density) -> float:
    return math.sqrt(found.dimension * found.integral(lambda nodes: nodes**2).value)


def _condition(found: curvature.Density, residuals: np.ndarray) -> float:
    there = np.isfinite(found.nodes)
    return curvature.condition_number(found.nodes[there], residuals[there], noise=found.noise)


def _end(found: curvature.Density, residuals: np.ndarray, place: int) -> dict[str, float]:
    return {"value": float(found.nodes.flat[place]), "residual": max(float(residuals.flat[place]), found.noise)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _traces(records: Mapping[str, np.ndarray]) -> np.ndarray:
    found = density(records)
    forms = (found.weights * np.nan_to_num(found.nodes)).sum(axis=1)
    return found.dimension * (forms - records["weight_decay"])


def _words(operator: str) -> str:
    return "Hessian" if operator == "hessian" else "Gauss-Newton matrix"
