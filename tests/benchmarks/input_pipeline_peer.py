"""tf.data's side of `input_pipeline.py`, run by an interpreter that has TensorFlow; prints images a second.

python input_pipeline_peer.py convert IMAGES.npz OUT.tfrecord
python input_pipeline_peer.py jpeg|memory|disk OUT.tfrecord BATCH BATCHES WARM_UP
"""

from __future__ import annotations

import os
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf

AUTO = tf.data.AUTOTUNE


def convert(source: str, target: str) -> None:
    """Encoded images and labels to a tfrecord file."""
    arrays = np.load(source)
    ends = np.cumsum(arrays["lengths"])
    content = arrays["content"].tobytes()
    with tf.io.TFRecordWriter(target) as writer:
        for label, begin, end in zip(arrays["labels"], ends - arrays["lengths"], ends, strict=True):
            features = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[content[begin:end]])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[int(label)])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


def _parse(record):
    kinds = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
    example = tf.io.parse_single_example(record, kinds)
    return example["image"], example["label"]


def _window(content, label):
    box, size, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(content),
        tf.zeros([0, 0, 4]),
        area_range=(0.08, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.stack([box[0], box[1], size[0], size[1]])
    image = tf.image.resize(tf.image.decode_and_crop_jpeg(content, window, channels=3), (224, 224))
    return tf.image.random_flip_left_right(tf.cast(image, tf.uint8)), label


def _small(content, label):
    return tf.ensure_shape(tf.io.decode_image(content, 3, expand_animations=False), (32, 32, 3)), label


def _pad_crop_flip(image, label):
    image = tf.image.random_crop(tf.pad(image, ((4, 4), (4, 4), (0, 0))), (32, 32, 3))
    return tf.image.random_flip_left_right(image), label


def pipeline(case: str, path: str, batch: int) -> tf.data.Dataset:
    """Endless uint8 batches, in the order of the file (no shuffle: the other side has a true permutation)."""
    records = tf.data.TFRecordDataset(path).map(_parse, num_parallel_calls=AUTO)
    if case == "jpeg":
        images = records.repeat().map(_window, num_parallel_calls=AUTO)
    elif case == "memory":
        images = records.map(_small, num_parallel_calls=AUTO).cache().repeat()
        images = images.map(_pad_crop_flip, num_parallel_calls=AUTO)
    else:
        images = records.repeat().map(_small, num_parallel_calls=AUTO).map(_pad_crop_flip, num_parallel_calls=AUTO)
    options = tf.data.Options()
    options.autotune.enabled = True
    return images.batch(batch, drop_remainder=True).prefetch(AUTO).with_options(options)


def measure(case: str, path: str, batch: int, batches: int, warm_up: int) -> float:
    """Images a second after the warm-up."""
    iterator = iter(pipeline(case, path, batch))
    for _ in range(warm_up):
        next(iterator)
    begin = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batch * batches / (time.perf_counter() - begin)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(*sys.argv[2:])
    else:
        print(tf.__version__)
        for job in sys.argv[2:]:
            case, path, *numbers = job.split(":")
            print(measure(case, path, *map(int, numbers)))
