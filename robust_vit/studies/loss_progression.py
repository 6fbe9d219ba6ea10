"""How the loss goes up, step by step, while an attack of one size runs: who gives way at once, and who holds out?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import attacks, errors, mesh, programs, tables
from robust_vit.attacks import progression
from robust_vit.metrics import classification, statistics
from robust_vit.studies import attack_entries, attack_figures, forward, study


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossProgression(study.Study):
    """Cross-entropy of the true label before each step of an attack and after the last, and the share still right.

    Paul & Chen climb with ten steps of Adam (`adam`) from the clean image and stop at nothing; `bim`, steps of the gradient's
    sign, is what others call PGD without a random start. All images take all steps; those that are misclassified as they are
    stay in, and count as not right.

    Departures from the original: there the saved run clips a ViT's perturbation at 0.002 and a BiT's at 0.001 and compares the
    two; here all models are attacked at one epsilon, which the figure states, of canonical pixels in [0, 1] rather than of
    [-1, 1], where the same number is half as much. Moved images are put back into [0, 1].

    Attributes:
      attacks: names of attacks by steps along the gradient, with options where the defaults are not meant.
      threat: the threat model's name, or None for the subject's; it gives norm and epsilon.
      epsilon: in pixel units [0, 1], in place of the threat's; fractions such as "8/255" are read.
      norm: with `epsilon` and no threat, the norm.
      steps: of every attack whose entry does not say.
      examples: how many test images, the first in the order of the data set; None is the threat's number
        (`robust_vit.attacks.ThreatModel`), or all where it names none.
      batch: images a compiled step; one batch is one chunk; or "auto", as many as the device has use and memory for.
    """

    name: ClassVar[str] = "loss_progression"
    title: ClassVar[str] = "Loss under attack"
    question: ClassVar[str] = (
        "How fast does an attack drive up the loss, step by step, when all models face the same size of it?"
    )
    paper: ClassVar[str] = "Paul & Chen 2022, Vision Transformers are Robust Learners, arXiv 2105.07581"
    captions: ClassVar[Mapping[str, str]] = {
        "loss_progression": (
            "Top: mean cross-entropy of the true label after each step, with 95 % bootstrap intervals over images. Bottom: share "
            "of the images that are still right, with 95 % Clopper-Pearson intervals"
        ),
    }

    attacks: tuple[str, ...] = ("bim", "adam")
    threat: str | None = None
    epsilon: float | str | None = None
    norm: str = "linf"
    steps: int | None = 10
    examples: int | None = 128
    batch: int | str = 64

    def __post_init__(self):
        super().__post_init__()
        attack_entries.parse(self.attacks)
        if self.threat is not None:
            attacks.threat(self.threat)

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs a threat model and a model that can be differentiated."""
        if self.threat is None and subject.threat is None and self.epsilon is None:
            return "no threat model is set: give one such as threat='cifar10/linf-8', or epsilon"
        self._built(subject)  # Refuses what no loss can be followed of, before any compute is spent.
        return forward.not_differentiable(subject)

    def _built(self, subject: study.Subject) -> dict[str, attacks.Attack]:
        norm, epsilon = attack_entries.budget(self, subject)
        options = {"steps": self.steps, "stop_on_success": False}
        built = {entry.text: entry.build(norm, epsilon, **options) for entry in attack_entries.parse(self.attacks)}
        for name, attack in built.items():
            if attack.minimal or attack.step_passes != (1, 1):
                raise errors.UserError(
                    f"attack {name!r} does not take one step along the gradient at a time: follow the loss of bim, pgd, mi_fgsm "
                    "or adam."
                )
        return built

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.limit(subject))

    def chunks(self, subject: study.Subject) -> int:
        """One a batch."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """A forward and backward pass a step, and a forward pass for the end of each attack and for the clean image."""
        back = [attack.evaluations for attack in self._built(subject).values()]
        images = self.chunks(subject) * self.batch
        return images * (1 + sum(back) + len(back)), images * sum(back)

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Forward pass, and start, step and last look of each attack."""
        chunks = self.chunks(subject)
        images = forward.images(subject, self.batch)
        found = [forward.program(subject, self.batch, times=chunks)]
        for name, attack in self._built(subject).items():
            for program in progression.programs(attack, subject.classifier, images):
                found.append(dataclasses.replace(program, name=f"{name}: {program.name}", times=program.times * chunks))
        return found

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """For each image and attack: loss and whether it is right, before each step and after the last."""
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        logits, real = forward.logits(subject, batch)
        labels = real["label"].astype(np.int32)
        records = {
            "row": real["row"].astype(np.int32),
            "label": labels,
            "prediction": logits.argmax(axis=1).astype(np.int32),
            "confidence": classification.confidence(logits).astype(np.float32),
        }
        images, given, keys = forward.examples(subject, batch)
        for name, attack in self._built(subject).items():
            found = mesh.fetch(progression.follow(attack, subject.classifier, keys, images, given))
            records[f"loss/{name}"] = found.losses[mask].astype(np.float32)
            records[f"right/{name}"] = ~found.achieved[mask]
            records[f"vanished/{name}"] = found.vanished[mask]
        if index == 0:
            norm, epsilon = attack_entries.budget(self, subject)
            records["exhibit/norm"] = np.asarray([norm.name])
            records["exhibit/epsilon"] = np.asarray([epsilon])
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Mean loss and share still right after each step of each attack."""
        caveats, curves = [], {}
        labels = {entry.text: entry.label for entry in attack_entries.parse(self.attacks)}
        for name in self.attacks:
            losses, right = records[f"loss/{name}"], records[f"right/{name}"]
            curves[name] = {
                "loss": [dataclasses.asdict(statistics.mean(column, draws=500)) for column in losses.T],
                "right": [dataclasses.asdict(statistics.proportion(bits.sum(), len(bits))) for bits in right.T],
            }
            means = losses.mean(axis=0)
            if means[-1] < 0.95 * means.max():
                caveats.append(
                    f"The loss under {labels[name]} falls again, from {means.max():.3g} to {means[-1]:.3g}: its steps are "
                    "too long, or the gradient misleads it."
                )
            gone = (records[f"vanished/{name}"] > 0).mean()
            if gone > 0.01:
                caveats.append(
                    f"{gone:.1%} of the images met a gradient that is zero or not finite under {labels[name]}."
                )
        return {
            "examples": len(records["label"]),
            "norm": str(records["exhibit/norm"][0]),
            "epsilon": float(records["exhibit/epsilon"][0]),
            "curves": curves,
            "caveats": caveats,
        }

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Loss and share still right against the steps, one column an attack."""
        if not findings:
            return {}
        labels = {entry.text: entry.label for entry in attack_entries.parse(self.attacks)}
        return {"loss_progression": attack_figures.progression(findings, labels)}

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """The mean loss at the end of the first attack."""
        name = self.attacks[0]
        entry = finding.summary["curves"][name]
        return {f"loss after {len(entry['loss']) - 1} steps ({name})": study.number(entry["loss"][-1], ".2f")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run and attack: clean, half way and at the end."""
        rows = []
        for run, finding in findings.items():
            for name in filter(finding.summary["curves"].get, self.attacks):
                entry = finding.summary["curves"][name]
                middle = (len(entry["loss"]) - 1) // 2
                losses = (study.number(entry["loss"][step], ".3f") for step in (0, middle, -1))
                ends = (study.number(entry["right"][step], ".1%") for step in (0, -1))
                rows.append((run, name, len(entry["loss"]) - 1, *losses, *ends))
        summary = next(iter(findings.values())).summary if findings else {"norm": "linf", "epsilon": 0.0}
        return {
            "loss_progression": tables.Table(
                "Cross-entropy under attack (nats)",
                ("run", "attack", "steps", "clean", "half way", "at the end", "right, clean", "right at the end"),
                rows,
                f"{attack_figures.budget(summary)}, the same for all models. 95 % intervals over images: bootstrap of the mean; "
                "Clopper-Pearson for shares.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Loss and share still right at the end of each attack, on the images that both were attacked on."""
        left, right = study.pair(first, second)
        same = all(first.summary[key] == second.summary[key] for key in ("norm", "epsilon"))
        if not len(left) or not same or first.summary["curves"].keys() != second.summary["curves"].keys():
            return []
        found = []
        for name in self.attacks:
            pair = first.records[f"loss/{name}"][left, -1], second.records[f"loss/{name}"][right, -1]
            difference, test = statistics.paired_difference(*pair), statistics.sign_flip(*pair)
            found.append(study.comparison(f"loss at the end of {name}", difference, test, "+.3f"))
            bits = first.records[f"right/{name}"][left, -1], second.records[f"right/{name}"][right, -1]
            difference = statistics.paired_difference(*(part.astype(float) for part in bits))
            found.append(study.comparison(f"right at the end of {name}", difference, statistics.mcnemar(*bits), "+.2%"))
        return found

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """The budget besides."""
        kept = {key: finding.summary[key] for key in ("norm", "epsilon")}
        return {**super().card(finding), **kept, "subset": "the first images in the order of the data set"}
