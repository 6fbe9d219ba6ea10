"""The Hessian's extreme eigenvalues: how sharply, and in which direction, does the loss curve around the weights?"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import classifier as classifiers
from robust_vit import curvature, errors, programs, tables, trees
from robust_vit.curvature import per_example
from robust_vit.metrics import statistics
from robust_vit.studies import forward, spectrum_figures, spectrum_tables, study, training_loss

_PURPOSE = 0x68657373  # "hess": keeps the starting vectors apart from every other draw under the same seed.
_CHECK_EVERY = 10  # Lanczos steps between two looks at what has converged.
_EARLY = "early/"  # Before the names of the records of the early phase.
# Settings that came later: left out of `settings()` where they are off, so that an older result still answers the same question.
_LATER = {"early": False, "overlaps": False, "blocks": False, "together": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HessianSpectrum(study.Study):
    """Top eigenvalues of the Hessian of the training loss, one mini-batch at a time, pooled into a density.

    Protocol of Park & Kim 2022 (arXiv 2202.06709, figures 1c and 4; their code for it was never released): mini-batches of
    16 of the *augmented training stream*, objective NLL + L2, the five eigenvalues of largest magnitude of each, their
    density over mini-batches, NEP = share of negative ones and APE = mean of the positive ones; at the end of training and, with
    `early`, at the end of the warm-up. Departures: Lanczos with
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
      early: measure the first kept checkpoint after the warm-up as well (`checkpoint.milestones`), on the same mini-batches:
        twice the cost.
      overlaps: keep the eigenvectors in memory for how far the top eigenspaces of two mini-batches in a row agree, and those of
        one mini-batch early and at the end (Gur-Ari et al. 2018, arXiv 1812.04754); no further products.
      blocks: the eigenvalue of largest magnitude in each block of the parameters as well; `rank` products a block at most.
      together: mini-batches solved in lock-step, a chunk; several devices share them. Where one mini-batch does not fill an
        accelerator it pays, on a CPU it does not. Divides `mini_batches`.
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
            "To the left of the dashed line the loss curves downwards. A dotted curve is the early phase of the same run"
        ),
        "hessian_overlaps": (
            "Overlap of top eigenspaces: the mean squared projection of one's eigenvectors on the other's. A mark is a "
            "mini-batch, the bar their mean with its interval"
        ),
        "hessian_blocks": (
            "The Hessian eigenvalue of largest magnitude in each block of the parameters alone, mean over mini-batches of its "
            "magnitude; a hollow mark where most of them are negative"
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
    early: bool = False
    overlaps: bool = False
    blocks: bool = False
    together: int = 1

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch", "mini_batches", "top", "rank", "together"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                # The mini-batch is what is measured, so memory cannot choose it: it chooses the part differentiated at a time.
                hint = ' (microbatch="auto" is what saves memory here)' if value == programs.AUTO else ""
                raise errors.UserError(f"{name} is {value!r}: expected a whole number from 1{hint}.")
        if self.mini_batches % self.together:
            raise errors.UserError(
                f"together is {self.together} for {self.mini_batches} mini-batches: expected a divisor of their number."
            )

    def settings(self) -> dict[str, Any]:
        """As of every study; what came later is left out where it is off."""
        return {
            name: value for name, value in super().settings().items() if name not in _LATER or value != _LATER[name]
        }

    def looks_back(self, subject: study.Subject) -> tuple[int, ...]:
        """The early step, where it is asked for and there is one."""
        return tuple(step for step in training_loss.phases(subject, self.early) if step is not None)

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs parameters and a training stream."""
        return training_loss.unavailable(subject)

    def chunks(self, subject: study.Subject) -> int:
        """One a mini-batch, or a group of them in lock-step."""
        del subject
        return self.mini_batches // self.together

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """At most: each Hessian-vector product counts as two forward and two backward passes an image; the loss is one more."""
        spectra = len(training_loss.phases(subject, self.early)) * self.mini_batches
        solved = 1 + (len(curvature.parameter_blocks(subject.classifier.params)) if self.blocks else 0)
        products = 2 * spectra * solved * self.rank * self.batch
        return products + spectra * self.batch, products

    def most(self, subject: study.Subject) -> int:
        """The mini-batch."""
        del subject
        return self.batch

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Lanczos over the Hessian of a mini-batch, and of one block of it, and its loss."""
        batch = training_loss.batch_shapes(subject, self.batch)
        classifier = classifiers.in_float32(subject.classifier)
        loss = self._loss(subject)
        operator = self._operator(subject, classifier, batch)
        check_every = min(_CHECK_EVERY, self.rank)
        if self.together == 1:
            planned = curvature.programs(operator, rank=self.rank, check_every=check_every)
        else:
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.together))
            stacked = curvature.together([operator] * self.together, mesh=subject.mesh)
            steps = per_example.planned(stacked, keys, rank=self.rank, check_every=check_every)
            planned = [dataclasses.replace(one, times=one.times / self.together) for one in steps]
        if self.blocks:
            subsets = curvature.parameter_blocks(classifier.params)
            inside = curvature.within(operator, next(iter(subsets.values())))
            steps = curvature.programs(inside, rank=self.rank, check_every=check_every)
            planned += [dataclasses.replace(one, times=one.times * len(subsets)) for one in steps]
        planned.append(programs.Program("loss", training_loss.value, (classifier, batch), times=1, static=(loss,)))
        times = len(training_loss.phases(subject, self.early)) * self.mini_batches
        return [dataclasses.replace(one, times=one.times * times) for one in planned]

    def _loss(self, subject: study.Subject) -> training_loss.MeanLoss:
        return training_loss.MeanLoss(training_loss.smoothing(subject, self.label_smoothing))

    def _decay(self, subject: study.Subject) -> float:
        return training_loss.decay(subject, self.weight_decay)

    def _operator(self, subject: study.Subject, classifier: Any, batch: Mapping[str, jax.Array]) -> curvature.Operator:
        loss, decay = self._loss(subject), self._decay(subject)
        options = {
            "microbatch": self.microbatch,
            "weight_decay": decay,
            "separable": False,
        }  # In evaluation mode it is one.
        return curvature.hessian(loss, classifier.params, batch, classifier, **options)

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """Eigenvalues, residuals and the loss of each mini-batch: one record of one."""
        first = index * self.together
        return study.merge([self._record(subject, first + number) for number in range(self.together)])

    def _record(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        batch = forward.training_examples(subject.train, index * self.batch, self.batch)
        records = {
            "row": np.asarray([index], np.int32),
            "label": np.asarray([-1], np.int32),
            "rows": np.asarray(batch["row"], np.int32)[None],
            "weight_decay": np.asarray([self._decay(subject)], np.float64),
            "parameters": np.asarray([trees.count(subject.classifier.params)], np.int64),
        }
        spectra = {}
        for step in training_loss.phases(subject, self.early):
            prefix = "" if step is None else _EARLY
            found, more = spectra[prefix] = self._measured(subject, step, index)
            measured = {
                "eigenvalues": np.asarray(found.values, np.float64),
                "residuals": np.asarray(found.residuals, np.float64),
                "converged": np.asarray(found.converged, bool),
                "noise": np.float64(found.noise),
                "applications": np.int32(found.applications),
                **more,
            }
            if step is not None:
                measured["step"] = np.int32(step)
            if self.overlaps:
                before = self._measured(subject, step, index - 1)[0] if index else None
                measured["overlap"] = np.float64(
                    np.nan if before is None else curvature.overlap(before.vectors, found.vectors)
                )
            records |= {prefix + name: np.asarray(value)[None] for name, value in measured.items()}
        if self.overlaps and _EARLY in spectra:
            records[f"{_EARLY}overlap_with_end"] = np.asarray(
                [curvature.overlap(spectra[_EARLY][0].vectors, spectra[""][0].vectors)], np.float64
            )
        if self.blocks and index == 0:
            records[f"{study.EXHIBIT}blocks"] = np.asarray(list(curvature.parameter_blocks(subject.classifier.params)))
        if index == self.mini_batches - 1:
            _recent.cache_clear()
            _group.cache_clear()
        return records

    def _measured(
        self, subject: study.Subject, step: int | None, index: int
    ) -> tuple[curvature.Eigenvalues, dict[str, np.ndarray]]:
        """The spectrum of one mini-batch at a step, and what else is measured there; kept where its neighbours need it."""
        return _recent(self, subject, step, index) if self.overlaps else self._measure(subject, step, index)

    def _measure(
        self, subject: study.Subject, step: int | None, index: int
    ) -> tuple[curvature.Eigenvalues, dict[str, np.ndarray]]:
        if self.together > 1:
            return _group(self, subject, step, index // self.together)[index % self.together]
        return self._solve(subject, step, [index])[0]

    def _solve(
        self, subject: study.Subject, step: int | None, indices: Sequence[int]
    ) -> list[tuple[curvature.Eigenvalues, dict[str, np.ndarray]]]:
        """The spectra of mini-batches, in lock-step where they are several, and what else is measured of each."""
        classifier = training_loss.model(subject, step)
        inputs, keys = [], []
        for index in indices:
            batch = forward.training_examples(subject.train, index * self.batch, self.batch)
            inputs.append(subject.put({"image": batch["image"], "label": batch["label"]}))
            keys.append(jax.random.fold_in(jax.random.fold_in(jax.random.key(subject.seed), _PURPOSE), index))
        operators = [self._operator(subject, classifier, batch) for batch in inputs]
        options = {"rank": self.rank, "tolerance": self.tolerance, "check_every": min(_CHECK_EVERY, self.rank)}
        if len(indices) == 1:
            found = [curvature.lanczos(operators[0], keys[0], top=self.top, vectors=self.overlaps, **options)]
        else:
            stacked = curvature.together(operators, mesh=subject.mesh)
            several = jax.numpy.stack(keys)
            each = curvature.example_eigenvalues(stacked, several, top=self.top, vectors=self.overlaps, **options)
            found = [each.of(number) for number in range(len(indices))]
        more = [{"loss": np.float64(training_loss.value(self._loss(subject), classifier, batch))} for batch in inputs]
        if self.blocks:
            subsets = curvature.parameter_blocks(classifier.params).values()
            for operator, key, entry in zip(operators, keys, more, strict=True):
                tops = [curvature.lanczos(curvature.within(operator, one), key, top=1, **options) for one in subsets]
                for name in ("values", "residuals", "converged"):
                    entry[f"blocks/{name}"] = np.concatenate([getattr(top, name) for top in tops])
                entry["blocks/applications"] = np.int32(sum(top.applications for top in tops))
        return list(zip(found, more, strict=True))

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """NEP, APE and the largest eigenvalue of each phase, and what agrees of them, with intervals over mini-batches."""
        summary = {
            "mini_batches": len(records["row"]),
            "parameters": int(records["parameters"][0]),
            "weight_decay": float(records["weight_decay"][0]),
            **self._summarise_phase(records, ""),
        }
        if f"{_EARLY}eigenvalues" in records:
            early = self._summarise_phase(records, _EARLY)
            summary["caveats"] += [f"In the early phase: {caveat}" for caveat in early.pop("caveats")]
            summary["early"] = {"step": int(records[f"{_EARLY}step"][0]), **early}
            if f"{_EARLY}overlap_with_end" in records:
                summary["early"]["overlap_with_end"] = _interval(records[f"{_EARLY}overlap_with_end"])
        elif self.early:
            summary["caveats"].append(
                "The run kept no checkpoint after its warm-up and before this one (checkpoint.milestones), so that only this one "
                "was measured."
            )
        if "overlap" in records:
            summary["chance_overlap"] = records["eigenvalues"].shape[1] / summary["parameters"]
        return summary

    def _summarise_phase(self, records: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
        values, noise = records[f"{prefix}eigenvalues"], records[f"{prefix}noise"]
        relative = records[f"{prefix}residuals"] / np.maximum(np.abs(values), 1e-300)
        caveats = []
        share = float(records[f"{prefix}converged"].mean())
        if share < 1.0:
            caveats.append(
                f"{1 - share:.0%} of the eigenvalues did not reach a relative residual of {self.tolerance:g} in {self.rank} "
                f"Lanczos steps (the worst has {relative.max():.1e}): raise `rank` before reading small differences."
            )
        unresolved = float((np.abs(values) <= noise[:, None]).mean())
        if unresolved > 0:
            caveats.append(
                f"{unresolved:.0%} of the eigenvalues are closer to zero than the rounding of the arithmetic: they have no "
                "sign and count neither as negative nor as positive."
            )

        def average_positive(values: np.ndarray, noise: np.ndarray) -> float:
            return curvature.positive_mean(values, noise=noise)

        summary = {
            "nep": _interval(curvature.negative_share(values, noise=noise)),
            "ape": dataclasses.asdict(statistics.bootstrap(average_positive, values, noise, over="mini-batches")),
            "largest": _interval(values.max(axis=1)),
            "smallest": _interval(values.min(axis=1)),
            "loss": _interval(records[f"{prefix}loss"]),
            "converged": share,
            "median_relative_residual": float(np.median(relative)),
            "unresolved": unresolved,
            "applications": int(records[f"{prefix}applications"].sum()),
            "caveats": caveats,
        }
        if f"{prefix}overlap" in records and len(values) > 1:
            summary["overlap"] = _interval(records[f"{prefix}overlap"][1:])
        if f"{prefix}blocks/values" in records:
            tops = records[f"{prefix}blocks/values"]
            summary["blocks"] = {
                str(name): {
                    "magnitude": _interval(np.abs(tops[:, index])),
                    "negative": float((tops[:, index] < 0).mean()),
                }
                for index, name in enumerate(records[f"{study.EXHIBIT}blocks"])
            }
            unfinished = 1.0 - float(records[f"{prefix}blocks/converged"].mean())
            if unfinished:
                caveats.append(f"{unfinished:.0%} of the blocks' eigenvalues did not converge: raise `rank`.")
        return summary

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """The density of the pooled eigenvalues, one ridge a run; overlaps and blocks where they were measured."""
        if not findings:
            return {}
        figures = {"hessian_spectrum": spectrum_figures.ridges(findings)}
        overlapping = {run: finding for run, finding in findings.items() if "chance_overlap" in finding.summary}
        if overlapping:
            figures["hessian_overlaps"] = spectrum_figures.overlaps(overlapping)
        layered = {run: finding for run, finding in findings.items() if "blocks" in finding.summary}
        if layered:
            figures["hessian_blocks"] = spectrum_figures.blocks(layered)
        return figures

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """The largest eigenvalue."""
        return {"top Hessian eigenvalue": study.number(finding.summary["largest"], ".3g")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run and phase."""
        caption = (
            f"{self.mini_batches} mini-batches of {self.batch} from the augmented training stream; loss NLL + L2; "
            "BatchNorm with running statistics, dropout off. 95 % bootstrap intervals over mini-batches."
        )
        title = f"Top {self.top} Hessian eigenvalues by magnitude"
        return {"hessian_spectrum": spectrum_tables.eigenvalues(findings, title=title, caption=caption)}

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """The difference of the largest eigenvalue, paired where both runs saw the same images in the same mini-batches."""
        left, right = study.pair(first, second)
        if len(left) < 2 or not np.array_equal(first.records["rows"][left], second.records["rows"][right]):
            return []
        compared = []
        for prefix, words in (("", ""), (_EARLY, ", early phase")):
            key = f"{prefix}eigenvalues"
            if key not in first.records or key not in second.records:
                continue
            pair = [finding.records[key][rows].max(axis=1) for finding, rows in ((first, left), (second, right))]
            difference = statistics.paired_difference(*pair, over="mini-batches")
            test = statistics.sign_flip(*pair, over="mini-batches")
            compared.append(study.comparison(f"largest Hessian eigenvalue{words}", difference, test, "+.3g"))
        return compared


@functools.lru_cache(maxsize=4)  # A mini-batch and the one before it, each in two phases.
def _recent(
    asked: HessianSpectrum, subject: study.Subject, step: int | None, index: int
) -> tuple[curvature.Eigenvalues, dict[str, np.ndarray]]:
    return asked._measure(subject, step, index)


@functools.lru_cache(maxsize=2)  # A group in two phases.
def _group(
    asked: HessianSpectrum, subject: study.Subject, step: int | None, number: int
) -> list[tuple[curvature.Eigenvalues, dict[str, np.ndarray]]]:
    return asked._solve(subject, step, range(number * asked.together, (number + 1) * asked.together))


def _interval(values: np.ndarray) -> dict[str, Any]:
    return dataclasses.asdict(statistics.mean(values, over="mini-batches"))
