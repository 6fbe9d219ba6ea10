"""Attacks as a study's settings write them, "pgd" or "pgd(steps=40, restarts=5)", and what a run of each leaves behind."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import attacks, errors, mesh, registry
from robust_vit.attacks import norms

_FIXED = ("epsilon", "norm", "threat", "goal")  # What the study chooses.
# Names that are no acronyms, as their authors write them.
_WRITTEN = {
    "adam": "Adam",
    "carlini_wagner": "Carlini-Wagner",
    "deep_fool": "DeepFool",
    "hop_skip_jump": "HopSkipJump",
    "square": "Square",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One attack of a study.

    Attributes:
      text: as it stands in the settings; the key of its records.
      name: of `robust_vit.attacks`.
      options: arguments of the function that the name stands for, where they differ from its defaults.
    """

    text: str
    name: str
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """As figures and sentences call it: "PGD", "PGD (steps=40)"."""
        inner = self.text.partition("(")[2].rpartition(")")[0].strip()
        name = _WRITTEN.get(self.name, self.name.upper().replace("_", "-"))
        return f"{name} ({inner})" if inner else name

    def build(self, norm: Any, epsilon: float, **defaults: Any) -> attacks.Attack:
        """The attack; a minimal one, which could stop at the first success within epsilon, goes on to the nearest.

        Args:
          norm: of the perturbation.
          epsilon: radius of the ball, in pixel units [0, 1].
          **defaults: options for an attack that takes them and whose entry does not say otherwise; None says nothing.

        Raises:
          errors.UserError: what the attack itself refuses; an attack that has neither a ball nor a distance.
        """
        taken = _parameters(self.name)
        given = {key: value for key, value in defaults.items() if key in taken and value is not None}
        options = {"norm": norm, **given, **self.options}
        if "epsilon" not in taken:
            built = attacks.build(self.name, **options)
        else:
            built = attacks.build(self.name, epsilon=epsilon, **options)
            built = attacks.build(self.name, **options) if built.minimal else built
        if not built.minimal and "epsilon" not in taken:
            raise errors.UserError(f"attack {self.text!r} has no epsilon and no distance: it has a study of its own.")
        return built


def parse(texts: Sequence[str]) -> tuple[Entry, ...]:
    """The attacks of a setting.

    Raises:
      errors.UserError: none at all, one twice, an unknown name or option, or an option that is the study's to choose.
    """
    if isinstance(texts, str) or not texts or len(set(texts)) < len(texts):
        raise errors.UserError(
            f"attacks is {texts!r}: name some of {', '.join(sorted(attacks.ATTACKS))} as a tuple, each of them once."
        )
    entries = []
    for text in texts:
        name, positional, options = registry.parse("attack", text, example="'pgd' or 'pgd(steps=40)'")
        if positional:
            raise errors.UserError(f"attack {text!r}: name its options, for example 'pgd(steps=40)'.")
        known = _parameters(name)
        for option in options:
            if option in _FIXED:
                raise errors.UserError(f"attack {text!r}: {option} is a setting of the study; leave it out here.")
        registry.check_options("attack", name, options, [option for option in known if option not in _FIXED])
        entries.append(Entry(text, name, options))
    return tuple(entries)


def budget(study: Any, subject: Any) -> tuple[Any, float]:
    """The norm and epsilon of a study that has the settings `threat`, `epsilon` and `norm`: its own or the subject's threat.

    Raises:
      errors.UserError: there is neither.
    """
    name = study.threat or subject.threat
    threat = attacks.threat(name) if name else None
    if threat is None and study.epsilon is None:
        raise errors.UserError("no threat model is set: give one such as threat='cifar10/linf-8', or epsilon.")
    norm = threat.norm if threat is not None else attacks.norms.find(study.norm)
    return norm, threat.epsilon if study.epsilon is None else fraction(study.epsilon)


def fraction(size: float | str) -> float:
    """An epsilon in pixel units, of a number or of text such as "8/255"."""
    if not isinstance(size, str):
        return float(size)
    above, _, below = size.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise errors.UserError(f"epsilon {size!r} is no number: write 0.03 or '8/255'.") from None


def run(
    entry: Entry,
    norm: Any,
    sizes: Sequence[float],
    model: Any,
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    **defaults: Any,
) -> list[attacks.AttackResult]:
    """What the attack found, in NumPy: at each size, or of a minimal attack once. One compilation for all sizes."""
    built = [entry.build(norm, float(size), **defaults) for size in sizes]
    return [mesh.fetch(attack(model, keys, images, labels)) for attack in (built[:1] if built[0].minimal else built)]


def columns(
    found: Sequence[attacks.AttackResult], sizes: np.ndarray, correct: np.ndarray, *, minimal: bool
) -> dict[str, np.ndarray]:
    """Per-example records of an attack's results.

    `success` is `[examples, sizes]`: broken at that size, by the run at that size alone or by the nearest success of a minimal
    attack; what is misclassified as it is counts as broken. The others have one column a run.

    Args:
      found: from `run`, without padding.
      sizes: radii.
      correct: whether the model is right on the clean image.
      minimal: whether there is one result for all sizes, rather than one a size.
    """

    def stacked(field: str) -> np.ndarray:
        return np.stack([np.asarray(getattr(result, field)) for result in found], axis=1)

    distance, success = stacked("distance"), stacked("success")
    inside = np.stack([((r.images >= 0) & (r.images <= 1)).all(axis=(1, 2, 3)) for r in found], axis=1)
    if minimal:
        success = success & (distance <= sizes)
    else:
        inside = inside & norms.within(distance, sizes)
    records = {"success": success | ~correct[:, None], "inside": inside}
    for field in ("distance", "loss"):
        records[field] = stacked(field).astype(np.float32)
    for field in ("vanished", "forward_passes", "backward_passes"):
        records[field] = stacked(field).astype(np.int32)
    return records


def whole(norm: Any, shape: Sequence[int]) -> float:
    """The radius of a ball that holds every image: at this size only the box [0, 1] bounds an attack."""
    return float(norm.measure(jnp.ones((1, *shape), jnp.float32))[0])


def _parameters(name: str) -> tuple[str, ...]:
    return tuple(inspect.signature(registry.find("attack", name, attacks.ATTACKS)).parameters)
