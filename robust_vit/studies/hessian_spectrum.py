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
from robust_vit.studies import spectrum_figures, spectrum_numbers, spectrum_tables, study, training_loss

_PURPOSE = 0x68657373  # "hess": keeps the starting vectors apart from every other draw under the same seed.
_CHECK_EVERY = 10  # Lanczos steps between two looks at what has converged.
_EARLY = training_loss.EARLY


@dataclasses.dataclass(frozen=True, kw_only=True)
class HessianSpectrum(training_loss.TrainingLossStudy):
    """Top eigenvalues of the Hessian of the training loss, one mini-batch at a time, pooled into a density.

    Protocol of Park & Kim 2022 (arXiv 2202.06709, figures 1c and 4; their code for it was never released): mini-batches of
    16 of the *augmented training stream*, mixup and cutmix included, objective NLL + L2, the five eigenvalues of largest
    magnitude of each, their density over mini-batches, NEP = share of negative ones and APE = mean of the positive ones; at the
    end of training and, with `early`, at the end of the warm-up. Departures: Lanczos with residuals in place of PyHessian's power
    iteration with deflation (100 iterations, relative tolerance 1e-3, which returns λ2 for λ1 where they are close); ten
    mini-batches in place of a tenth of the training set; BatchNorm uses its running statistics and dropout is off, so that the
    operator is one linear map; each mini-batch has a draw of mixup or cutmix of its own, training one for its larger batch. The
    L2 term adds the weight decay to every eigenvalue exactly, over all parameters; decoupled decay (AdamW) is shifted by the same
    number, though it is no part of a loss. A value closer to zero than the rounding of the arithmetic has no sign.

    Attributes:
      batch: images a mini-batch.
      mini_batches: how many; one is a chunk.
      top: eigenvalues a mini-batch, by magnitude.
      rank: Lanczos steps at most; a step is a Hessian-vector product, 8/3 of a gradient.
      tolerance: relative residual at which a value counts as converged.
      label_smoothing: of the loss, or None for the subject's.
      weight_decay: of the L2 term, or None for the subject's.
      mixed: mix images and labels as the training of the subject does (`objective.mixup`, `objective.cutmix`), where it does.
      microbatch: images differentiated at a time; None for the mini-batch at once; or "auto", as many as there is memory for.
      early: measure the first kept checkpoint after the warm-up as well (`checkpoint.milestones`), on the same mini-batches:
        twice the cost.
      overlaps: keep the eigenvectors in memory for how far the top eigenspaces of two mini-batches in a row agree, and those of
        one mini-batch early and at the end (Gur-Ari et al. 2018, arXiv 1812.04754); no further products.
      blocks: the `top` eigenvalues in each block of the parameters as well; `rank` products a block at most.
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
            "The Hessian eigenvalues of largest magnitude in each block of the parameters alone. The large mark is the mean over "
            "mini-batches of the largest magnitude, small ones those of the next; hollow where most of them are negative"
        ),
    }

    counts: ClassVar[Mapping[str, int]] = {"batch": 1, "mini_batches": 1, "top": 1, "rank": 1, "together": 1}
    later: ClassVar[Mapping[str, Any]] = {
        "early": False,
        "overlaps": False,
        "blocks": False,
        "together": 1,
        "mixed": True,
    }

    batch: int = 16
    mini_batches: int = 10
    top: int = 5
    rank: int = 40
    tolerance: float = 1e-2
    label_smoothing: float | None = None
    weight_decay: float | None = None
    mixed: bool = True
    microbatch: int | str | None = None
    early: bool = False
    overlaps: bool = False
    blocks: bool = False
    together: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.mini_batches % self.together:
            raise errors.UserError(
                f"together is {self.together} for {self.mini_batches} mini-batches: expected a divisor of their number."
            )

    def chunks(self, subject: study.Subject) -> int:
        """One a mini-batch, or a group of them in lock-step."""
        del subject
        return self.mini_batches // self.together

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """At most: each Hessian-vector product counts as two forward and two backward passes an image; the loss is one more."""
        spectra = len(self._phases(subject)) * self.mini_batches
        solved = 1 + (len(curvature.parameter_blocks(subject.classifier.params)) if self.blocks else 0)
        products = 2 * spectra * solved * self.rank * self.batch
        return products + spectra * self.batch, products

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Lanczos over the Hessian of a mini-batch, and of one block of it, and its loss."""
        batch = self._batch_shapes(subject, self.batch)
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
        times = len(self._phases(subject)) * self.mini_batches
        return [dataclasses.replace(one, times=one.times * times) for one in planned]

    def _operator(self, subject: study.Subject, classifier: Any, batch: Mapping[str, jax.Array]) -> curvature.Operator:
        # In evaluation mode it is a mean over images.
        options = {"microbatch": self.microbatch, "weight_decay": self._decay(subject), "separable": False}
        return curvature.hessian(self._loss(subject), classifier.params, batch, classifier, **options)

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """Eigenvalues, residuals and the loss of each mini-batch: one record of one."""
        first = index * self.together
        return study.merge([self._record(subject, first + number) for number in range(self.together)])

    def _record(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        batch = self._mini_batch(subject, index, self.batch)
        records = {
            "row": np.asarray([index], np.int32),
            "label": np.asarray([-1], np.int32),
            "rows": np.asarray(batch["row"], np.int32)[None],
            "weight_decay": np.asarray([self._decay(subject)], np.float64),
            "parameters": np.asarray([trees.count(subject.classifier.params)], np.int64),
        }
        if "share" in batch:
            records["share"] = batch["share"][:1]
        spectra = {}
        for step in self._phases(subject):
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
            inputs.append(training_loss.inputs(subject, self._mini_batch(subject, index, self.batch)))
            keys.append(training_loss.draw(subject, _PURPOSE, index))
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
            for operator, key, entry in zip(operators, keys, more, strict=True):
                entry |= self._in_blocks(operator, key, options)
        return list(zip(found, more, strict=True))

    def _in_blocks(self, operator: curvature.Operator, key: jax.Array, options: Mapping[str, Any]) -> dict[str, Any]:
        """The top eigenvalues in each block, `[blocks, top]`; not a number where the block has fewer."""
        found = []
        for subset in curvature.parameter_blocks(operator.like).values():
            inside = curvature.within(operator, subset)
            # Beyond the dimension of the block there are the zeros of what is outside of it.
            sizes = jax.tree.map(lambda chosen, leaf: int(chosen) * leaf.size, inside.mask, inside.like)
            count = min(self.top, sum(jax.tree.leaves(sizes)))
            found.append(curvature.lanczos(inside, key, top=count, **options))
        missing = [(0, self.top - len(one.values)) for one in found]
        filled = {"values": np.nan, "residuals": np.nan, "converged": True}
        records = {
            f"blocks/{name}": np.stack(
                [
                    np.pad(getattr(one, name), ends, constant_values=fill)
                    for one, ends in zip(found, missing, strict=True)
                ]
            )
            for name, fill in filled.items()
        }
        return {**records, "blocks/applications": np.int32(sum(one.applications for one in found))}

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """NEP, APE and the largest eigenvalue of each phase, and what agrees of them, with intervals over mini-batches."""
        summary = {
            "mini_batches": len(records["row"]),
            "parameters": int(records["parameters"][0]),
            "weight_decay": float(records["weight_decay"][0]),
            **self._summarise_phase(records, ""),
        }
        self._with_early(summary, records, lambda prefix: self._summarise_phase(records, prefix))
        if f"{_EARLY}overlap_with_end" in records:
            summary["early"]["overlap_with_end"] = spectrum_numbers.interval(records[f"{_EARLY}overlap_with_end"])
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

        summary = {
            "nep": spectrum_numbers.negative(values, noise),
            "ape": spectrum_numbers.positive(values, noise),
            "largest": spectrum_numbers.interval(values.max(axis=1)),
            "smallest": spectrum_numbers.interval(values.min(axis=1)),
            "loss": spectrum_numbers.interval(records[f"{prefix}loss"]),
            "converged": share,
            "median_relative_residual": float(np.median(relative)),
            "unresolved": unresolved,
            "applications": int(records[f"{prefix}applications"].sum()),
            "caveats": caveats,
        }
        if f"{prefix}overlap" in records and len(values) > 1:
            summary["overlap"] = spectrum_numbers.interval(records[f"{prefix}overlap"][1:])
        if f"{prefix}blocks/values" in records:
            summary["blocks"] = spectrum_numbers.blocks(records, prefix)
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
        ) + training_loss.mixed(findings)
        title = f"Top {self.top} Hessian eigenvalues by magnitude"
        found = {"hessian_spectrum": spectrum_tables.eigenvalues(findings, title=title, caption=caption)}
        layered = {run: finding for run, finding in findings.items() if "blocks" in finding.summary}
        if layered:
            inside = f"{title} in each block of the parameters"
            found["hessian_blocks"] = spectrum_tables.blocks(layered, title=inside, caption=caption)
        return found

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """The difference of the largest eigenvalue, paired where both runs saw the same images in the same mini-batches."""
        rows = training_loss.paired(first, second)
        if rows is None:
            return []
        left, right = rows
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
