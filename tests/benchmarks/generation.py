"""How fast the embedded data set is made: `python tests/benchmarks/generation.py` prints one line for each image size."""

from __future__ import annotations

import tempfile
import time

from robust_vit import data
from robust_vit.data import rendering


def generation() -> None:
    """Seconds for 9,000 training and 1,000 test images, from nothing to a data set on disk."""
    for size in rendering.SIZES:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            options = {"size": size, "train_examples": 9000, "test_examples": 1000}
            data.open_source("textured_shapes/aligned", split="train", data_dir=folder, **options)
            print(f"textured_shapes/aligned, {size} px, 10,000 images: {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    generation()
