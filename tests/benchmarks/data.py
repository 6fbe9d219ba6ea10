"""How fast data is made and read: `python tests/benchmarks/data.py` prints one line a measurement.

Generation of 10,000 images of `textured_shapes` at each size, and batches of the path that keeps images in memory.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np

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


def memory_path() -> None:
    """Images a second of the training stream at 32 px with pad-crop and flip, float32, from memory; best of five."""
    source = data.from_arrays(np.zeros((5000, 32, 32, 3), np.uint8), np.zeros(5000, int))
    stream = data.TrainingStream(source, batch=128, augment=("pad_crop(4)", "flip()"))
    stream.batch(0)
    rates = []
    for _ in range(5):
        begin = time.perf_counter()
        for step in range(40):
            stream.batch(step)
        rates.append(40 * 128 / (time.perf_counter() - begin))
    print(f"training stream from memory, 32 px, pad-crop and flip: {max(rates):,.0f} images/s")


if __name__ == "__main__":
    generation()
    memory_path()
