"""Bent representations: while an image moves along a straight line, how straight do its features go?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import classifier as classifiers
from robust_vit import errors, mesh, programs, tables
from robust_vit.attacks import features as layers
from robust_vit.attacks import travel
from robust_vit.curvature import bends, representations
from robust_vit.metrics import classification, statistics
from robust_vit.studies import forward, representation_figures, representation_summary, study

_PURPOSE = 0x62656E64  # "bend": keeps the directions apart from every other draw under the same seed.
_CLOSE = 4  # Directions of an image that are looked at more closely: by derivatives, at every step size, in figures.
_LOGITS = "logits"
STARTS = representation_figures.STARTS
DIRECTIONS = ("random", "gradient")


def features(images: jax.Array, layer: Any) -> jax.Array:
    """What is followed, `[batch, dim]` in float32 or wider: the features of `layer`, or the logits of a model."""
    found = layer(images)
    return found.astype(jnp.promote_types(found.dtype, jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepresentationCurvature(study.Study):
    """Direction changes θ(n) of the penultimate features along lines in the space of images, from the image and after a jump.

    Protocol of Kim et al. 2022 (arXiv 2210.05742, section 3 and figures 1 and 5): an image moves by x + n · Δ · d with
    ‖d‖₂ = √D, so that lengths are the root mean square change of a pixel; θ(n) is the angle between successive steps of the
    penultimate features; statistics over 1,000 random directions of 10 images. The line is not clipped to [0, 1], which would
    bend it. The jump is that of `boundary_travel`: x + jump · r with r random. They expect of convolutional networks that
    features go nearly straight, of Transformers that they turn, and less so after the jump.

    Departures: the paper's number and length of steps are not published in text: 20 to an ε of 0.05 here, and θ depends on them,
    so the angle is measured at other step sizes, too, beside what rounding makes of it and beside the exact
    tangents' angle. 32 directions in place of 1,000 by default. Angles by the arc tangent, not the arc cosine, which has no
    digits left for small ones. The exact turning rate by second derivatives is new, as is what follows from it: a network of
    ReLUs has none at all, whatever its angles are. The model is asked in float32.

    Attributes:
      direction: `random`, or `gradient` for the FGSM direction at the start, of which there is one an image.
      directions: random ones of an image.
      steps: of a path.
      span: length ε of a path.
      jump: length of the random jump; 0 leaves it out.
      clip: put moved images back into [0, 1].
      layer: the name of the features, or `logits`.
      step_sizes: Δ at which the first angle of the first four directions is measured besides.
      examples: how many test images, the first in the order of the data set, or None for all.
      batch: paths a compiled step, steps + 1 images each; or "auto", as many as the device has use and memory for.
      exhibits: how many of the first images to keep paths of for the figure; they are not selected.
    """

    name: ClassVar[str] = "representation_curvature"
    title: ClassVar[str] = "Bent representations"
    question: ClassVar[str] = "While an image moves along a straight line, how straight do its features go?"
    paper: ClassVar[str] = "Kim et al. 2022, Curved Representation Space of Vision Transformers, arXiv 2210.05742"
    captions: ClassVar[Mapping[str, str]] = representation_figures.CAPTIONS

    direction: str = "random"
    directions: int = 32
    steps: int = 20
    span: float = 0.05
    jump: float = 0.05
    clip: bool = False
    layer: str = "pre_logits"
    step_sizes: tuple[float, ...] = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    examples: int | None = 10
    batch: int | str = 16
    exhibits: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.direction not in DIRECTIONS:
            raise errors.unknown("direction", self.direction, DIRECTIONS)
        if self.directions < 1 or self.steps < 2:
            raise errors.UserError(
                f"directions={self.directions} and steps={self.steps}: expected directions from 1 and steps from 2."
            )
        if not self.span > 0 or self.jump < 0 or not all(size > 0 for size in self.step_sizes):
            raise errors.UserError(
                f"span={self.span}, jump={self.jump} and step_sizes={self.step_sizes}: expected positive lengths, jump from 0."
            )

    @property
    def starts(self) -> tuple[str, ...]:
        """Where paths start from."""
        return tuple(STARTS) if self.jump else ("start",)

    @property
    def _paths(self) -> int:
        """Of an image."""
        return self.directions if self.direction == "random" else 1

    @property
    def _close(self) -> int:
        """Directions of an image that are looked at more closely."""
        return min(self._paths, _CLOSE)

    @property
    def _together(self) -> int:
        """Images of a chunk: one where its paths fill a step, so that a killed study loses little."""
        return max(1, self.batch // self._paths)

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs the layer, and a model that can be differentiated forwards twice."""
        try:
            layer = self._layer(subject)
        except errors.UserError as error:
            return f"{str(error).rstrip('.')}, or ask for its logits by layer='{_LOGITS}'"
        if self.direction == "gradient" and (reason := forward.not_differentiable(subject)) is not None:
            return reason
        images = forward.images(subject, 1)
        try:
            jax.eval_shape(lambda x, layer: representations.turning(features, x, x, layer), images, layer)
        except errors.UserError:
            raise
        except Exception as error:
            return f"the model cannot be differentiated forwards by JAX ({str(error).splitlines()[0][:120]})"
        return None

    def _layer(self, subject: study.Subject) -> Any:
        """What `features` calls."""
        model = classifiers.in_float32(subject.classifier)
        if self.layer == _LOGITS:
            return model
        layer = layers.Layer(model, self.layer)
        layer.width((1, *forward.images(subject, 1).shape[1:]))
        return layer

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self._together, limit=self.examples)

    def chunks(self, subject: study.Subject) -> int:
        """One an image, or more images where one has fewer paths than a step takes."""
        return len(self._stream(subject))

    def most(self, subject: study.Subject) -> int:
        """The paths that there are."""
        return super().most(subject) * self._paths

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """Paths, and the derivatives and step sizes of a few: a tangent counts as two forward passes, a turning rate as three."""
        chunks, images = self.chunks(subject), self._together
        paths = images if self.direction == "gradient" else -(-images * self._paths // self.batch) * self.batch
        close = images * self._close * (3 * len(self.starts) + len(self.step_sizes) * (3 + 4))
        moved = len(self.starts) * paths * (self.steps + 1)
        shown = min(-(-self.exhibits // images), chunks) * images * self._close * (self.steps + 1)
        gradients = chunks * len(self.starts) * images if self.direction == "gradient" else 0
        looks = 1 if len(self.starts) == 1 else 3
        return chunks * (images + moved + close) + shown * looks + gradients, gradients

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Forward pass, paths, and what is asked of the few."""
        chunks, starts, images = self.chunks(subject), len(self.starts), forward.images(subject, self._together)
        close = subject.shape((self._together * self._close, *images.shape[1:]), images.dtype)
        layer = self._layer(subject)
        found = [forward.program(subject, self._together, times=chunks)]
        if self.direction == "gradient":
            options = {"stride": 1.0, "limit": 1.0, "clip": False}
            gradient = travel.programs(subject.classifier, images, **options)[0]
            found.append(dataclasses.replace(gradient, times=chunks * starts))
            paths = representations.program_of_path(features, images, layer, steps=self.steps, clip=self.clip)
        else:
            options = {"directions": self._paths, "steps": self.steps, "clip": self.clip, "batch": self.batch}
            paths = representations.program_of_sweep(features, images, layer, **options, mesh=subject.mesh)
        found.append(dataclasses.replace(paths, times=paths.times * chunks * starts))
        options = {"clip": self.clip, "turnings": chunks * starts, "step_sizes": chunks * len(self.step_sizes)}
        return [*found, *representations.programs_of_close_look(features, close, layer, **options)]

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """For each image the angles of all its paths with their noise, how straight they are, and what is known of a few."""
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        logits, real = forward.logits(subject, batch)
        labels = real["label"].astype(np.int32)
        records = {
            "row": real["row"].astype(np.int32),
            "label": labels,
            "prediction": logits.argmax(axis=1).astype(np.int32),
            "confidence": classification.confidence(logits),
            "correct": logits.argmax(axis=1) == labels,
        }
        images, given, keys = forward.examples(subject, batch)
        layer = self._layer(subject)
        places, away = {"start": images}, travel.random_directions(keys, images)
        if self.jump:
            places["jump"] = travel.move(images, away, jnp.full(len(mask), self.jump, images.dtype), clip=self.clip)
        shown = max(0, min(self.exhibits - index * self._together, int(mask.sum())))
        for name, start in places.items():
            found, directions = self._bends(subject, layer, start, given, keys)
            records |= {f"{key}/{name}": value[mask] for key, value in found.items()}
            broken = ~np.isfinite(records[f"linearity/{name}"]).all(axis=1)
            if broken.any():
                raise errors.UserError(
                    f"features that are not finite along a path of row {int(records['row'][broken][0])}: choose a shorter span "
                    "or jump, or look at the model's weights."
                )
            inputs, directions = _flat(start, directions)
            turning = mesh.fetch(representations.turning(features, inputs, directions, layer))
            records[f"rate/{name}"] = self._rows(turning.rate)[mask]
            records[f"speed/{name}"] = self._rows(turning.speed)[mask]
            if name == "start":
                found = self._step_sizes(inputs, directions, layer)
                records |= {key: value[mask] for key, value in found.items()}
            if shown:
                paths = self._exhibits(layer, images, away, start, directions, name)
                records |= {f"exhibit/{key}/{name}": value[:shown] for key, value in paths.items()}
        if index == 0:
            records["exhibit/class_names"] = forward.class_names(subject)
        return records

    def _bends(
        self, subject: study.Subject, layer: Any, start: jax.Array, labels: jax.Array, keys: jax.Array
    ) -> tuple[dict[str, np.ndarray], jax.Array]:
        """How all paths from `start` bend, `[images, directions, ...]`, and the directions to look at more closely."""
        path = {"span": self.span, "steps": self.steps, "clip": self.clip}
        records = {}
        if self.direction == "gradient":
            directions, vanished = travel.gradient_directions(subject.classifier, keys, start, labels)
            found = representations.direction_change(features, start, directions, layer, **path)
            found = jax.tree.map(lambda leaf: mesh.fetch(leaf)[:, None], found)
            records["vanished"] = mesh.fetch(vanished)
            directions = directions[:, None]
        else:
            options = {**path, "directions": self._paths, "batch": self.batch, "mesh": subject.mesh}
            found = representations.sweep(features, start, _fold(keys), layer, **options)
            directions = representations.line_directions(start, _fold(keys), count=self._close)
        kept = ("angles", "noise", "straightness", "linearity")
        return records | {key: np.asarray(getattr(found, key), np.float32) for key in kept}, directions

    def _rows(self, values: Any) -> np.ndarray:
        """`[images * directions, ...]` as `[images, directions, ...]`."""
        return np.asarray(values, np.float32).reshape(self._together, self._close, *np.shape(values)[1:])

    def _step_sizes(self, inputs: jax.Array, directions: jax.Array, layer: Any) -> dict[str, np.ndarray]:
        """`[images, directions, sizes]`: the first angle at each step size, its noise, and the tangents' angle."""
        found: dict[str, list] = {"angles": [], "noise": [], "tangents": []}
        for size in self.step_sizes:
            path = {"span": 2 * size, "steps": 2, "clip": self.clip}
            bend = representations.direction_change(features, inputs, directions, layer, **path)
            tangents = representations.tangent_change(features, inputs, directions, layer, step=size)
            for key, value in (("angles", bend.angles[:, 0]), ("noise", bend.noise[:, 0]), ("tangents", tangents)):
                found[key].append(self._rows(mesh.fetch(value)))
        return {f"sizes/{key}": np.stack(values, axis=-1) for key, values in found.items() if values}

    def _exhibits(
        self, layer: Any, images: jax.Array, away: jax.Array, start: jax.Array, directions: jax.Array, name: str
    ) -> dict[str, np.ndarray]:
        """Paths of features and pixels in their own planes, with the way of the jump before what follows it."""
        inputs, _ = _flat(start, directions.reshape(self._together, self._close, *start.shape[1:]))
        options = {"steps": self.steps, "clip": self.clip}

        def points(origin: jax.Array, direction: jax.Array, span: float) -> np.ndarray:
            found = representations.feature_path(features, origin, direction, layer, span=span, **options)
            return np.asarray(mesh.fetch(found), np.float64)

        path, pixels = points(inputs, directions, self.span), self._pixels(inputs, directions, self.span)
        if name == "jump":
            origin, jumps = _flat(images, jnp.repeat(away[:, None], self._close, axis=1))
            path = np.concatenate([points(origin, jumps, self.jump)[:, :-1], path], axis=1)
            pixels = np.concatenate([self._pixels(origin, jumps, self.jump)[:, :-1], pixels], axis=1)
        (planes, shares), (pixel_planes, _) = bends.project(path), bends.project(pixels)
        found = {"plane": planes, "shares": shares, "pixels": pixel_planes}
        return {key: self._rows(value) for key, value in found.items()}

    def _pixels(self, inputs: jax.Array, directions: jax.Array, span: float) -> np.ndarray:
        origin, along = (
            np.asarray(mesh.fetch(part), np.float64).reshape(len(part), 1, -1) for part in (inputs, directions)
        )
        moved = origin + np.linspace(0.0, span, self.steps + 1)[None, :, None] * along
        return np.clip(moved, 0.0, 1.0) if self.clip else moved

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Mean direction change, total turning and how straight paths are, with intervals over images; growth with the step."""
        starts = {name: representation_summary.bends(records, name) for name in self.starts}
        angles = {name: representation_summary.per_image(records[f"angles/{name}"]) for name in self.starts}
        summary = {
            "examples": len(records["row"]),
            "paths": int(records["straightness/start"].size),
            "starts": starts,
            "change": _change(angles),
            "correlation": representation_summary.correlation(records["confidence"], angles["start"]),
            "exponent": None,
        }
        if self.step_sizes:
            tangents = records["sizes/tangents"]
            step = self.span / self.steps
            summary["exponent"] = representation_summary.exponent(tangents, self.step_sizes, step)
        return {**summary, "caveats": self._caveats(records, summary)}

    def _caveats(self, records: Mapping[str, np.ndarray], summary: Mapping[str, Any]) -> list[str]:
        caveats = [
            f"Angles depend on the step: {self.steps} steps to ε = {self.span:g} are this study's, not the paper's, which gives "
            "none. They do not change when all features are scaled, and do when single ones are."
        ]
        if self.clip:
            caveats.append("Moved images are put back into [0, 1], which bends their path by itself.")
        for name, entry in summary["starts"].items():
            if entry["below_noise"] > 0:
                caveats.append(
                    f"{entry['below_noise']:.1%} of the angles {STARTS[name]} are smaller than what rounding makes of a straight "
                    "path."
                )
            if entry["no_rate"] == 1.0:
                caveats.append(
                    f"The exact turning rate {STARTS[name]} is zero in every direction: the model is piecewise linear there, and "
                    "all of its direction change is in its kinks."
                )
            if f"vanished/{name}" in records and records[f"vanished/{name}"].any():
                caveats.append(
                    f"{records[f'vanished/{name}'].mean():.1%} of the gradients {STARTS[name]} are zero or not finite: no "
                    "direction to go, and angles of zero."
                )
        if summary["examples"] < 5:
            caveats.append(f"{summary['examples']} images: the intervals over images are too narrow.")
        return caveats

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Direction changes along the path, against the step size, and paths in their planes."""
        if not findings:
            return {}
        figures = {"direction_change": representation_figures.changes(findings, self.span, self.steps)}
        if self.step_sizes:
            figures["step_size"] = representation_figures.step_sizes(findings, self.step_sizes, self.span / self.steps)
        if self.exhibits:
            figures["paths"] = representation_figures.paths(findings)
        return figures

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """The mean direction change from the image."""
        return {"direction change of features (rad)": study.number(finding.summary["starts"]["start"]["angle"], ".3f")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run and start."""
        which = f"{self._paths} random directions" if self.direction == "random" else "the FGSM direction"
        images = representation_summary.count_text(findings)
        caption = (
            f"{self.layer} along {which} of {images}, {self.steps} steps to ε = {self.span:g} (RMS change of a pixel). θ is the "
            "angle between successive steps, 0 straight on, 1.57 a right angle. The turning rate is of "
            f"{self._close} of the directions at the start. 95 % bootstrap intervals over images, of means over an image's paths."
        )
        starts = {name: STARTS[name] for name in self.starts}
        return {"representation_curvature": representation_summary.table(findings, starts, caption)}

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Mean direction change and variance off the line, on the same images along the same directions."""
        left, right = study.pair(first, second)
        found = []
        for name in self.starts if len(left) else ():
            for key, words, format in (
                ("angles", "mean direction change of features (rad)", "+.3f"),
                ("linearity", "variance of features off the line", "+.2%"),
            ):
                pair = [
                    representation_summary.per_image(finding.records[f"{key}/{name}"][rows])
                    for finding, rows in ((first, left), (second, right))
                ]
                if key == "linearity":
                    pair = [1.0 - values for values in pair]
                difference, test = statistics.paired_difference(*pair), statistics.sign_flip(*pair)
                found.append(study.comparison(f"{words}, {STARTS[name]}", difference, test, format))
        return found

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """The number of paths besides."""
        return {
            **super().card(finding),
            "paths": finding.summary["paths"],
            "subset": "the first images in the order of the data set",
        }


def _change(angles: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """Mean angle after the jump minus before, of the same images."""
    if "jump" not in angles:
        return None
    return representation_summary.plain(statistics.mean(angles["jump"] - angles["start"]))


def _flat(images: jax.Array, directions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images `[m, ...]` and directions `[m, n, ...]` as pairs `[m * n, ...]`."""
    return jnp.repeat(images, directions.shape[1], axis=0), directions.reshape(-1, *images.shape[1:])


@jax.jit
def _fold(keys: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, _PURPOSE))(keys)
