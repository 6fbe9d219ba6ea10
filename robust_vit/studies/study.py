"""What a study is: its subject, its settings, what it found, and how two findings are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib import figure as matplotlib_figure

from robust_vit import classifier as classifiers
from robust_vit import errors, programs, tables
from robust_vit import mesh as meshes
from robust_vit.attacks import threats
from robust_vit.metrics import statistics

EXHIBIT = "exhibit/"


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A run as it was at an earlier step of its training; called, it reads the parameters.

    Attributes:
      variables: reads all variable collections: the parameters, and running statistics where there are any.
    """

    variables: Callable[[], Mapping[str, Any]]

    def __call__(self) -> Any:
        """The parameters."""
        return self.variables()["params"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model with everything that a study may ask of it.

    Attributes:
      classifier: the model, canonical pixels to logits.
      test: the evaluation stream that studies read (`with_batch`, `batch`, `len`, `num_examples`).
      validation: the stream that decides hyper-parameters such as a temperature, or None.
      train: the augmented training stream (`batch(step)`), or None.
      num_classes: how many logits the model gives.
      class_names: one name a class, or empty.
      name: the run's name.
      image_source: the data set's name, as the evaluation card prints it.
      threat: the threat model's name that attacks of this subject default to, or None.
      weight_decay: the coefficient of the L2 term of the objective that the model was trained with.
      label_smoothing: share of the training target spread over all classes.
      mixing: how the training mixes images and labels: `mixup`, `cutmix` and `switch` of `objectives.mixing.mix`; empty where it
        does not.
      seed: of every draw that a study makes.
      mesh: the devices that share the work, or None for JAX's default device.
      rivals: name -> model of the other runs that tell the same classes apart (`introduce`).
      history: training step -> a function that reads the parameters that the run had then, oldest first; may be empty. Those of
        a run are `Snapshot`s of its milestones before the step that is judged.
      warmup: steps of the warm-up that the run began with.
    """

    classifier: classifiers.Classifier | classifiers.Wrapped
    test: Any
    num_classes: int
    validation: Any = None
    train: Any = None
    class_names: tuple[str, ...] = ()
    name: str = "model"
    image_source: str = ""
    threat: str | None = None
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    mixing: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    mesh: Mesh | None = None
    rivals: Mapping[str, classifiers.Classifier | classifiers.Wrapped] = dataclasses.field(default_factory=dict)
    history: Mapping[int, Callable[[], Any]] = dataclasses.field(default_factory=dict)
    warmup: int = 0

    def past(self, step: int) -> classifiers.Classifier | classifiers.Wrapped:
        """The model as it was at a step of its history, with the running statistics of that step where they were kept."""
        reader = self.history[step]
        if isinstance(reader, Snapshot):
            return self.classifier.replace(variables=reader.variables())
        return self.classifier.with_params(reader())

    def early(self) -> int | None:
        """The first step of the history that has the warm-up behind it; None where there is none."""
        return next((step for step in self.history if step >= self.warmup), None)

    def put(self, arrays: Any) -> Any:
        """Arrays `[examples, ...]` on the subject's devices, split over them; the same call on every process."""
        return meshes.put_global(self.mesh, arrays)

    def shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """What `put` makes of an array of this shape, for planning."""
        sharding = None if self.mesh is None else meshes.examples(self.mesh, shape[0])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """What a study found about one subject.

    Attributes:
      settings: the study's settings, `name` among them: `studies.build(**settings)` makes the study again.
      records: per-example arrays of equal leading length, and exhibits.
      summary: what `Study.summarise` made of the records; plain JSON.
      provenance: versions, hardware, wall time, data fingerprint: whatever is no function of the records.
    """

    settings: Mapping[str, Any]
    records: Mapping[str, np.ndarray]
    summary: Mapping[str, Any]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A difference between two findings, second minus first.

    Attributes:
      quantity: what differs, with its condition, for example "accuracy at epsilon 0.1".
      difference: the second finding's number minus the first's.
      low: lower end of the interval of the difference.
      high: upper end.
      p_value: of the hypothesis of no difference, not adjusted: the report adjusts over its whole family (Holm).
      test: the test's name.
      over: what the interval and the test are over, for example "images".
      format: how to print the difference.
    """

    quantity: str
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    test: str
    over: str
    format: str = "+.3f"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The base of every study: a frozen dataclass of settings with defaults.

    A subclass sets the class attributes and defines `chunks`, `chunk`, `summarise`, `figures` and `tables`.

    Attributes:
      name: the key in `studies.STUDIES`.
      title: a heading.
      question: the question that it answers, in a sentence for a reader who knows no jargon.
      paper: authors, year and arXiv id of what it reproduces.
      captions: of its figures by name: what is drawn, in words.
      automatic: the setting that may be "auto": a number is then chosen from the memory of the device (`settle`).
      reads_rivals: whether its records depend on the subject's rivals, so that a new rival asks for new ones.
      later: settings that came later, with what they were before there was a choice: left out of `settings()` where they are
        that, so that an older result still answers the same question.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    paper: ClassVar[str]
    captions: ClassVar[Mapping[str, str]] = {}
    automatic: ClassVar[str] = "batch"
    reads_rivals: ClassVar[bool] = False
    later: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self):
        value = getattr(self, self.automatic, None)
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and value != programs.AUTO and not is_count:
            raise errors.UserError(f"{self.automatic} is {value!r}: expected a whole number from 1, or 'auto'.")

    def settings(self) -> dict[str, Any]:
        """The settings as a plain dict with the study's `name`; equal settings give equal records."""
        chosen = dataclasses.asdict(self).items()
        return {
            "name": self.name,
            **{key: value for key, value in chosen if key not in self.later or value != self.later[key]},
        }

    def applicable(self, subject: Subject) -> str | None:
        """Why this study cannot be made of the subject, in one sentence; None where it can."""
        del subject
        return None

    def looks_back(self, subject: Subject) -> tuple[int, ...]:
        """The steps of the subject's history that its records depend on, so that others ask for new ones."""
        del subject
        return ()

    def mixes(self, subject: Subject) -> Mapping[str, float]:
        """How it mixes training images (`Subject.mixing`), so that another way asks for new records; empty: not at all."""
        del subject
        return {}

    def chunks(self, subject: Subject) -> int:
        """How many chunks the work is cut into."""
        raise TypeError(f"{type(self).__name__} does not define chunks")

    def chunk(self, subject: Subject, index: int) -> dict[str, np.ndarray]:
        """The records of one chunk: a pure function of subject, settings and index.

        All arrays have the same leading length, the number of real examples; `row` and `label` are among them. Keys
        that start with "exhibit/" have a leading length of their own.
        """
        raise TypeError(f"{type(self).__name__} does not define chunk")

    def passes(self, subject: Subject) -> tuple[int, int]:
        """Forward and backward passes of one example that the whole study will execute, for planning."""
        del subject
        return 0, 0

    def programs(self, subject: Subject) -> list[programs.Program]:
        """The compiled programs of the whole study with how often each runs, for planning; the subject's arrays may be shapes."""
        del subject
        return []

    def limit(self, subject: Subject) -> int | None:
        """How many test images are read at most: `examples`, or the threat's number where the study has one; None is all."""
        examples = getattr(self, "examples", None)
        name = getattr(self, "threat", None) or subject.threat
        if examples is not None or name is None or not hasattr(self, "threat"):
            return examples
        return threats.threat(name).examples

    def most(self, subject: Subject) -> int:
        """The largest number that makes sense for the automatic setting: the examples that there are."""
        return min(subject.test.num_examples, self.limit(subject) or subject.test.num_examples)

    def settle(self, subject: Subject, stored: Mapping[str, Any] | None = None) -> Study:
        """This study with a number in place of "auto", the same on each machine of one kind.

        It is the largest power of two whose programs fit in the memory of a device, up to `most`, and up to where a call is
        enough work (`robust_vit.programs.ENOUGH`) that a larger one is no faster an image. The number is then a setting as if it
        had been written down.

        Args:
          subject: what the study will look at.
          stored: the settings of an earlier part of the same study, whose number is kept.

        Raises:
          errors.UserError: not even 1 fits.
        """
        if getattr(self, self.automatic, None) != programs.AUTO or self.applicable(subject) is not None:
            return self
        kept = (stored or {}).get(self.automatic)
        if isinstance(kept, int):
            return dataclasses.replace(self, **{self.automatic: kept})

        def build(number: int) -> list[programs.Program]:
            return dataclasses.replace(self, **{self.automatic: number}).programs(subject)

        number = programs.choose_batch(build, most=self.most(subject), what=f"{self.name}: {self.automatic}")
        return dataclasses.replace(self, **{self.automatic: number})

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Every scalar with its interval, as plain JSON; `caveats` lists what a reader must know, in sentences."""
        raise TypeError(f"{type(self).__name__} does not define summarise")

    def figures(self, findings: Mapping[str, Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Figures by name, with all runs side by side."""
        del findings
        return {}

    def tables(self, findings: Mapping[str, Finding]) -> dict[str, tables.Table]:
        """Tables by name, one row or more a run."""
        del findings
        return {}

    def headline(self, finding: Finding) -> dict[str, tables.Number]:
        """The one or two numbers of this study that stand in the report's first table, by column heading."""
        del finding
        return {}

    def compare(self, first: Finding, second: Finding) -> list[Comparison]:
        """Differences, second minus first, paired on row ids where records are per image."""
        del first, second
        return []

    def card(self, finding: Finding) -> dict[str, Any]:
        """What the evaluation card says of this study: settings, subset, guards, caveats."""
        return {
            "study": self.name,
            "paper": self.paper,
            "settings": self.settings(),
            "examples": count(finding.records),
            "caveats": list(finding.summary.get("caveats", ())),
        }

    def entry(self, finding: Finding, **about: Any) -> dict[str, Any] | None:
        """The model's entry in a leaderboard of robust accuracies (`robust_vit.attacks.card`); None of most studies.

        Args:
          finding: with its provenance.
          **about: what the study does not know: `name`, `architecture`, `seed`.
        """
        del finding, about
        return None

    def run(self, subject: Subject) -> Finding:
        """All chunks, in memory, summarised. `robust_vit.evaluate` does the same on disk and survives being killed."""
        reason = self.applicable(subject)
        if reason is not None:
            raise errors.UserError(f"study {self.name!r} does not apply: {reason}")
        records = merge([self.chunk(subject, index) for index in range(self.chunks(subject))])
        return Finding(self.settings(), records, self.summarise(records))


def introduce(subjects: Mapping[str, Subject]) -> dict[str, Subject]:
    """The subjects, each with the models of the others as its rivals, where these name the same classes of the same data."""

    def alike(one: Subject, other: Subject) -> bool:
        return all(getattr(one, key) == getattr(other, key) for key in ("num_classes", "class_names", "image_source"))

    return {
        name: dataclasses.replace(
            subject,
            rivals={
                other: rival.classifier for other, rival in subjects.items() if other != name and alike(subject, rival)
            },
        )
        for name, subject in subjects.items()
    }


def merge(chunks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Chunks joined in order; a key that only some chunks have (an exhibit) is joined over those."""
    names = sorted({name for chunk in chunks for name in chunk})
    return {name: np.concatenate([chunk[name] for chunk in chunks if name in chunk]) for name in names}


def count(records: Mapping[str, np.ndarray]) -> int:
    """The number of examples in the records."""
    return next((len(value) for name, value in records.items() if not name.startswith(EXHIBIT)), 0)


def pair(first: Finding, second: Finding) -> tuple[np.ndarray, np.ndarray]:
    """Positions in both findings' records of the rows that both have, in the order of the rows.

    Empty where the rows are not those of the same images: another data set, or another label for a row.
    """
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64)
    fingerprints = [finding.provenance.get("data_fingerprint") for finding in (first, second)]
    if None not in fingerprints and fingerprints[0] != fingerprints[1]:
        return nothing
    _, left, right = np.intersect1d(first.records["row"], second.records["row"], return_indices=True)
    if not np.array_equal(first.records["label"][left], second.records["label"][right]):
        return nothing
    return left, right


def number(entry: Mapping[str, Any] | None, format: str) -> tables.Number | None:
    """A table's cell of a summary's entry with `value`, `low`, `high` and `over`."""
    if entry is None:
        return None
    return tables.Number(entry["value"], entry.get("low"), entry.get("high"), entry.get("over", ""), format)


def comparison(quantity: str, difference: statistics.Interval, test: statistics.Test | None, format: str) -> Comparison:
    """A difference with its interval and its test."""
    return Comparison(
        quantity,
        difference.value,
        difference.low,
        difference.high,
        None if test is None else test.p_value,
        "" if test is None else test.method,
        difference.over,
        format,
    )
