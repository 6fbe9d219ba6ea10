"""Worst-case robust accuracy under AutoAttack: what is left when four attacks have had their turn?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import attacks, errors, plots, programs, tables
from robust_vit.attacks import evaluation, suites
from robust_vit.metrics import classification, statistics
from robust_vit.studies import attack_figures, forward, study

_PASSES = ("forward_passes", "backward_passes")
_WHITE_BOX = {"apgd_ce", "apgd_dlr", "apgd_t", "fab", "fab_t"}
_BLACK_BOX_MARGIN = 0.002  # What the black box may break beyond the white box: 0.2 points, as AutoAttack's own flag.


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoAttack(study.Study):
    """Accuracy that is left after each attack of AutoAttack, each run on the images that those before it left right.

    Orders and budgets are those of the authors' repository (Croce & Hein 2020, arXiv 2003.01690; `standard`: APGD on the
    cross-entropy with 100 steps, APGD on the targeted DLR loss with 9 targets, FAB with 9 targets, Square with 5,000 queries).
    Departures: draws depend on (seed, row) and not on the batch; an attack leaves an image as soon as it has succeeded, unless
    the model draws; success is judged again in float32 on the returned image. Below 4 classes see
    `robust_vit.attacks.suites.members`.

    Attributes:
      version: `standard`, `plus`, or `rand` for a stochastic model.
      threat: the threat model's name, or None for the subject's.
      examples: how many test images, the first in the order of the data set; None is the threat's number
        (`robust_vit.attacks.ThreatModel`), or all where it names none.
      together: images of a chunk: what a killed study computes again at most.
      batch: images a compiled step at most; a finished one gives its slot to the next of the chunk; or "auto".
    """

    name: ClassVar[str] = "auto_attack"
    title: ClassVar[str] = "AutoAttack"
    question: ClassVar[str] = "How many images stay right when the strongest known attacks take turns on them?"
    paper: ClassVar[str] = "Croce & Hein 2020, arXiv 2003.01690"
    captions: ClassVar[Mapping[str, str]] = {
        "auto_attack": (
            "Share of the images that are still classified correctly after each attack of the sequence, from the clean images on "
            "the left; bars are 95 % Clopper-Pearson intervals over images"
        )
    }

    version: str = "standard"
    threat: str | None = None
    examples: int | None = None
    together: int = 256
    batch: int | str = 64

    def __post_init__(self):
        super().__post_init__()
        if self.version not in suites.VERSIONS:
            raise errors.unknown("version of AutoAttack", self.version, suites.VERSIONS)
        if not isinstance(self.together, int) or self.together < 1:
            raise errors.UserError(f"together is {self.together!r}: expected a whole number of images from 1.")
        if self.threat is not None:
            attacks.threat(self.threat)

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs a threat model, two classes, a model that can be differentiated, and for `rand` one that draws."""
        if self.threat is None and subject.threat is None:
            return "no threat model is set: give one such as threat='cifar10/linf-8'"
        if subject.num_classes < 2:
            return "the model has one class"
        if self.version == "rand" and not getattr(subject.classifier, "stochastic", False):
            return "AutoAttack rand is for stochastic models: use version='standard' for this one"
        return forward.not_differentiable(subject)

    def most(self, subject: study.Subject) -> int:
        """No more slots than a chunk has images."""
        return min(super().most(subject), self.together)

    def _threat(self, subject: study.Subject) -> attacks.ThreatModel:
        return attacks.threat(self.threat or subject.threat)

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.together, limit=self.limit(subject))

    def _members(self, subject: study.Subject) -> dict[str, attacks.Attack]:
        threat = self._threat(subject)
        found, _ = suites.members(self.version, epsilon=threat.epsilon, norm=threat.norm, classes=subject.num_classes)
        return {name: attack.against(subject.classifier) for name, attack in found.items()}

    def chunks(self, subject: study.Subject) -> int:
        """One for every `together` images."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """The most that the study can take: for a model that nothing breaks."""
        images = len(self._stream(subject)) * self.together
        found = np.asarray([1, 0])  # The judgement of the clean image.
        for attack in self._members(subject).values():
            found += np.asarray(attack.step_passes) * attack.evaluations + np.asarray([attack.judge_passes, 0])
        found *= evaluation.passes(suites.asked(subject.classifier, self.version))
        return images * (int(found[0]) + 1), images * int(found[1])

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """The clean forward pass, and start, step and judgement of each attack, with all slots in use."""
        chunks = self.chunks(subject)
        images = forward.images(subject, self.batch)
        found = [forward.program(subject, self.together, times=chunks)]
        model = suites.asked(subject.classifier, self.version)
        planned = suites.programs(self._members(subject), model, images, examples=self.together)
        found += [dataclasses.replace(program, times=program.times * chunks) for program in planned]
        return found

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """For each image and attack: whether it was tried, success, distance and passes."""
        batch = self._stream(subject).batch(index)
        logits, real = forward.logits(subject, batch)
        found = attacks.auto_attack(
            subject.classifier,
            real,
            threat=self._threat(subject),
            version=self.version,
            slots=self.batch,
            seed=subject.seed,
            mesh=subject.mesh,
        )
        records = {
            **found.records(),
            "prediction": logits.argmax(axis=1).astype(np.int32),
            "confidence": classification.confidence(logits).astype(np.float32),
            # Of the whole chunk, by attack: added up when the chunks are joined.
            "exhibit/executed": np.asarray([[line["executed"] for line in found.log]], np.int64),
        }
        if index == 0:
            threat = self._threat(subject)
            records["exhibit/attacks"] = np.asarray(found.names)
            records["exhibit/notes"] = np.asarray(found.notes, np.str_)
            records["exhibit/epsilon"] = np.asarray([threat.epsilon])
            records["exhibit/norm"] = np.asarray([threat.norm.name])
            records["exhibit/threat"] = np.asarray([threat.name])
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Accuracy after each attack with its interval, what each broke, passes, and the flag of the black box."""
        names = [str(name) for name in records["exhibit/attacks"]]
        correct = records["correct"]
        count = len(correct)
        standing, after = correct.copy(), []
        for column, name in enumerate(names):
            tried, fell = records[f"attempted/{name}"], records[f"success/{name}"]
            standing &= ~fell
            passes = sum(records[f"{field}/{name}"].sum(dtype=np.int64) for field in _PASSES)
            after.append(
                {
                    "attack": name,
                    "attempted": int(tried.sum()),
                    "fell": int(fell.sum()),
                    "useful_passes": int(passes),
                    "executed_passes": int(records["exhibit/executed"][:, column].sum()),
                    **dataclasses.asdict(statistics.proportion(standing.sum(), count)),
                }
            )
        fell = {entry["attack"]: entry["fell"] for entry in after}
        stronger = fell.get("square", 0) > _BLACK_BOX_MARGIN * count and names.index("square") >= len(
            _WHITE_BOX & fell.keys()
        )
        guards = {
            "black box": {
                "fired": bool(stronger),
                "detail": f"Square, which sees no gradient, broke {fell.get('square', 0)} images that the gradient attacks did "
                "not: the gradients mislead, and the accuracy may be far lower still."
                if stronger
                else "Square broke no more than 0.2 % of the images beyond the gradient attacks",
            }
        }
        caveats = [str(note) for note in records["exhibit/notes"]]
        caveats += [guard["detail"] for guard in guards.values() if guard["fired"]]
        caveats.append("What these attacks leave right is an upper bound of the robust accuracy, not a proof.")
        return {
            "examples": count,
            "threat": str(records["exhibit/threat"][0]),
            "norm": str(records["exhibit/norm"][0]),
            "epsilon": float(records["exhibit/epsilon"][0]),
            "clean": dataclasses.asdict(statistics.proportion(correct.sum(), count)),
            "after": after,
            "robust": dataclasses.asdict(statistics.proportion(standing.sum(), count)),
            "guards": guards,
            "caveats": caveats,
        }

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """What is left after each attack, all runs side by side."""
        if not findings:
            return {}
        with plots.style():
            figure, axes = plots.figure(width=6.4, height=3.8)
            axis = axes[0, 0]
            for index, (run, finding) in enumerate(findings.items()):
                points = [finding.summary["clean"], *finding.summary["after"]]
                values, low, high = (np.asarray([point[key] for point in points]) for key in ("value", "low", "high"))
                # Runs stand a little apart, so that intervals of equal numbers can be told from each other.
                positions = np.arange(len(points)) + 0.08 * (index - (len(findings) - 1) / 2)
                axis.errorbar(
                    positions,
                    values,
                    yerr=np.clip([values - low, high - values], 0.0, None),
                    color=plots.color(index),
                    marker=plots.marker(index),
                    markersize=5.5,
                    capsize=2.5,
                    linewidth=1.4,
                    label=run,
                )
            summary = next(iter(findings.values())).summary
            names = ["clean", *(entry["attack"] for entry in summary["after"])]
            axis.set_xticks(
                range(len(names)), [name.replace("_", "-").upper() if name != "clean" else name for name in names]
            )
            axis.set_ylim(0, 1)
            plots.percent(axis)
            axis.set_ylabel("images still right")
            axis.set_xlabel(f"after each attack of AutoAttack {self.version}, {_budget(summary)}")
            axis.legend(loc="upper right")
        return {"auto_attack": figure}

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """Robust accuracy."""
        summary = finding.summary
        return {f"AutoAttack ({_budget(summary)})": study.number(summary["robust"], ".1%")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run and attack."""
        rows = []
        for run, finding in findings.items():
            rows.append((run, "clean", None, None, study.number(finding.summary["clean"], ".1%"), None, None))
            for entry in finding.summary["after"]:
                executed = entry["executed_passes"]
                rows.append(
                    (
                        run,
                        entry["attack"],
                        entry["attempted"],
                        entry["fell"],
                        study.number(entry, ".1%"),
                        executed,
                        tables.Number(entry["useful_passes"] / executed, format=".0%") if executed else None,
                    )
                )
        columns = ("run", "attack", "tried on", "fell", "accuracy left", "passes", "useful")
        return {
            "auto_attack": tables.Table(
                "Accuracy left after each attack",
                columns,
                rows,
                f"AutoAttack {self.version}; passes are forward and backward passes of one image; useful is the share of them "
                "that belonged to an image that had not yet fallen. 95 % Clopper-Pearson intervals over images.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Robust accuracy, on the images that both were attacked on."""
        left, right = study.pair(first, second)
        if not len(left) or any(first.summary[key] != second.summary[key] for key in ("norm", "epsilon")):
            return []
        robust = []
        for finding, rows in ((first, left), (second, right)):
            names = [str(name) for name in finding.records["exhibit/attacks"]]
            fell = np.logical_or.reduce([finding.records[f"success/{name}"] for name in names])
            robust.append((finding.records["correct"] & ~fell)[rows])
        difference = statistics.paired_difference(*(bits.astype(float) for bits in robust))
        quantity = f"robust accuracy (AutoAttack, {_budget(first.summary)})"
        return [study.comparison(quantity, difference, statistics.mcnemar(*robust), "+.2%")]

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """The threat model, what each attack did, and the guards besides."""
        keys = ("threat", "norm", "epsilon", "clean", "robust", "after", "guards")
        return {**super().card(finding), "version": self.version, **{key: finding.summary[key] for key in keys}}

    def entry(self, finding: study.Finding, **about: Any) -> dict[str, Any]:
        """The model as an entry of RobustBench."""
        records, summary, circumstances = finding.records, finding.summary, finding.provenance
        names = [str(name) for name in records["exhibit/attacks"]]
        forward_passes, backward_passes = (
            sum(int(records[f"{field}/{name}"].sum(dtype=np.int64)) for name in names) for field in _PASSES
        )
        return attacks.card(
            threat=summary["threat"],
            correct=records["correct"],
            broken={name: records[f"success/{name}"] for name in names},
            attempted={name: records[f"attempted/{name}"] for name in names},
            suite=f"AutoAttack {self.version}",
            forward_passes=forward_passes,
            backward_passes=backward_passes,
            seconds=circumstances.get("wall_seconds"),
            guards=summary["guards"],
            versions=circumstances.get("versions"),
            backend=circumstances.get("hardware", {}).get("platform"),
            subset=f"the first {summary['examples']} test images in the order of the data set",
            notes=[str(note) for note in records["exhibit/notes"]],
            **about,
        )


def _budget(summary: Mapping[str, Any]) -> str:
    return f"{attack_figures.NORMS.get(summary['norm'], summary['norm'])}, ε = {attack_figures.size_text(summary['epsilon'])}"
