"""Robust accuracy against epsilon: how large must a perturbation be before the model fails?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import attacks, errors, mesh, programs, tables
from robust_vit.metrics import classification, statistics
from robust_vit.studies import attack_figures, forward, study

_FIRED = 0.01  # A guard that compares two accuracies fires below this p-value.


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackCurve(study.Study):
    """Robust accuracy against the size of the perturbation, under FGSM and PGD, with guards against false robustness.

    Every attack is run afresh at every epsilon on the same images with the same keys (seed, row). A condition's *raw*
    accuracy counts what that run alone broke; the *envelope* counts an image as broken at epsilon if any run up to epsilon
    broke it, which the nested balls justify. Images that are misclassified as they are count as broken at every epsilon
    (robust accuracy, not success rate). Success is judged again in float32 on the returned image (`robust_vit.attacks`).

    Guards (Carlini et al. 2019, arXiv 1902.06705; Croce & Hein 2020, arXiv 2003.01690; Pintor et al. 2022, arXiv
    2106.09947): raw accuracy that rises with epsilon; PGD weaker than FGSM; gradients that vanish; an attack without a
    bound that leaves the model right; a forward pass that is not deterministic; images outside the ball or outside [0, 1].
    Each is a warning, not an error: the numbers are upper bounds of the robust accuracy in any case.

    Attributes:
      attacks: names of `robust_vit.attacks`, weakest first.
      threat: the threat model's name, or None for the subject's; it gives the norm and the unit of `multiples`.
      multiples: the curve's epsilons in units of the threat's epsilon.
      epsilons: the curve's epsilons in pixel units [0, 1] in place of `multiples`; fractions such as "8/255" are read.
      norm: with `epsilons` and no threat, the norm.
      steps: of iterated attacks.
      restarts: of iterated attacks.
      examples: how many test images, the first in the order of the data set, or None for all.
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
    steps: int = 10
    restarts: int = 1
    examples: int | None = 256
    batch: int | str = 64
    unbounded: bool = True
    exhibits: int = 6

    def __post_init__(self):
        super().__post_init__()
        if not self.attacks:
            raise errors.UserError(f"attacks is empty: name at least one of {', '.join(sorted(attacks.ATTACKS))}.")
        for attack in self.attacks:
            if attack not in attacks.ATTACKS:
                raise errors.unknown("attack", attack, attacks.ATTACKS)
        sizes = self.multiples if self.epsilons is None else [_fraction(size) for size in self.epsilons]
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
        return forward.not_differentiable(subject)

    def conditions(self, subject: study.Subject) -> tuple[Any, float, np.ndarray]:
        """The norm, the epsilon that the study turns on, and the curve's epsilons without zero."""
        name = self.threat or subject.threat
        threat = attacks.threat(name) if name is not None else None
        norm = threat.norm if threat is not None else attacks.NORMS[self.norm]
        if self.epsilons is not None:
            curve = np.asarray([_fraction(size) for size in self.epsilons])
        else:
            curve = np.asarray(self.multiples) * threat.epsilon
        if norm.name == "linf":
            curve = np.unique(np.minimum(curve, 1.0))
        center = threat.epsilon if threat is not None else float(curve[len(curve) // 2])
        return norm, float(curve[np.argmin(np.abs(curve - center))]), curve

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.examples)

    def _build(self, name: str, norm: Any) -> Any:
        options = {"steps": self.steps, "restarts": self.restarts} if name != "fgsm" else {}
        return attacks.build(name, epsilon=1.0, norm=norm, **options)

    def chunks(self, subject: study.Subject) -> int:
        """One a batch."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """The most that the study can take: examples that fall early are left alone, yet their slots are computed."""
        norm, _, curve = self.conditions(subject)
        backward = sum(self._build(name, norm).evaluations for name in self.attacks) * (len(curve) + self.unbounded)
        images = len(self._stream(subject)) * self.batch
        # Each attack judges once; the clean images are looked at once, those of the first chunk twice.
        judged = len(self.attacks) * (len(curve) + self.unbounded)
        return images * (backward + judged + 1) + self.batch, images * backward

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """The clean forward pass, and start, step and judgement of each attack."""
        chunks = self.chunks(subject)
        norm, center, curve = self.conditions(subject)
        images = forward.images(subject, self.batch)
        found = [forward.program(subject, self.batch, times=chunks + 1)]
        for name in self.attacks:
            attack = self._build(name, norm).replace(epsilon=np.float32(center))
            for program in attacks.programs(attack, subject.classifier, images):
                times = program.times * chunks * (len(curve) + self.unbounded)
                found.append(dataclasses.replace(program, name=f"{name}: {program.name}", times=times))
        return found

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """For each image and attack: success, distance, loss and passes at every epsilon, the last one unbounded."""
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        logits, real = forward.logits(subject, batch)
        labels = real["label"].astype(np.int32)
        norm, center, curve = self.conditions(subject)
        # A ball that holds all images: at this size only the box [0, 1] bounds the attack.
        whole = 1.0 if norm.name == "linf" else float(np.sqrt(np.prod(np.shape(batch["image"])[1:])))
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
        for name in self.attacks:
            attack = self._build(name, norm)
            found = []
            for size in sizes:
                # Epsilon is a leaf: one compilation serves the whole curve.
                result = attack.replace(epsilon=np.float32(size))(subject.classifier, keys, images, given)
                found.append(mesh.fetch(result))
                if shown and size == center and name == self.attacks[-1]:
                    records["exhibit/adversarial"] = np.asarray(found[-1].images[:shown], np.float32)
                    records["exhibit/prediction"] = np.asarray(found[-1].prediction[:shown], np.int32)

            def columns(field: str, found: list = found) -> np.ndarray:
                return np.stack([np.asarray(getattr(result, field)) for result in found], axis=1)[mask]

            inside = np.stack([((r.images >= 0) & (r.images <= 1)).all(axis=(1, 2, 3)) for r in found], axis=1)[mask]
            records[f"success/{name}"] = columns("success") | ~records["correct"][:, None]
            records[f"inside/{name}"] = inside & (columns("distance") <= sizes * (1 + 1e-5) + 1e-6)
            for field in ("distance", "loss"):
                records[f"{field}/{name}"] = columns(field).astype(np.float32)
            for field in ("vanished", "forward_passes", "backward_passes"):
                records[f"{field}/{name}"] = columns(field).astype(np.int32)
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
        guards = self._guards(records, success, curve)
        caveats = [guard["detail"] for guard in guards.values() if guard["fired"]]
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

    def _guards(
        self, records: Mapping[str, np.ndarray], success: Mapping[str, np.ndarray], curve: np.ndarray
    ) -> dict[str, dict[str, Any]]:
        guards: dict[str, dict[str, Any]] = {}

        def guard(name: str, fired: bool, detail: str) -> None:
            guards[name] = {"fired": bool(fired), "detail": detail}

        for name in self.attacks:
            raw = success[name]
            falls = [i for i in range(len(curve) - 1) if _fewer(raw[:, i + 1], raw[:, i])]
            guard(
                f"monotone/{name}",
                bool(falls),
                f"{name.upper()} breaks fewer images at epsilon {curve[falls[0] + 1]:.4g} than at {curve[falls[0]]:.4g}: the "
                "gradient misleads it there (masking, or steps too long); read the envelope, and attack by other means."
                if falls
                else f"the raw accuracy under {name.upper()} does not rise with epsilon",
            )
        if {"fgsm", "pgd"} <= set(self.attacks):
            weaker = [i for i in range(len(curve)) if _fewer(success["pgd"][:, i], success["fgsm"][:, i])]
            guard(
                "order",
                bool(weaker),
                f"PGD breaks fewer images than FGSM at epsilon {curve[weaker[0]]:.4g}: it has too few steps, or the gradient "
                "is masked."
                if weaker
                else "PGD breaks as many images as FGSM or more",
            )
        correct = records["correct"]
        for name in self.attacks:
            gone = records[f"vanished/{name}"][correct] > 0
            share = float(gone.any(axis=1).mean()) if correct.any() else 0.0
            guard(
                f"gradient/{name}",
                share > 0.01,
                f"{share:.1%} of the images that the model gets right met a gradient that is zero or not finite under "
                f"{name.upper()}: a saturated softmax or masking; try loss='margin'.",
            )
            outside = ~records[f"inside/{name}"]
            guard(
                f"ball/{name}", outside.any(), f"{name.upper()} returned {int(outside.sum())} images outside its ball."
            )
        if self.unbounded:
            left = float(1.0 - np.logical_or.reduce([records[f"success/{n}"] for n in self.attacks])[:, -1].mean())
            guard(
                "unbounded",
                left > 0.05,
                f"Without any bound the attacks leave {left:.1%} of the images right, where they should leave none: they "
                "are too weak for this model, so its robustness is overstated.",
            )
        guard(
            "deterministic",
            not records["exhibit/deterministic"][0],
            "Two forward passes of the same images differ: a randomised model needs attacks that average over its draws.",
        )
        return guards

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """The curves of all runs, and the first images with their perturbations."""
        if not findings:
            return {}
        figures = {"attack_curve": attack_figures.curves(findings, self.attacks)}
        if any("exhibit/adversarial" in finding.records for finding in findings.values()):
            figures["adversarial_examples"] = attack_figures.examples(findings, self.attacks[-1])
        return figures

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """Worst-case robust accuracy at the threat's epsilon."""
        summary = finding.summary
        return {f"robust accuracy ({_budget(summary)})": study.number(_at(summary, "worst case"), ".1%")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run and attack, one column an epsilon."""
        sizes = sorted({size for finding in findings.values() for size in finding.summary["epsilons"]})
        rows = []
        for run, finding in findings.items():
            for attack, points in finding.summary["curves"].items():
                by_size = {point["epsilon"]: point for point in points}
                cells = [study.number(by_size.get(size), ".1%") for size in sizes]
                rows.append((run, attack, study.number(finding.summary["clean"], ".1%"), *cells))
        norm = next(iter(findings.values())).summary["norm"] if findings else ""
        return {
            "attack_curve": tables.Table(
                "Robust accuracy by epsilon",
                ("run", "attack", "clean", *(f"ε = {attack_figures.size_text(size)}" for size in sizes)),
                rows,
                f"{norm} ball in pixel units [0, 1]; PGD with {self.steps} steps of 2.5 ε / steps, {self.restarts} random "
                f"start{'s' if self.restarts > 1 else ''}; an image counts as broken at ε if an attack broke it at any size "
                "up to ε, or if it is misclassified as it is. 95 % Clopper-Pearson intervals over images.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Worst-case robust accuracy at the threat's epsilon, on the images that both were attacked on."""
        left, right = study.pair(first, second)
        same = all(first.summary[key] == second.summary[key] for key in ("norm", "epsilon"))
        if not len(left) or not same:
            return []
        robust = []
        for finding, rows in ((first, left), (second, right)):
            reached = np.asarray(finding.summary["epsilons"]) <= finding.summary["epsilon"]
            broken = [finding.records[f"success/{name}"][:, : len(reached)][:, reached] for name in self.attacks]
            robust.append(~np.logical_or.reduce(broken).any(axis=1)[rows])
        difference = statistics.paired_difference(*(bits.astype(float) for bits in robust))
        quantity = f"robust accuracy ({_budget(first.summary)})"
        return [study.comparison(quantity, difference, statistics.mcnemar(*robust), "+.2%")]

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """The threat model, the budget and the guards besides."""
        summary = finding.summary
        return {
            **super().card(finding),
            "threat": summary["threat"],
            "norm": summary["norm"],
            "epsilon": summary["epsilon"],
            "epsilons": summary["epsilons"],
            "attacks": {
                name: {"steps": 1 if name == "fgsm" else self.steps, "restarts": self.restarts} for name in self.attacks
            },
            "subset": "the first images in the order of the data set, misclassified ones included",
            "guards": summary["guards"],
            "passes": summary["passes"],
        }


def _fewer(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether `first` succeeds on fewer images than `second`, beyond chance."""
    test = statistics.mcnemar(second, first)
    return test.statistic < 0 and test.p_value < _FIRED


def _at(summary: Mapping[str, Any], attack: str) -> Mapping[str, Any] | None:
    return next((point for point in summary["curves"][attack] if point["epsilon"] == summary["epsilon"]), None)


def _budget(summary: Mapping[str, Any]) -> str:
    return f"{attack_figures.NORMS.get(summary['norm'], summary['norm'])}, ε = {attack_figures.size_text(summary['epsilon'])}"


def _fraction(size: float | str) -> float:
    if not isinstance(size, str):
        return float(size)
    above, _, below = size.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise errors.UserError(f"epsilon {size!r} is no number: write 0.03 or '8/255'.") from None
