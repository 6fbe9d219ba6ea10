"""Data: sources of labelled images, pipelines that are pure functions of (seed, step), an embedded data set."""

from robust_vit.data.folder_source import from_folder
from robust_vit.data.loading import DEFAULTS, Bundle, load, split_rows
from robust_vit.data.sources import SOURCES, ArraySource, Source, Subset, from_arrays, open_source
from robust_vit.data.streams import Batch, EvaluationStream, TrainingStream

__all__ = [
    "DEFAULTS",
    "SOURCES",
    "ArraySource",
    "Batch",
    "Bundle",
    "EvaluationStream",
    "Source",
    "Subset",
    "TrainingStream",
    "from_arrays",
    "from_folder",
    "load",
    "open_source",
    "split_rows",
]
