"""Robust accuracy against epsilon: how large must a perturbation be before the model fails?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import attacks, errors, programs, tables
from robust_vit.attacks import arguments, norms
from robust_vit.metrics import classification, statistics
from robust_vit.studies import attack_entries, attack_figures, attack_guards, forward, study


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackCurve(study.Study):
    """Robust accuracy against the size of the perturbation, under any attacks, with guards against false robustness.

    A bounded attack is run afresh at every epsilon on the same images with the same keys (seed, row); one that seeks the
    nearest success is run once, and breaks an image at every epsilon from its distance on. A condition's *raw* accuracy counts
    what that run alone broke; the *envelope* counts an image as broken at epsilon if any run up to epsilon broke it, which the
    nested balls justify. Images that are misclassified as they are count as broken at every epsilon
    (robust accuracy, not success rate). Success is judged again in float32 on the returned image (`robust_vit.attacks`).

    Guards (Carlini et al. 2019, arXiv 1902.06705; Croce & Hein 2020, arXiv 2003.01690; Pintor et al. 2022, arXiv
    2106.09947): raw accuracy that rises with epsilon beyond chance (any rise is noted, with its number of images); gradients
    followed with less success than FGSM has in one step; gradients that vanish; an attack without a bound that leaves the model
    right on any image; a forward pass that is not deterministic; images outside the ball or outside [0, 1].
    Each is a warning, not an error: the numbers are upper bounds of the robust accuracy in any case.

    Attributes:
      attacks: names of `robust_vit.attacks`, weakest first, with options where the defaults are not meant:
        ("fgsm", "pgd(steps=40, restarts=5)", "fmn").
      threat: the threat model's name, or None for the subject's; it gives the norm and the unit of `multiples`.
      multiples: the curve's epsilons in units of the threat's epsilon.
      epsilons: the curve's epsilons in pixel units [0, 1] in place of `multiples`; fractions such as "8/255" are read.
      norm: with `epsilons` and no threat, the norm.
      steps: of every attack that takes steps and whose entry does not say; None leaves each its own default.
      restarts: likewise.
      examples: how many test images, the first in the order of the data set; None is the threat's number
        (`robust_vit.attacks.ThreatModel`), or all where it names none.
      batch: images a compiled step; one batch is one chunk; or "auto", as many as the device has use and memory for.
      unbounded: also attack without a bound, for the guard.
      exhibits: how many of the first images to keep for the figure, clean and attacked by the last attack at the threat's
        epsilon; they are not selected.
    """

    name: ClassVar[str] = "attack_curve"
    title: ClassVar[str] = "Adversarial robustness"
    question: ClassVar[str] = "How little must an image be changed, in the worst direction, to make the model wrong?"
    paper: ClassVar[str] = "Goodfellow et al. 2015, arXiv 1412.6572; Madry et al. 2018, arXiv 1706.06083"
    captions: ClassVar[Mapping[str, str]] = {
        "attack_curve": (
            "Share of the images that stay right under every attack up to the size ε, misclassified images counted as "
            "broken; bands are 95 % Clopper-Pearson intervals over images, the dashed line is the threat model's ε"
        ),
        "adversarial_examples": (
            "The first test images, not selected: clean, attacked, and the change, scaled so that its largest value is black "
            "or white. Above each image stands what the model takes it for"
        ),
    }

    attacks: tuple[str, ...] = ("fgsm", "pgd")
    threat: str | None = None
    multiples: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0)
    epsilons: tuple[float | str, ...] | None = None
    norm: str = "linf"
    steps: int | None = None
    restarts: int | None = None
    examples: int | None = None
    batch: int | str = 64
    unbounded: bool = True
    exhibits: int = 6

    def __post_init__(self):
        super().__post_init__()
        attack_entries.parse(self.attacks)
        sizes = self.multiples if self.epsilons is None else [attack_entries.fraction(size) for size in self.epsilons]
        if not sizes or any(size <= 0 for size in sizes) or list(sizes) != sorted(set(sizes)):
            raise errors.UserError(
                f"the curve's epsilons are {sizes}: give positive numbers in rising order; zero is always included."
            )
        if self.threat is not None:
            attacks.threat(self.threat)

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs a threat model and a model that can be differentiated."""
        if self.threat is None and subject.threat is None and self.epsilons is None:
            return "no threat model is set: give one such as threat='cifar10/linf-8', or epsilons"
        self._built(subject)  # Refuses options and norms that an attack does not know, before any compute is spent.
        return forward.not_differentiable(subject)

    def conditions(self, subject: study.Subject) -> tuple[Any, float, np.ndarray]:
        """The norm, the epsilon that the study turns on, and the curve's epsilons without zero.

        Raises:
          errors.UserError: epsilons that are no radii of this norm (8 in place of 8/255).
        """
        name = self.threat or subject.threat
        threat = attacks.threat(name) if name is not None else None
        norm = threat.norm if threat is not None else norms.find(self.norm)
        if self.epsilons is not None:
            curve = np.asarray([attack_entries.fraction(size) for size in self.epsilons])
            arguments.ball(curve, norm, None)
        else:
            curve = np.asarray(self.multiples) * threat.epsilon
            # All balls of radius 1 and more are the whole box.
            curve = np.unique(np.minimum(curve, 1.0)) if norm is norms.LINF else curve
        center = threat.epsilon if threat is not None else float(curve[len(curve) // 2])
        return norm, float(curve[np.argmin(np.abs(curve - center))]), curve

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.limit(subject))

    @property
    def entries(self) -> tuple[attack_entries.Entry, ...]:
        """The attacks with their options."""
        return attack_entries.parse(self.attacks)

    def _defaults(self) -> dict[str, int | None]:
        return {"steps": self.steps, "restarts": self.restarts}

    def _built(self, subject: study.Subject) -> list[tuple[attack_entries.Entry, attacks.Attack, int]]:
        """Each attack at the epsilon that the study turns on, with the runs that it takes a chunk."""
        norm, center, curve = self.conditions(subject)
        runs = len(curve) + self.unbounded
        built = [(entry, entry.build(norm, center, **self._defaults())) for entry in self.entries]
        return [(entry, attack, 1 if attack.minimal else runs) for entry, attack in built]

    def chunks(self, subject: study.Subject) -> int:
        """One a batch."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """The most that the study can take: examples that fall early are left alone, yet their slots are computed."""
        images, forward_passes, backward_passes = len(self._stream(subject)) * self.batch, 1, 0
        for _, attack, runs in self._built(subject):
            ahead, back = (attack.evaluations * count for count in attack.step_passes)
            forward_passes += runs * (ahead + attack.judge_passes)
            backward_passes += runs * back
        # The clean images are looked at once, those of the first chunk twice.
        return images * forward_passes + self.batch, images * backward_passes

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """The clean forward pass, and start, step and judgement of each attack."""
        chunks = self.chunks(subject)
        images = forward.images(subject, self.batch)
        found = [forward.program(subject, self.batch, times=chunks + 1)]
        for entry, attack, runs in self._built(subject):
            for program in attacks.programs(attack, subject.classifier, images):
                times = program.times * chunks * runs
                found.append(dataclasses.replace(program, name=f"{entry.text}: {program.name}", times=times))
        return found

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """For each image and attack: success at every epsilon, the last one unbounded; distance, loss and passes of every run."""
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        logits, real = forward.logits(subject, batch)
        labels = real["label"].astype(np.int32)
        norm, center, curve = self.conditions(subject)
        whole = attack_entries.whole(norm, np.shape(batch["image"])[1:])
        sizes = np.append(curve, whole) if self.unbounded else curve
        records = {
            "row": real["row"].astype(np.int32),
            "label": labels,
            "prediction": logits.argmax(axis=1).astype(np.int32),
            "confidence": classification.confidence(logits).astype(np.float32),
            "correct": logits.argmax(axis=1) == labels,
        }
        images, given, keys = forward.examples(subject, batch)
        shown = min(self.exhibits, int(mask.sum())) if index == 0 else 0
        if index == 0:
            again = forward.logits(subject, batch)[0]
            records["exhibit/deterministic"] = np.asarray([np.array_equal(logits, again)])
            records["exhibit/epsilons"] = curve
            records["exhibit/epsilon"] = np.asarray([center])
            records["exhibit/norm"] = np.asarray([norm.name])
            records["exhibit/threat"] = np.asarray([self.threat or subject.threat or ""])
            records["exhibit/class_names"] = forward.class_names(subject)
            records["exhibit/image"] = np.asarray(real["image"][:shown], np.float32)
        for entry, attack, _ in self._built(subject):
            found = attack_entries.run(entry, norm, sizes, subject.classifier, keys, images, given, **self._defaults())
            found = [jax.tree.map(lambda leaf: leaf[mask], result) for result in found]
            columns = attack_entries.columns(found, sizes, records["correct"], minimal=attack.minimal)
            records |= {f"{field}/{entry.text}": column for field, column in columns.items()}
        if shown:
            # Of the last attack; its nearest success is shown where that lies within the ball.
            result = found[0 if attack.minimal else int(np.argmin(np.abs(curve - center)))]
            near = norms.within(result.distance, center)[:shown]
            ends = np.where(near[:, None, None, None], result.images[:shown], real["image"][:shown])
            predictions = np.where(near, result.prediction[:shown], records["prediction"][:shown])
            records["exhibit/adversarial"] = ends.astype(np.float32)
            records["exhibit/prediction"] = predictions.astype(np.int32)
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Raw and envelope robust accuracy of each attack and of the worst case over them, the guards, the passes."""
        curve = np.asarray(records["exhibit/epsilons"])
        correct = records["correct"]
        count = len(correct)
        success = {name: records[f"success/{name}"][:, : len(curve)] for name in self.attacks}
        success["worst case"] = np.logical_or.reduce(list(success.values()))
        curves = {}
        for name, raw in success.items():
            enveloped = np.logical_or.accumulate(raw, axis=1)
            curves[name] = [
                {
                    "epsilon": float(size),
                    "raw": float(1.0 - raw[:, i].mean()),
                    **dataclasses.asdict(statistics.proportion(count - enveloped[:, i].sum(), count)),
                }
                for i, size in enumerate(curve)
            ]
        guards = attack_guards.check(records, self.entries, curve, unbounded=self.unbounded)
        caveats = [guard["detail"] for guard in guards.values() if guard["fired"] or guard["noted"]]
        names, labels = records["exhibit/class_names"], records["label"]
        if len(np.unique(labels)) < len(names):
            caveats.append(f"The {count} images show {len(np.unique(labels))} of {len(names)} classes.")
        caveats.append(
            "An attack that finds nothing proves nothing: these accuracies are upper bounds of the robust accuracy."
        )
        return {
            "examples": count,
            "threat": str(records["exhibit/threat"][0]),
            "norm": str(records["exhibit/norm"][0]),
            "epsilon": float(records["exhibit/epsilon"][0]),
            "epsilons": curve.tolist(),
            "clean": dataclasses.asdict(statistics.proportion(correct.sum(), count)),
            "curves": curves,
            "guards": guards,
            "passes": {
                field: int(sum(records[f"{field}/{name}"].sum(dtype=np.int64) for name in self.attacks))
                for field in ("forward_passes", "backward_passes")
            },
            "caveats": caveats,
        }

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """The curves of all runs, and the first images with their perturbations."""
        if not findings:
            return {}
        figures = {"attack_curve": attack_figures.curves(findings, self._labels())}
        if any("exhibit/adversarial" in finding.records for finding in findings.values()):
            figures["adversarial_examples"] = attack_figures.examples(findings, self.entries[-1].label)
        return figures

    def _labels(self) -> dict[str, str]:
        return {entry.text: entry.label for entry in self.entries}

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """Worst-case robust accuracy at the threat's epsilon."""
        summary = finding.summary
        return {f"robust accuracy ({attack_figures.budget(summary)})": study.number(_at(summary, "worst case"), ".1%")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run and attack, two columns an epsilon: the envelope and, beside it, the raw accuracy."""
        sizes = sorted({size for finding in findings.values() for size in finding.summary["epsilons"]})
        rows = []
        for run, finding in findings.items():
            curves = finding.summary["curves"]
            for attack in (*filter(curves.get, self.attacks), "worst case"):
                by_size = {point["epsilon"]: point for point in curves[attack]}
                cells = []
                for point in map(by_size.get, sizes):
                    raw = tables.Number(point["raw"], format=".1%") if point else None
                    cells += [study.number(point, ".1%"), raw]
                rows.append((run, attack, study.number(finding.summary["clean"], ".1%"), *cells))
        norm = next(iter(findings.values())).summary["norm"] if findings else ""
        texts = [attack_figures.size_text(size) for size in sizes]
        budget = "".join(f"; {key}={value}" for key, value in self._defaults().items() if value is not None)
        return {
            "attack_curve": tables.Table(
                "Robust accuracy by epsilon",
                ("run", "attack", "clean", *itertools.chain(*((f"ε = {text}", f"raw, {text}") for text in texts))),
                rows,
                f"{norm} ball in pixel units [0, 1]{budget}; an image counts as broken at ε if an attack broke it at any size "
                "up to ε, or if it is misclassified as it is; raw: if the run at ε alone broke it. 95 % Clopper-Pearson "
                "intervals over images.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Worst-case robust accuracy at the threat's epsilon, on the images that both were attacked on."""
        left, right = study.pair(first, second)
        same = all(first.summary[key] == second.summary[key] for key in ("norm", "epsilon"))
        if not len(left) or not same or first.summary["curves"].keys() != second.summary["curves"].keys():
            return []
        robust = []
        for finding, rows in ((first, left), (second, right)):
            reached = np.asarray(finding.summary["epsilons"]) <= finding.summary["epsilon"]
            broken = [finding.records[f"success/{name}"][:, : len(reached)][:, reached] for name in self.attacks]
            robust.append(~np.logical_or.reduce(broken).any(axis=1)[rows])
        difference = statistics.paired_difference(*(bits.astype(float) for bits in robust))
        quantity = f"robust accuracy ({attack_figures.budget(first.summary)})"
        return [study.comparison(quantity, difference, statistics.mcnemar(*robust), "+.2%")]

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """The threat model, the budget and the guards besides."""
        summary = finding.summary
        budget = summary["norm"], summary["epsilon"]
        built = {entry.text: entry.build(*budget, **self._defaults()) for entry in self.entries}
        return {
            **super().card(finding),
            "threat": summary["threat"],
            "norm": summary["norm"],
            "epsilon": summary["epsilon"],
            "epsilons": summary["epsilons"],
            "attacks": {
                name: {"kind": "minimal" if attack.minimal else "bounded", "evaluations": attack.evaluations}
                for name, attack in built.items()
            },
            "subset": "the first images in the order of the data set, misclassified ones included",
            "guards": summary["guards"],
            "passes": summary["passes"],
        }


def _at(summary: Mapping[str, Any], attack: str) -> Mapping[str, Any] | None:
    return next((point for point in summary["curves"][attack] if point["epsilon"] == summary["epsilon"]), None)
