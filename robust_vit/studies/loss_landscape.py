"""The loss around the weights: a basin or a maze, wide or narrow, in random directions, eigenvectors or the way of training?"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import classifier as classifiers
from robust_vit import curvature, errors, losses, programs, tables, trees
from robust_vit.curvature import directions, landscapes, surfaces
from robust_vit.metrics import statistics
from robust_vit.studies import (
    forward,
    landscape_figures,
    landscape_numbers,
    landscape_planes,
    landscape_report,
    study,
    training_loss,
)

_PURPOSE = 0x6C616E64  # "land": keeps the directions apart from every other draw under the same seed.

# The plane that is being looked at, of one subject at a time: what the next chunk needs again, and would make again.
_planes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class ExampleLosses:
    """Cross-entropy of each image in nats, and whether it is classified rightly; equal for equal smoothing.

    Attributes:
      smoothing: label smoothing of the training objective.
    """

    smoothing: float = 0.0

    def __call__(self, params: Any, batch: Mapping[str, jax.Array], classifier: Any) -> dict[str, jax.Array]:
        """Those of `classifier` with other parameters, `[examples]` each."""
        logits = classifier.with_params(params)(batch["image"])
        return {
            "loss": losses.cross_entropy(logits, batch["label"], smoothing=self.smoothing),
            "correct": jnp.argmax(logits, axis=-1) == batch["label"],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossLandscape(training_loss.TrainingLossStudy):
    """The training loss on a grid of weights around those that were trained, along a line or in a plane.

    Two protocols. Li et al. 2018 (arXiv 1712.09913, figures 1 and 5): random directions whose filters have the norms of the
    weights' filters, biases and norms' scales at rest, 51 x 51 points on [-1, 1]²; and, section 7, the plane of the principal
    components of the training trajectory. Park & Kim 2022 (arXiv 2202.06709, figure 1a; `losslandscape.ipynb`):
    `normalisation="park2022"` (`curvature.normalise_directions` says what it is), 21 x 21 points, and `l2=True`: NLL + L2 on the
    *augmented training images*, which are what is looked at here. The point (0, 0) is the weights themselves, to the bit.
    BatchNorm uses its running statistics, dropout is off.

    Departures: a part of the training images in place of all, the same in every point; mixed labels (mixup, cutmix) are left out.
    The L2 term is weight decay / 2 · |θ|² over all parameters, exactly: how-do-vits-work plots weight decay · Σ|θ_i|₂ over
    tensors, norms and not their squares. Of decoupled decay (AdamW), which is in no loss, it can be most of the picture: hence
    it is recorded always, and drawn where asked for. Under `park2022` tables of positions rest, as there. Random directions are
    not made orthogonal, as published.

    Coordinates of random directions are in units of the filters' norms, so that runs can be compared; of eigenvectors and of
    trajectories they are distances in the weights, which runs of other scales do not share.

    Attributes:
      plane: `random`; `eigenvectors`, of the Hessian's eigenvalues of largest magnitude; or `trajectory`, the principal
        components of the run's checkpoints.
      dimensions: 1 or 2.
      points: along each axis; an odd number, but for a trajectory.
      span: of each axis to both sides; None is 1 for random directions and normalised eigenvectors; for eigenvectors as they are,
        as far as the parabola of the largest rises by one nat; for a trajectory what holds it.
      draws: random lines or planes.
      normalisation: `li2018`, `park2022` or `none`; None is `li2018` for random directions and `none` for others.
      vectors: what biases and norms' scales do under a normalisation: `zero`, `scale` or `copy`
        (`curvature.normalise_directions`).
      l2: add the L2 term to what is drawn and counted, eigenvectors among it; the records have it anyway.
      examples: training images, the first of the stream.
      microbatch: images a compiled step; or "auto", as many as the device has use and memory for.
      block: points a chunk, spread over the devices, so best a multiple of their number; what a chunk has finished is not lost.
      rank: Lanczos steps at most, for eigenvectors.
      tolerance: relative residual at which an eigenvalue counts as converged.
      label_smoothing: of the loss, or None for the subject's.
      weight_decay: of the L2 term, or None for the subject's.
    """

    name: ClassVar[str] = "loss_landscape"
    title: ClassVar[str] = "Loss landscape"
    question: ClassVar[str] = "How fast does the loss rise when the weights are changed, and is the way there smooth?"
    paper: ClassVar[str] = (
        "Li et al. 2018, arXiv 1712.09913, figures 1 and 5; Park & Kim 2022, arXiv 2202.06709, figure 1a"
    )
    captions: ClassVar[Mapping[str, str]] = {
        "contours": (
            "Loss of training images in a plane through the weights, which are the cross. One scale of colours for all runs, "
            "logarithmic; lines are levels, every second one named in nats. Where there is a trajectory, dots are the run's "
            "checkpoints, seen from above: they need not lie in the plane"
        ),
        "surface": "The same as surfaces, on one logarithmic scale of heights",
        "profiles": "Loss along the axes through the weights, which are at zero; of several draws each is a line",
    }
    counts: ClassVar[Mapping[str, int]] = {
        name: 1 for name in ("dimensions", "points", "draws", "examples", "block", "rank")
    }

    plane: str = "random"
    dimensions: int = 2
    points: int = 21
    span: float | None = None
    draws: int = 1
    normalisation: str | None = None
    vectors: str = "zero"
    l2: bool = False
    examples: int = 256
    microbatch: int | str = 64
    block: int = 63
    rank: int = 60
    tolerance: float = 1e-2
    label_smoothing: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        super().__post_init__()
        kinds = (
            ("plane", self.plane, landscape_planes.PLANES),
            ("normalisation", self._normalisation, directions.NORMALISATIONS),
            ("way with vectors", self.vectors, directions.VECTORS),
        )
        for what, value, known in kinds:
            if value not in known:
                raise errors.unknown(what, value, known)
        if self.dimensions > 2:
            raise errors.UserError(f"dimensions is {self.dimensions}: expected 1 or 2.")
        if self.points < 3 or (self.points % 2 == 0 and self.plane != "trajectory"):
            raise errors.UserError(
                f"points is {self.points}: expected an odd number from 3, so that the weights themselves are one of them."
            )
        if self.span is not None and not 0 < self.span < math.inf:
            raise errors.UserError(f"span is {self.span}: expected a positive number, or None.")
        if self.draws > 1 and self.plane != "random":
            raise errors.UserError(f"draws is {self.draws} for plane={self.plane!r}: only random ones are drawn.")
        if self.plane == "trajectory" and self._normalisation != "none":
            raise errors.UserError(
                f"normalisation is {self._normalisation!r} for a trajectory: its plane would no longer hold it; leave it out."
            )
        if self.rank < self.dimensions:
            raise errors.UserError(f"rank is {self.rank}: expected {self.dimensions} or more, one step an eigenvector.")

    @property
    def _normalisation(self) -> str:
        return self.normalisation or ("li2018" if self.plane == "random" else "none")

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs parameters and a training stream, and for a trajectory two checkpoints."""
        reason = super().applicable(subject)
        if reason is not None:
            return reason
        if self.plane == "trajectory" and len(subject.history) < 2:
            return (
                f"the run keeps {len(subject.history)} checkpoints of its training and a trajectory needs two or more: train it "
                'with checkpoint.milestones=("epochs",)'
            )
        return None

    def looks_back(self, subject: study.Subject) -> tuple[int, ...]:
        """All steps of the history, where the plane is that of the trajectory."""
        return tuple(subject.history) if self.plane == "trajectory" else ()

    @property
    def _block(self) -> int:
        """Points a chunk, no more than there are."""
        return min(self.block, self.points**self.dimensions)

    def _blocks(self) -> int:
        return -(-(self.points**self.dimensions) // self._block)

    def chunks(self, subject: study.Subject) -> int:
        """Blocks of points, plane after plane."""
        del subject
        return self.draws * self._blocks()

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """A forward pass an image and point, the last block filled up; a Hessian-vector product counts as two of both."""
        products = 2 * self.rank * self.examples if self.plane == "eigenvectors" else 0
        return self.chunks(subject) * self._block * self.examples + products, products

    def most(self, subject: study.Subject) -> int:
        """The images."""
        del subject
        return self.examples

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Lanczos for eigenvectors, and the losses of a block of points."""
        batch = self._batch_shapes(subject, self.examples)
        classifier = classifiers.in_float32(subject.classifier)
        found = []
        if self.plane == "eigenvectors":
            found += landscape_planes.programs(self._operator(subject, classifier, batch), rank=self.rank)
        rows = directions.shapes(classifier.params, self.dimensions)
        options = {"microbatch": self.microbatch, "mesh": subject.mesh}
        loss, chunks = ExampleLosses(self._loss(subject).smoothing), self.chunks(subject)
        sweep = landscapes.planned(loss, classifier.params, rows, self._block, batch, classifier, **options)
        return [*found, *(dataclasses.replace(one, times=one.times * chunks) for one in sweep)]

    def _operator(self, subject: study.Subject, classifier: Any, batch: Mapping[str, jax.Array]) -> curvature.Operator:
        decay = self._decay(subject) if self.l2 else 0.0
        options = {"microbatch": self.microbatch, "weight_decay": decay, "separable": False}
        return curvature.hessian(self._loss(subject), classifier.params, batch, classifier, **options)

    def _images(self, subject: study.Subject) -> dict[str, np.ndarray]:
        return forward.training_examples(subject.train, 0, self.examples)

    def _plane(self, subject: study.Subject, number: int) -> tuple[landscape_planes.Plane, dict[str, np.ndarray]]:
        """The plane of this number, and the images: the same each time they are asked for."""
        known = _planes.get(subject)
        if known is None or known[0] != (self, number):
            _planes.clear()
            known = (self, number), (self._make_plane(subject, number), self._images(subject))
            _planes[subject] = known
        return known[1]

    def _make_plane(self, subject: study.Subject, number: int) -> landscape_planes.Plane:
        # Half precision would be seen as roughness, so the float32 twin is what is looked at.
        classifier = classifiers.in_float32(subject.classifier)
        options: dict[str, Any] = {"dimensions": self.dimensions, "span": self.span}
        if self.plane == "trajectory":
            return landscape_planes.trajectory(subject, classifier.params, **options)
        key = training_loss.draw(subject, _PURPOSE, number)
        options |= {"normalisation": self._normalisation, "vectors": self.vectors}
        if self.plane == "random":
            return landscape_planes.random(key, classifier.params, **options)
        batch = training_loss.inputs(subject, self._images(subject))
        options |= {"rank": self.rank, "tolerance": self.tolerance}
        return landscape_planes.eigenvectors(
            self._operator(subject, classifier, batch), key, classifier.params, **options
        )

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """A row for each of a block of points: its coordinates, loss, NLL, L2 term, accuracy, and the loss of each image."""
        number, block = divmod(index, self._blocks())
        plane, images = self._plane(subject, number)
        points = curvature.grid(*(curvature.offsets(low, high, self.points) for low, high in plane.spans))
        rows = np.arange(block * self._block, min((block + 1) * self._block, len(points)))
        coordinates = np.zeros((self._block, self.dimensions))
        coordinates[: len(rows)] = points[rows]
        classifier = classifiers.in_float32(subject.classifier)
        inputs = {"image": np.asarray(images["image"], np.float32), "label": np.asarray(images["label"], np.int32)}
        found = curvature.landscape(
            ExampleLosses(self._loss(subject).smoothing),
            classifier.params,
            plane.directions,
            coordinates,
            inputs,
            classifier,
            microbatch=self.microbatch,
            mesh=subject.mesh,
        )
        squares = landscapes.squared_norms(classifier.params, plane.directions, points[rows])
        example_loss = found["loss"][: len(rows)]
        nll = example_loss.mean(axis=1, dtype=np.float64)
        l2 = 0.5 * self._decay(subject) * squares
        broken = ~np.isfinite(nll) & (points[rows] == 0).all(axis=1)
        if broken.any():
            raise errors.UserError(
                "the loss at the weights themselves is not finite: look at the model and its normalisation."
            )
        records = {
            "row": (number * len(points) + rows).astype(np.int32),
            "label": np.full(len(rows), -1, np.int32),
            "plane": np.full(len(rows), number, np.int32),
            "coordinates": points[rows],
            "loss": nll + l2,
            "nll": nll,
            "l2": l2,
            "accuracy": found["correct"][: len(rows)].mean(axis=1, dtype=np.float64),
            "example_loss": example_loss,
        }
        if index == 0:
            exhibits = {
                **plane.exhibits,
                "image_row": np.asarray(images["row"], np.int32),
                "image_label": np.asarray(images["label"], np.int32),
                "norm": np.asarray([float(trees.norm(classifier.params))]),
                "running_statistics": np.asarray(["batch_stats" in getattr(classifier, "variables", {})]),
            }
            records |= {study.EXHIBIT + name: np.asarray(value) for name, value in exhibits.items()}
        if index == self.chunks(subject) - 1:
            _planes.clear()  # Directions are as large as the model, and the next study wants the memory.
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """See `landscape_numbers.summary`; and of the plane what it is known for."""
        numbers = landscape_numbers.summary(landscape_numbers.surface(records, l2=self.l2))
        numbers["l2"] = float(records["l2"][(records["coordinates"] == 0).all(axis=1)][0])
        exhibits = {
            name.removeprefix(study.EXHIBIT): value for name, value in records.items() if name.startswith(study.EXHIBIT)
        }
        numbers["eigenvalues"] = [float(value) for value in exhibits.get("eigenvalues", ())]
        numbers["explained"] = [float(value) for value in exhibits.get("explained", ())[: self.dimensions]]
        return {**numbers, "caveats": landscape_report.caveats(self.settings(), numbers, exhibits)}

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Contours and surfaces of planes, and profiles along the axes."""
        if not findings:
            return {}
        found = {"profiles": landscape_figures.profiles(findings)}
        if self.dimensions == 2:
            found = {
                "contours": landscape_figures.contours(findings),
                "surface": landscape_figures.surfaces(findings),
                **found,
            }
        return found

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """How much the loss rises on half of the way to the edge, or where that is not the same to all sides, its curvature."""
        summary = finding.summary
        if self.plane == "random" and summary["rise"] is not None:
            return {f"rise of the loss at {summary['rise_at']:.3g}": study.number(summary["rise"], ".3g")}
        return {"curvature of the loss along the first axis": study.number(summary["curvature"][0], ".3g")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run."""
        return {
            "loss_landscape": landscape_report.table(
                findings, {**self.settings(), "normalisation": self._normalisation}
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Rise half way to the edge and mean curvature, paired on the images; of random directions, whose units are alike."""
        left, _ = study.pair(first, second)
        names = ("coordinates", "plane", study.EXHIBIT + "image_row", study.EXHIBIT + "image_label")
        alike = all(np.array_equal(first.records[name], second.records[name]) for name in names)
        comparable = self.plane == "random" and self._normalisation != "none"
        if not comparable or not len(left) or not alike or self.examples < 2:
            return []
        grids = [landscape_numbers.surface(finding.records, l2=False) for finding in (first, second)]
        axes, half = grids[0].axes, grids[0].symmetric / 2
        quantities = {
            f"rise of the NLL at {half:.3g} along random directions": lambda values: surfaces.rise(values, axes, half),
            "curvature of the NLL along random directions": lambda values: surfaces.curvature(values, axes).mean(
                axis=-1
            ),
        }
        found = []
        for quantity, statistic in quantities.items():
            pair = [landscape_numbers.per_image(grid, statistic) for grid in grids]
            if np.isfinite(pair).all():
                difference = statistics.paired_difference(*pair)
                found.append(study.comparison(quantity, difference, statistics.sign_flip(*pair), "+.3g"))
        return found

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """As of every study; its examples are the images, beside the points of the grid."""
        points = study.count(finding.records)
        return {**super().card(finding), "examples": self.examples, "points": points}
