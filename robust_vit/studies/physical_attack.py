"""The physical world: how much of an attack is left after the image was printed and photographed?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import attacks, errors, mesh, programs, tables
from robust_vit.attacks import arguments, evaluation
from robust_vit.metrics import statistics
from robust_vit.studies import attack_entries, forward, physical_figures, study

_PURPOSE = 0x70686F74  # "phot": keeps the photographs apart from the draws of the attack.
KINDS = ("digital", "expectation")
_HARMLESS = 0.9  # Share of the accuracy that clean photographs keep, below which a reader is told.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhysicalAttack(study.Study):
    """Accuracy before and after a print and a photograph of adversarial images, and the destruction rate, by channel strength.

    The protocol of Kurakin et al. 2017 (arXiv 1607.02533): attack the file, send it through the channel, ask the model again; the
    destruction rate counts, among images that are right clean and wrong attacked, those that are right again after the channel.
    The attack is made twice: on the model as it is, and on its mean probability over the channel at strength 1 (expectation over
    transformation, Athalye et al. 2018, arXiv 1707.07397). Departure: the channel is a model of print and photograph
    (`robust_vit.attacks.print_photo`), not paper. Clean and adversarial images of a row go through the same draws, which no
    attack has seen; one photograph each.

    Attributes:
      attack: a bounded attack of `robust_vit.attacks`, with options where the defaults are not meant: "pgd(steps=40)". It
        takes all its steps: an attack that stops at its first success ends beside the boundary, where the channel undoes it.
      threat: the threat model's name, or None for the subject's.
      strengths: of the channel, in rising order; 0 is no channel, 1 its customary ranges.
      blur: largest standard deviation of the channel's blur in pixels; 1 is for images of some 200 pixels, less for small ones.
      samples: draws of the channel in each evaluation of the expectation.
      examples: how many test images, the first in the order of the data set; None is the threat's number
        (`robust_vit.attacks.ThreatModel`), or all where it names none.
      batch: images a compiled step; one batch is one chunk; or "auto".
      exhibits: how many of the first images to keep for the figure; they are not selected.
    """

    name: ClassVar[str] = "physical_attack"
    title: ClassVar[str] = "Attacks in the physical world"
    question: ClassVar[str] = "How much of an attack is left after the image was printed and photographed?"
    paper: ClassVar[str] = "Kurakin et al. 2017, arXiv 1607.02533; Athalye et al. 2018, arXiv 1707.07397"
    captions: ClassVar[Mapping[str, str]] = {
        "physical_attack": (
            "Left: accuracy on photographs of clean and of adversarial images against the strength of the channel. Right: share "
            "of the working adversarial images that the channel makes harmless. Bands are 95 % Clopper-Pearson intervals "
            "over images"
        ),
        "photographs": (
            "The first test images, not selected: the file that an attack made, and its photograph at the largest strength. "
            "Above each image stands what the model takes it for"
        ),
    }

    attack: str = "pgd"
    threat: str | None = None
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    blur: float = 1.0
    samples: int = 8
    examples: int | None = None
    batch: int | str = 64
    exhibits: int = 5

    def __post_init__(self):
        super().__post_init__()
        attack_entries.parse((self.attack,))
        if not self.strengths or self.strengths[0] < 0 or list(self.strengths) != sorted(set(self.strengths)):
            raise errors.UserError(f"strengths is {self.strengths}: give numbers from 0 in rising order.")
        arguments.counts(samples=self.samples)
        self._channel(1.0)
        if self.threat is not None:
            attacks.threat(self.threat)

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs a threat model and a model that can be differentiated."""
        if self.threat is None and subject.threat is None:
            return "no threat model is set: give one such as threat='cifar10/linf-8'"
        self._built(subject)
        return forward.not_differentiable(subject)

    def _built(self, subject: study.Subject) -> Any:
        threat = attacks.threat(self.threat or subject.threat)
        attack = attack_entries.parse((self.attack,))[0].build(threat.norm, threat.epsilon)
        if attack.minimal:
            raise errors.UserError(
                f"attack {self.attack!r} seeks the nearest success, which no channel leaves as it is: use 'pgd'."
            )
        return attack.replace(stop_on_success=False) if hasattr(attack, "stop_on_success") else attack

    def _channel(self, strength: float) -> attacks.Channel:
        return attacks.print_photo(strength=strength, blur=(0.0, self.blur))

    def _models(self, subject: study.Subject) -> dict[str, Any]:
        """What each kind of attack sees."""
        asked = attacks.expectation(subject.classifier, transform=self._channel(1.0), samples=self.samples)
        return dict(zip(KINDS, (subject.classifier, asked), strict=True))

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.limit(subject))

    def chunks(self, subject: study.Subject) -> int:
        """One a batch."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """Both attacks, and for each image a clean pass, and three of files and at each strength of photographs."""
        images, attack = len(self._stream(subject)) * self.batch, self._built(subject)
        ahead, back = (count * attack.evaluations * (1 + self.samples) for count in attack.step_passes)
        judged = attack.judge_passes * (1 + self.samples) + 1 + 3 * (1 + len(self.strengths))
        return images * (ahead + judged), images * back

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """The clean forward pass, start, step and judgement of both attacks, and the photographs."""
        chunks, images = self.chunks(subject), forward.images(subject, self.batch)
        found = [forward.program(subject, self.batch, times=chunks)]
        for kind, model in self._models(subject).items():
            for program in attacks.programs(self._built(subject), model, images):
                found.append(dataclasses.replace(program, name=f"{kind}: {program.name}", times=program.times * chunks))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch))
        taken = (subject.classifier, self._channel(1.0), keys, images)
        return [*found, programs.Program("photograph", photograph, taken, times=3 * (1 + len(self.strengths)) * chunks)]

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """What the model says of each image's file and photographs, clean and under both attacks."""
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        logits, real = forward.logits(subject, batch)
        records = {
            "row": real["row"].astype(np.int32),
            "label": real["label"].astype(np.int32),
            "prediction": logits.argmax(axis=1).astype(np.int32),
        }
        records["correct"] = records["prediction"] == records["label"]
        images, labels, keys = forward.examples(subject, batch)
        shown = min(self.exhibits, int(mask.sum())) if index == 0 else 0
        if index == 0:
            records["exhibit/strengths"] = np.asarray(self.strengths)
            records["exhibit/threat"] = np.asarray([self.threat or subject.threat])
            records["exhibit/class_names"] = forward.class_names(subject)
        files = {"clean": images}
        attack = self._built(subject)
        for kind, model in self._models(subject).items():
            result = attack(model, keys, images, labels)
            files[kind] = result.images
            records[f"distance/{kind}"] = mesh.fetch(result.distance)[mask].astype(np.float32)
        for kind, pixels in files.items():
            seen = []
            for strength in (0.0, *self.strengths):
                # Strength is a leaf: one compilation serves the file, which no strength leaves as it is, and all photographs.
                channel = self._channel(strength)
                photographs, predicted = photograph(subject.classifier, channel, keys, pixels)
                seen.append(mesh.fetch(predicted)[mask])
            records[f"file/{kind}"] = seen[0].astype(np.int32)
            records[f"photograph/{kind}"] = np.stack(seen[1:], axis=1).astype(np.int32)
            if shown:
                for part, kept in (("file", pixels), ("photograph", photographs)):
                    records[f"exhibit/{part}/{kind}"] = mesh.fetch(kept)[mask][:shown].astype(np.float32)
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Accuracies of files and photographs, and the destruction rate of both attacks at each strength."""
        labels, correct = records["label"], records["correct"]
        strengths = [float(strength) for strength in records["exhibit/strengths"]]
        kinds: dict[str, Any] = {}
        for kind in ("clean", *KINDS):
            right = records[f"photograph/{kind}"] == labels[:, None]
            fooled = records[f"file/{kind}"] != labels
            points = []
            for column, strength in enumerate(strengths):
                point = {"strength": strength, "accuracy": _share(right[:, column])}
                if kind != "clean":
                    rate = attacks.destruction_rate(correct, fooled, right[:, column])
                    point["destruction"] = None if rate is None else dataclasses.asdict(rate)
                points.append(point)
            kinds[kind] = {"file": _share(~fooled), "photographs": points}
        caveats = ["The channel is a model of print and photograph: real ones differ from device to device."]
        kept = kinds["clean"]["photographs"][-1]["accuracy"]["value"] / max(float(correct.mean()), 1e-9)
        if kept < _HARMLESS:
            caveats.append(
                f"On photographs of clean images the model keeps {kept:.0%} of its accuracy at the largest strength: what the "
                "channel breaks by itself does not count as destroyed, so that the rates there are too low."
            )
        if not (correct & (records["file/digital"] != labels)).any():
            caveats.append("No attack on the file worked, so there is nothing that the channel could destroy.")
        return {
            "examples": len(labels),
            "threat": str(records["exhibit/threat"][0]),
            "strengths": strengths,
            "clean": _share(correct),
            "kinds": kinds,
            "caveats": caveats,
        }

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Accuracy and destruction rate by strength, and the first images as files and photographs."""
        if not findings:
            return {}
        figures = {"physical_attack": physical_figures.curves(findings)}
        shown = {run: f for run, f in findings.items() if len(f.records.get("exhibit/file/clean", ()))}
        if shown:
            figures["photographs"] = physical_figures.photographs(shown)
        return figures

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """Accuracy on photographs of images that were made for the channel, at the largest strength."""
        point = finding.summary["kinds"]["expectation"]["photographs"][-1]
        return {"accuracy, photographed attack": study.number(point["accuracy"], ".1%")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run and kind of image: accuracy of files and photographs, destruction rates."""
        strengths = sorted({strength for finding in findings.values() for strength in finding.summary["strengths"]})
        rows = []
        for run, finding in findings.items():
            for kind in ("clean", *KINDS):
                entry = finding.summary["kinds"][kind]
                by_strength = {point["strength"]: point for point in entry["photographs"]}
                cells = []
                for field in ("accuracy", "destruction"):
                    cells += [study.number(by_strength.get(s, {}).get(field), ".1%") for s in strengths]
                rows.append((run, kind, study.number(entry["file"], ".1%"), *cells))
        columns = (
            "run",
            "images",
            "file",
            *(f"photograph, strength {strength:g}" for strength in strengths),
            *(f"destroyed, strength {strength:g}" for strength in strengths),
        )
        return {
            "physical_attack": tables.Table(
                "Accuracy before and after print and photograph",
                columns,
                rows,
                f"Attack {self.attack}, on the model (digital) and on its mean over {self.samples} draws of the channel "
                "(expectation). Destroyed: of the images that are right clean and wrong attacked, those that are right again. "
                "95 % Clopper-Pearson intervals over images.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Accuracy on photographs of both attacks at the largest strength, on the images that both saw."""
        left, right = study.pair(first, second)
        if not len(left) or first.summary["strengths"] != second.summary["strengths"]:
            return []
        found = []
        for kind in KINDS:
            bits = [
                finding.records[f"photograph/{kind}"][rows, -1] == finding.records["label"][rows]
                for finding, rows in ((first, left), (second, right))
            ]
            difference = statistics.paired_difference(*(one.astype(float) for one in bits))
            quantity = f"accuracy, photographed {kind} attack"
            found.append(study.comparison(quantity, difference, statistics.mcnemar(*bits), "+.2%"))
        return found


@jax.jit
def photograph(classifier: Any, channel: Any, keys: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The images after the channel, and the classes that the model sees in them; draws that no attack makes."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, _PURPOSE))(keys)
    found = channel(keys, images)
    return found, jnp.argmax(evaluation.logits(classifier, found, keys), axis=-1).astype(jnp.int32)


def _share(bits: np.ndarray) -> dict[str, Any]:
    return dataclasses.asdict(statistics.proportion(bits.sum(), len(bits)))
