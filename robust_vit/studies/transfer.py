"""Transfer: do the adversarial examples of one model fool the others?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import attacks, errors, mesh, programs, tables
from robust_vit.attacks import transfer
from robust_vit.metrics import statistics
from robust_vit.studies import attack_entries, attack_figures, forward, study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer(study.Study):
    """Adversarial examples made on each run (the source) and tried on all runs of the workdir (the targets).

    Each run's records hold one row of the matrix: what every target takes the clean and the attacked images for. Success is
    counted over the images that source and target both get right, so that the error which a target has anyway is no success of
    the source; the raw error of the target over all images stands beside it. The diagonal is the white-box attack.

    Departures from the attack's defaults: it takes all its steps (`stop_on_success=False`, where an attack has that option),
    for an image that stops at the source's boundary fools few others.

    Attributes:
      attacks: names of bounded attacks of `robust_vit.attacks`, with options where the defaults are not meant.
      threat: the threat model's name, or None for the subject's; it gives norm and epsilon.
      epsilon: in pixel units [0, 1], in place of the threat's; fractions such as "8/255" are read.
      norm: with `epsilon` and no threat, the norm.
      steps: of every attack that takes steps and whose entry does not say; None leaves each its own default.
      examples: how many test images, the first in the order of the data set; None is the threat's number
        (`robust_vit.attacks.ThreatModel`), or all where it names none.
      batch: images a compiled step; one batch is one chunk; or "auto", as many as the device has use and memory for.
    """

    name: ClassVar[str] = "transfer"
    title: ClassVar[str] = "Transfer of adversarial examples"
    question: ClassVar[str] = "Does an image that was made to fool one model fool the others too?"
    paper: ClassVar[str] = "Papernot et al. 2016, arXiv 1605.07277; Bhojanapalli et al. 2021, arXiv 2103.14586"
    reads_rivals: ClassVar[bool] = True
    captions: ClassVar[Mapping[str, str]] = {
        "transfer": (
            "Rows: the model on which the images were made. Columns: the model that they are shown to. Share of the images that "
            "both get right as they are and that fool the column's model when attacked; on the outlined diagonal a model sees "
            "its own"
        ),
    }

    attacks: tuple[str, ...] = ("pgd",)
    threat: str | None = None
    epsilon: float | str | None = None
    norm: str = "linf"
    steps: int | None = None
    examples: int | None = None
    batch: int | str = 64

    def __post_init__(self):
        super().__post_init__()
        attack_entries.parse(self.attacks)
        if self.threat is not None:
            attacks.threat(self.threat)

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs another run, a threat model, and a model that can be differentiated."""
        if not subject.rivals:
            return "there is only one model: transfer needs two runs or more that tell the same classes apart"
        if self.threat is None and subject.threat is None and self.epsilon is None:
            return "no threat model is set: give one such as threat='cifar10/linf-8', or epsilon"
        self._built(subject)  # Refuses options and norms that an attack does not know, before any compute is spent.
        return forward.not_differentiable(subject)

    def _built(self, subject: study.Subject) -> dict[str, attacks.Attack]:
        norm, epsilon = attack_entries.budget(self, subject)
        options = {"steps": self.steps, "stop_on_success": False}
        built = {entry.text: entry.build(norm, epsilon, **options) for entry in attack_entries.parse(self.attacks)}
        for name, attack in built.items():
            if attack.minimal:
                raise errors.UserError(
                    f"attack {name!r} seeks the nearest success, which is at the source's own boundary: transfer takes bounded "
                    "attacks, such as 'pgd'."
                )
        return built

    def _targets(self, subject: study.Subject) -> dict[str, Any]:
        return {subject.name: subject.classifier, **subject.rivals}

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.limit(subject))

    def chunks(self, subject: study.Subject) -> int:
        """One a batch."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """The attack on the source; a pass a target and attack, and one a target for the clean images."""
        built, targets = self._built(subject).values(), len(self._targets(subject))
        ahead = sum(attack.evaluations * attack.step_passes[0] + attack.judge_passes + targets for attack in built)
        back = sum(attack.evaluations * attack.step_passes[1] for attack in built)
        images = self.chunks(subject) * self.batch
        return images * (1 + targets + ahead), images * back

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Forward pass, attack and trial of each."""
        chunks = self.chunks(subject)
        images = forward.images(subject, self.batch)
        found = [forward.program(subject, self.batch, times=chunks)]
        targets = list(self._targets(subject).values())
        for name, attack in self._built(subject).items():
            for program in transfer.programs(subject.classifier, targets, attack, images):
                found.append(dataclasses.replace(program, name=f"{name}: {program.name}", times=program.times * chunks))
        # The clean images are tried as well.
        found += [
            dataclasses.replace(program, name="clean", times=chunks)
            for program in transfer.programs(subject.classifier, targets, attack, images)[-len(targets) :]
        ]
        return found

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """What each target takes the clean images for, and those that each attack made of them on this model."""
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        _, real = forward.logits(subject, batch)
        targets, (norm, epsilon) = self._targets(subject), attack_entries.budget(self, subject)
        images, given, keys = forward.examples(subject, batch)
        records = {"row": real["row"].astype(np.int32), "label": real["label"].astype(np.int32)}
        for name, target in targets.items():
            records[f"clean/{name}"] = mesh.fetch(transfer.predict(target, keys, images))[mask]
        for text, attack in self._built(subject).items():
            result, found = transfer.row(subject.classifier, targets.values(), attack, keys, images, given)
            records[f"distance/{text}"] = mesh.fetch(result.distance)[mask]
            for name, prediction in zip(targets, found, strict=True):
                records[f"attacked/{text}/{name}"] = mesh.fetch(prediction)[mask]
        if index == 0:
            records["exhibit/targets"] = np.asarray(list(targets))
            records["exhibit/norm"] = np.asarray([norm.name])
            records["exhibit/epsilon"] = np.asarray([epsilon])
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """For each attack and target the rate over images that both get right, and raw; and the mean over the other targets."""
        source, *others = names = [str(name) for name in records["exhibit/targets"]]
        attacked, outward = {}, {}
        for text in self.attacks:
            attacked[text] = {name: _entry(*_bits(records, text, source, name)) for name in names}
            bits = [_bits(records, text, source, name) for name in others]
            counted = sum((both for _, both in bits), np.zeros(len(records["label"]), int))
            fooled = sum((success & both for success, both in bits), np.zeros(len(records["label"]), int))
            shares = fooled[counted > 0] / counted[counted > 0]
            outward[text] = dataclasses.asdict(statistics.mean(shares)) if len(shares) else None
        caveats = [
            f"{source} and {name} get no image right in common: there is nothing to count."
            for name in others
            if attacked[self.attacks[0]][name]["rate"] is None
        ]
        caveats.append("An image that does not transfer may under another attack: these rates are lower bounds.")
        return {
            "examples": len(records["label"]),
            "source": source,
            "targets": names,
            "norm": str(records["exhibit/norm"][0]),
            "epsilon": float(records["exhibit/epsilon"][0]),
            "attacked": attacked,
            "outward": outward,
            "caveats": caveats,
        }

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """The matrix, one panel an attack."""
        if not findings:
            return {}
        names = list(dict.fromkeys(name for finding in findings.values() for name in finding.summary["targets"]))
        # The rows' order, so that the diagonal is one.
        names.sort(key=lambda name: list(findings).index(name) if name in findings else len(findings))
        labels = {entry.text: entry.label for entry in attack_entries.parse(self.attacks)}
        return {"transfer": attack_figures.matrix(findings, names, labels)}

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """How often its adversarial images fool the others."""
        entry = finding.summary["outward"][self.attacks[-1]]
        return {"fools other models": study.number(entry, ".1%")} if entry is not None else {}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a source, attack and way of counting; one column a target."""
        names = list(dict.fromkeys(name for finding in findings.values() for name in finding.summary["targets"]))
        rows = []
        for run, finding in findings.items():
            for text in filter(finding.summary["attacked"].get, self.attacks):
                targets = finding.summary["attacked"][text]
                for key, words in (("rate", "both right"), ("raw", "all")):
                    cells = (targets.get(name, {}).get(key) for name in names)
                    rows.append((run, text, words, *(study.number(cell, ".1%") for cell in cells)))
        summary = next(iter(findings.values())).summary if findings else {"norm": "linf", "epsilon": 0.0}
        return {
            "transfer": tables.Table(
                "Adversarial images of one model shown to another",
                ("made on", "attack", "images", *(f"shown to {name}" for name in names)),
                rows,
                f"{attack_figures.budget(summary)}. Share of images that fool the target: of those that "
                "both models get right as they are, and of all images (the target's own errors included). 95 % "
                "Clopper-Pearson intervals over images.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """How often the first's images fool the second against the other way round, on images that both get right."""
        left, right = study.pair(first, second)
        source, target = first.summary["source"], second.summary["source"]
        same = all(first.summary[key] == second.summary[key] for key in ("norm", "epsilon"))
        known = target in first.summary["targets"] and source in second.summary["targets"]
        if (
            not len(left)
            or not same
            or not known
            or first.summary["attacked"].keys() != second.summary["attacked"].keys()
        ):
            return []
        found = []
        for text in self.attacks:
            forth, both = (bits[left] for bits in _bits(first.records, text, source, target))
            back, _ = (bits[right] for bits in _bits(second.records, text, target, source))
            if both.any():
                difference = statistics.paired_difference(forth[both].astype(float), back[both].astype(float))
                test = statistics.mcnemar(forth[both], back[both])
                found.append(study.comparison(f"fools the other ({text})", difference, test, "+.2%"))
        return found

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """Source, targets and budget besides."""
        kept = {key: finding.summary[key] for key in ("source", "targets", "norm", "epsilon")}
        return {**super().card(finding), **kept, "subset": "the first images in the order of the data set"}


def _bits(records: Mapping[str, np.ndarray], text: str, source: str, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Whether the target errs on each attacked image, and whether source and target are right on the clean one."""
    labels = records["label"]
    both = (records[f"clean/{source}"] == labels) & (records[f"clean/{target}"] == labels)
    return records[f"attacked/{text}/{target}"] != labels, both


def _entry(success: np.ndarray, both: np.ndarray) -> dict[str, Any]:
    counted = int(both.sum())
    rate = statistics.proportion((success & both).sum(), counted) if counted else None
    return {
        "rate": None if rate is None else dataclasses.asdict(rate),
        "raw": dataclasses.asdict(statistics.proportion(success.sum(), len(success))),
        "both": counted,
    }
