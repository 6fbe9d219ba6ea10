"""Certified robustness: up to what size is it proven that no change of an image changes the smoothed model's answer?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import attacks, errors, mesh, programs, tables
from robust_vit.attacks import smoothing
from robust_vit.metrics import statistics
from robust_vit.studies import certificate_figures, forward, study

_POINTS = 41  # Radii at which a curve is drawn.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate(study.Study):
    """Certified accuracy of the smoothed model against the L2 radius, beside what an attack on it finds.

    The smoothed model answers with the class that the model gives most often under Gaussian noise of standard deviation sigma
    on the pixels in [0, 1] (Cohen et al., CERTIFY: one-sided Clopper-Pearson bound at `alpha`, abstention). The certified
    accuracy at r is the share of images that are proven to have their label within r, a lower bound of the smoothed model's
    robust accuracy. PGD in L2 on the mean probability over `attack_samples` draws gives an upper bound beside it: an image is
    broken at r where the attacked image, of that radius or a smaller one, is certified to have another class at radius 0. One
    certificate errs with probability `alpha`; an image that is both certified and broken is such an error, and is reported.

    Departures: Cohen et al. certify 500 images with 100,000 samples each and models trained under noise; the defaults here are
    fewer images and 1,000 samples, which end at 2.46 sigma instead of 3.81, and any model.

    Attributes:
      sigmas: standard deviations of the noise, in pixel units [0, 1].
      radii: L2 radii of the table, at which the attack is run.
      selection: samples that choose the class.
      estimation: samples that prove it.
      alpha: probability that a certificate is wrong.
      steps: of the attack; 0 leaves it out.
      attack_samples: draws of the noise for one evaluation of the attack.
      samples: noisy copies of an image in one call of the model.
      examples: how many test images, the first in the order of the data set, or None for all.
      batch: images a compiled step; one batch is one chunk; or "auto", as many as the device has use and memory for.
    """

    name: ClassVar[str] = "certificate"
    title: ClassVar[str] = "Certified robustness"
    question: ClassVar[str] = "Up to what size is it proven that no change of an image can change the answer?"
    paper: ClassVar[str] = (
        "Cohen et al. 2019, Certified Adversarial Robustness via Randomized Smoothing, arXiv 1902.02918"
    )
    captions: ClassVar[Mapping[str, str]] = {
        "certificate": (
            "Share of the images whose label is proven for every change up to an L2 norm of r, one line a noise level σ; bands "
            "are 95 % Clopper-Pearson intervals over images. Open markers are the images that an attack of that size leaves: "
            "the robust accuracy of the smoothed model lies between the line and the marker"
        )
    }

    sigmas: tuple[float, ...] = (0.25, 0.5)
    radii: tuple[float, ...] = (0.25, 0.5, 1.0)
    selection: int = 100
    estimation: int = 1000
    alpha: float = 0.001
    steps: int = 10
    attack_samples: int = 8
    samples: int = 20
    examples: int | None = 64
    batch: int | str = 16

    def __post_init__(self):
        super().__post_init__()
        for name, values in (("sigmas", self.sigmas), ("radii", self.radii)):
            if not values or any(value <= 0 for value in values) or list(values) != sorted(set(values)):
                raise errors.UserError(f"{name} is {values}: give positive numbers in rising order.")
        for name, least in (("selection", 1), ("estimation", 1), ("steps", 0), ("attack_samples", 1), ("samples", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise errors.UserError(f"{name} is {value!r}: expected a whole number from {least}.")
        if not 0 < self.alpha < 0.5:
            raise errors.UserError(f"alpha is {self.alpha}: expected a probability of error in (0, 0.5).")

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs a model that does not draw, and for the attack one that can be differentiated."""
        if getattr(subject.classifier, "stochastic", False):
            return "the model draws itself: certificates are of a deterministic model under Gaussian noise"
        return forward.not_differentiable(subject) if self.steps else None

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.examples)

    def _attack(self, radius: float) -> attacks.Attack:
        return attacks.build("pgd", epsilon=radius, norm="l2", steps=self.steps)

    def _smoothed(self, subject: study.Subject, sigma: float) -> Any:
        """What the attack sees."""
        return smoothing.smooth(subject.classifier, sigma=sigma, samples=self.attack_samples)

    def _votes(self) -> int:
        return smoothing.Vote(self.samples, self.selection, self.estimation).chunks * self.samples

    def chunks(self, subject: study.Subject) -> int:
        """One a batch."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """Votes for the clean image and each attacked one, and the steps of the attacks on every draw."""
        images = self.chunks(subject) * self.batch
        runs = len(self.radii) if self.steps else 0
        steps, judged = 0, 0
        if self.steps:
            attack = self._attack(1.0).against(self._smoothed(subject, 1.0))
            steps, judged = attack.evaluations, attack.judge_passes
        sigmas = len(self.sigmas)
        backward = sigmas * runs * steps * self.attack_samples
        forward_ = sigmas * ((1 + runs) * self._votes() + runs * judged * self.attack_samples) + backward
        return images * (forward_ + 1), images * backward

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Forward pass, votes, and start, step and judgement of the attack."""
        chunks, images = self.chunks(subject), forward.images(subject, self.batch)
        runs = chunks * len(self.sigmas)
        attacked = runs * (len(self.radii) if self.steps else 0)
        sizes = {"selection": self.selection, "estimation": self.estimation, "chunk": self.samples}
        found = [
            forward.program(subject, self.batch, times=chunks),
            smoothing.program(subject.classifier, images, times=runs + attacked, **sizes),
        ]
        if self.steps:
            planned = attacks.programs(self._attack(1.0), self._smoothed(subject, 1.0), images)
            found += [dataclasses.replace(program, times=program.times * attacked) for program in planned]
        return found

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """For each image and sigma: class, radius and votes, and at each radius whether the attack provably broke it."""
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        logits, real = forward.logits(subject, batch)
        labels = real["label"].astype(np.int32)
        images, given, keys = forward.examples(subject, batch)
        # Padding repeats the first row, as `forward.examples` does with the pixels.
        rows = np.asarray(batch["row"])[np.where(mask, np.arange(len(mask)), np.flatnonzero(mask)[0])]
        options = {
            "rows": rows,
            "seed": subject.seed,
            "selection": self.selection,
            "estimation": self.estimation,
            "alpha": self.alpha,
            "chunk": self.samples,
            "mesh": subject.mesh,
        }
        records = {
            "row": real["row"].astype(np.int32),
            "label": labels,
            "prediction": logits.argmax(axis=1).astype(np.int32),
        }
        if index == 0:
            records["exhibit/sigmas"] = np.asarray(self.sigmas)
            records["exhibit/radii"] = np.asarray(self.radii)
        for sigma in self.sigmas:
            found = smoothing.certify(subject.classifier, mesh.fetch(images), sigma=sigma, **options)
            name = f"{sigma:g}"
            records[f"prediction/{name}"] = found.prediction[mask]
            records[f"radius/{name}"] = found.radius[mask]
            records[f"votes/{name}"] = found.votes[mask]
            if not self.steps:
                continue
            smoothed = self._smoothed(subject, sigma)
            broken = []
            for radius in self.radii:
                attacked = mesh.fetch(self._attack(radius)(smoothed, keys, images, given).images)
                judged = smoothing.certify(subject.classifier, attacked, sigma=sigma, **options).prediction
                broken.append(((judged != smoothing.ABSTAIN) & (judged != mesh.fetch(given)))[mask])
            records[f"broken/{name}"] = np.stack(broken, axis=1)
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Certified and attacked accuracy by sigma and radius, abstentions, mean radii."""
        labels, count = records["label"], len(records["label"])
        levels, caveats = {}, []
        for sigma in records["exhibit/sigmas"]:
            levels[f"{sigma:g}"] = level = self._level(records, float(sigma))
            if level["contradictions"]:
                caveats.append(
                    f"At σ = {sigma:g}, {level['contradictions']} of {count} images are both certified and broken: an error of "
                    f"probability {self.alpha:g} for each certificate, or one of the model's arithmetic."
                )
            if level["abstained"]["value"] > 0.2:
                caveats.append(
                    f"At σ = {sigma:g} the smoothed model abstains on {level['abstained']['value']:.0%} of the images: the model "
                    "was hardly trained under such noise, or there are too few samples."
                )
        caveats.append(
            f"Radii end at {smoothing.largest_radius(self.estimation, sigma=1.0, alpha=self.alpha):.2f} σ with "
            f"{self.estimation:,} samples; each certificate holds with probability {1 - self.alpha:g}."
        )
        right = (records["prediction"] == labels).sum()
        return {
            "examples": count,
            "norm": "l2",
            "alpha": self.alpha,
            "radii": np.asarray(records["exhibit/radii"]).tolist(),
            "clean": _plain(statistics.proportion(right, count)),
            "levels": levels,
            "caveats": caveats,
        }

    def _level(self, records: Mapping[str, np.ndarray], sigma: float) -> dict[str, Any]:
        name, labels = f"{sigma:g}", records["label"]
        prediction, radius = records[f"prediction/{name}"], records[f"radius/{name}"]
        right, count = prediction == labels, len(labels)
        largest = smoothing.largest_radius(self.estimation, sigma=sigma, alpha=self.alpha)

        def certified(size: float) -> dict[str, Any]:
            return {"radius": size, **_plain(statistics.proportion((right & (radius >= size)).sum(), count))}

        level: dict[str, Any] = {
            "sigma": sigma,
            "largest_radius": largest,
            "abstained": _plain(statistics.proportion((prediction == smoothing.ABSTAIN).sum(), count)),
            "mean_radius": _plain(statistics.mean(np.where(right, radius, 0.0))),
            "certified": [certified(float(size)) for size in records["exhibit/radii"]],
            "curve": [certified(float(size)) for size in np.linspace(0.0, largest, _POINTS)],
            "attacked": [],
            "contradictions": 0,
        }
        if f"broken/{name}" in records:
            wrong = (prediction != smoothing.ABSTAIN) & ~right
            broken = np.logical_or.accumulate(records[f"broken/{name}"], axis=1)
            sizes = records["exhibit/radii"]
            level["contradictions"] = int((broken & right[:, None] & (radius[:, None] >= sizes)).any(axis=1).sum())
            level["attacked"] = [
                {"radius": float(size), **_plain(statistics.proportion((~(broken[:, i] | wrong)).sum(), count))}
                for i, size in enumerate(sizes)
            ]
        return level

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Certified accuracy against the radius, of all runs and sigmas."""
        return {"certificate": certificate_figures.curves(findings)} if findings else {}

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """Certified accuracy at the first radius under the least noise."""
        level = next(iter(finding.summary["levels"].values()))
        at = level["certified"][0]
        return {f"certified accuracy (L2, r = {at['radius']:g}, σ = {level['sigma']:g})": study.number(at, ".1%")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run and sigma: certified and attacked accuracy at each radius."""
        rows, radii = [], self.radii
        for run, finding in findings.items():
            for level in finding.summary["levels"].values():
                attacked = level["attacked"] or [None] * len(radii)
                bounds = [c for pair in zip(level["certified"], attacked, strict=True) for c in pair]
                rows.append(
                    (
                        run,
                        f"{level['sigma']:g}",
                        study.number(finding.summary["clean"], ".1%"),
                        study.number(level["abstained"], ".1%"),
                        study.number(level["mean_radius"], ".3f"),
                        *(study.number(cell, ".1%") for cell in bounds),
                    )
                )
        columns = [f"{kind}, r = {radius:g}" for radius in radii for kind in ("certified", "attacked")]
        return {
            "certificate": tables.Table(
                "Certified accuracy of the smoothed model",
                ("run", "σ", "clean, no noise", "abstains", "mean certified radius", *columns),
                rows,
                f"L2 in pixel units [0, 1]. Certified: {self.estimation:,} samples, each certificate wrong with probability "
                f"{self.alpha:g} at most; attacked: what PGD with {self.steps} steps on the mean of {self.attack_samples} draws "
                "leaves. The robust accuracy of the smoothed model lies between the two. Radii count as 0 where the model is "
                "wrong or abstains. 95 % intervals over images: Clopper-Pearson; bootstrap for the mean radius.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Certified accuracy at the first radius for each sigma, on the images that both have."""
        left, right = study.pair(first, second)
        if not len(left) or first.summary["levels"].keys() != second.summary["levels"].keys():
            return []
        found = []
        for name in first.summary["levels"]:
            bits = [_right(f, name, self.radii[0])[rows] for f, rows in ((first, left), (second, right))]
            difference = statistics.paired_difference(*(b.astype(float) for b in bits))
            quantity = f"certified accuracy (L2, r = {self.radii[0]:g}, σ = {name})"
            found.append(study.comparison(quantity, difference, statistics.mcnemar(*bits), "+.2%"))
        return found

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """What is proven, with what error, besides."""
        summary = finding.summary
        levels = {
            name: {key: level[key] for key in ("abstained", "mean_radius", "certified", "attacked", "contradictions")}
            for name, level in summary["levels"].items()
        }
        return {
            **super().card(finding),
            "norm": "l2",
            "alpha": summary["alpha"],
            "levels": levels,
            "subset": "the first images in the order of the data set, misclassified ones included",
        }


def _right(finding: study.Finding, name: str, radius: float) -> np.ndarray:
    records = finding.records
    return (records[f"prediction/{name}"] == records["label"]) & (records[f"radius/{name}"] >= radius)


def _plain(interval: statistics.Interval) -> dict[str, Any]:
    return dataclasses.asdict(interval)
