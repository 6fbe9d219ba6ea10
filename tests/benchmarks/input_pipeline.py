"""How fast batches are made, beside tf.data in one run.

    python tests/benchmarks/input_pipeline.py --peer_python=/path/to/venv/bin/python --output=table.md

`--peer_python` is an interpreter with tensorflow-cpu; without it the column of tf.data stays empty. The two sides take turns, and
each cell is the median of `--repeats` turns. Real images come from `--data_dir` (ROBUST_VIT_DATA); `--tiny` uses made ones.
`--workers=threads,processes` compares the readers that the library has with processes in their place. As in training, freed
memory is kept (`robust_vit.allocation`).
"""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import jax
import numpy as np
import PIL
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.dataset_builders import adhoc_builder

import robust_vit
from robust_vit import allocation, data, errors, mesh
from robust_vit.data import draws, transforms

PEER = pathlib.Path(__file__).with_name("input_pipeline_peer.py")
CROP = ("random_resized_crop(224)", "flip()")
SMALL = ("pad_crop(4)", "flip()")
WORKERS = ("threads", "processes")
UNIT = 32  # Images that one process makes at a time, as one thread of the library does.
# One for each augmentation whose cost is measured, at 224 and at 32 px.
AUGMENTATIONS = (
    "pad_crop(4)",
    "flip()",
    "random_resized_crop({size})",
    "simple_random_crop({size})",
    "random_erasing(1.0)",
    "color_jitter(0.4, 0.4, 0.4)",
    "color_jitter(0.4, 0.4, 0.4, 0.1)",
    "three_augment()",
    "rand_augment(2, 9)",
    "rand_augment(2, 9, 0.5, 'timm')",
)


class _Builder(adhoc_builder.AdhocBuilder):
    """Writes encoded images as TFDS does; AdhocBuilder itself wants TensorFlow for that."""

    records: list[dict]

    def _split_generators(self, dl_manager):
        return {"train": enumerate(self.records)}


def write(folder: pathlib.Path, name: str, contents: list[bytes], labels: np.ndarray, *, size: int | None) -> None:
    """The images as array_record (ours) and as the arrays that the peer makes a tfrecord from."""
    features = {
        "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png" if "png" in name else "jpeg"),
        "label": tfds.features.ClassLabel(num_classes=int(labels.max()) + 2),
    }
    builder = _Builder(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": []},
        data_dir=folder,
        file_format="array_record",
        disable_shuffling=True,
    )
    builder.records = [{"image": c, "label": int(label)} for c, label in zip(contents, labels, strict=True)]
    builder.download_and_prepare()
    np.savez(
        folder / f"{name}.npz",
        content=np.frombuffer(b"".join(contents), np.uint8),
        lengths=np.asarray([len(content) for content in contents]),
        labels=labels,
    )


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def prepare(folder: pathlib.Path, arguments: argparse.Namespace) -> None:
    """Four data sets: large JPEGs as they are (progressive) and made sequential, small JPEGs and PNGs; what is there stays."""
    data_dir = pathlib.Path(arguments.data_dir)
    if (folder / "prepared").exists():
        return
    if arguments.tiny:
        noise = np.random.default_rng(0).integers(0, 256, (24, 300, 260, 3), np.uint8)
        large = [encoded(Image.fromarray(image), "JPEG", progressive=True) for image in noise]
        small = [encoded(Image.fromarray(image[:32, :32]), "JPEG") for image in noise]
    else:
        large = [path.read_bytes() for path in sorted((data_dir / "imagenet_samples" / "images").glob("*.jpg"))] * 8
        source = data.open_source("cifar10_q75", data_dir=data_dir / "tfds")
        small = [found.content for found in source.read_encoded(np.arange(20_000))]
    unique = {
        content: encoded(Image.open(io.BytesIO(content)), "JPEG", quality="keep", progressive=False)
        for content in set(large)
    }
    sequential = [unique[content] for content in large]
    png = [encoded(Image.open(io.BytesIO(content)), "PNG") for content in small]
    for name, contents, size in (
        ("progressive", large, None),
        ("sequential", sequential, None),
        ("small_jpeg", small, 32),
        ("small_png", png, 32),
    ):
        write(folder, name, contents, np.arange(len(contents)) % 10, size=size)
        if arguments.peer_python:
            convert = ["convert", str(folder / f"{name}.npz"), str(folder / f"{name}.tfrecord")]
            subprocess.run([arguments.peer_python, str(PEER), *convert], check=True, capture_output=True, timeout=300)
    (folder / "prepared").touch()


def rate(batches: Iterator, *, batch: int, count: int, warm_up: int) -> float:
    """Images a second after the warm-up; closes the iterator."""
    for _ in range(warm_up):
        jax.block_until_ready(next(batches))
    begin = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(next(batches))
    seconds = time.perf_counter() - begin
    batches.close()
    return batch * count / seconds


def peer_rates(python: str, jobs: list[tuple]) -> tuple[str, list[float]]:
    """TensorFlow's version and tf.data's images a second for each (case, tfrecord, batch, count, warm-up)."""
    command = [python, str(PEER), "measure", *(":".join(map(str, job)) for job in jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed: {done.stderr.strip().splitlines()[-1]}")
    version, *found = done.stdout.split()
    return version, [float(rate) for rate in found]


def stream(folder: pathlib.Path, name: str, augment: tuple[str, ...], batch: int, cache: str) -> data.TrainingStream:
    """A training stream over one of the prepared data sets."""
    return data.TrainingStream(data.open_source(name, data_dir=folder), batch=batch, augment=augment, cache=cache)


def pipelines(arguments: argparse.Namespace, folder: pathlib.Path) -> Iterator[str]:
    """Rows of the table of pipelines."""
    tiny = arguments.tiny
    large, small = (8, 8) if tiny else (64, 128)
    rows = [
        ("JPEG, sequential, 256 px -> random resized crop 224, flip", "sequential", "jpeg", CROP, large, "never", 60),
        ("the same, progressive JPEG", "progressive", "jpeg", CROP, large, "never", 40),
        ("32 px in memory, pad-crop, flip", "small_jpeg", "memory", SMALL, small, "always", 400),
        ("32 px JPEG from disk, pad-crop, flip", "small_jpeg", "disk", SMALL, small, "never", 150),
        ("32 px PNG from disk, pad-crop, flip", "small_png", "disk", SMALL, small, "never", 150),
    ]
    jobs, made = [], []
    for _, name, case, augment, batch, cache, count in rows:
        count, warm_up = (2, 1) if tiny else (count, max(count // 6, 8))
        jobs.append((case, folder / f"{name}.tfrecord", batch, count, warm_up))
        made.append(stream(folder, name, augment, batch, cache))
    ours: list[list[float]] = [[] for _ in rows]
    theirs: list[list[float]] = [[] for _ in rows]
    for _ in range(arguments.repeats):
        for rates, each, (_, _, batch, count, warm_up) in zip(ours, made, jobs, strict=True):
            rates.append(rate(each.iterate(pixels="uint8"), batch=batch, count=count, warm_up=warm_up))
        if arguments.peer_python:
            arguments.versions["tensorflow"], found = peer_rates(arguments.peer_python, jobs)
            for rates, one in zip(theirs, found, strict=True):
                rates.append(one)
    yield "| pipeline | batch | ours, images/s | tf.data, images/s | ratio |"
    yield "|---|---|---|---|---|"
    for (title, *_), job, mine, other in zip(rows, jobs, ours, theirs, strict=True):
        yield f"| {title} | {job[2]} | {_spread(mine)} | {_spread(other)} | {_ratio(mine, other)} |"


def devices(arguments: argparse.Namespace, folder: pathlib.Path) -> Iterator[str]:
    """Rows of the table of ways to the device: float32 pixels there, made ready one after the other."""
    batch = 8 if arguments.tiny else 128
    count, warm_up = (2, 1) if arguments.tiny else (300, 30)
    mesh_ = mesh.make()
    ways = {
        "host batches, float32": lambda: stream(folder, "small_jpeg", SMALL, batch, "always").iterate(),
        "to the device as bytes, two ahead": lambda: stream(folder, "small_jpeg", SMALL, batch, "always").on_devices(
            mesh_
        ),
        "made on the device from resident images": lambda: stream(
            folder, "small_jpeg", SMALL, batch, "device"
        ).on_devices(mesh_),
    }
    yield f"| 32 px in memory, pad-crop, flip, on {jax.devices()[0].platform} | images/s | bytes sent a batch |"
    yield "|---|---|---|"
    sizes = (0, batch * (3072 + 4), batch * (4 + 4 + 8 + 4))
    for (title, make), size in zip(ways.items(), sizes, strict=True):
        rates = [rate(make(), batch=batch, count=count, warm_up=warm_up) for _ in range(arguments.repeats)]
        yield f"| {title} | {_spread(rates)} | {size:,} |"


def workers(arguments: argparse.Namespace, folder: pathlib.Path) -> Iterator[str]:
    """Rows of the table of workers: one thread, then as many of each kind as there are cores. Each is told the same work."""
    batch = 8 if arguments.tiny else 64
    count, warm_up = (2, 1) if arguments.tiny else (60, 10)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def threads(number: int) -> Iterator[data.Batch]:
        source = data.open_source("sequential", data_dir=folder)
        return data.TrainingStream(source, batch=batch, augment=CROP, cache="never", workers=number).iterate(
            pixels="uint8"
        )

    kinds = {"1 thread": lambda: threads(1)}
    if "threads" in arguments.workers:
        kinds[f"{cores} threads"] = lambda: threads(cores)
    if "processes" in arguments.workers:
        kinds[f"{cores} processes"] = lambda: by_processes(folder, batch, cores)
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(arguments.repeats):
        for kind, make in kinds.items():
            found[kind].append(rate(make(), batch=batch, count=count, warm_up=warm_up))
    yield f"| JPEG, sequential, 256 px -> random resized crop 224, flip, {cores} cores | images/s | ms an image |"
    yield "|---|---|---|"
    for kind, rates in found.items():
        yield f"| {kind} | {_spread(rates)} | {1e3 / statistics.median(rates):.3f} |"


def by_processes(folder: pathlib.Path, batch: int, count: int) -> Iterator[np.ndarray]:
    """The same batches of bytes made by processes, whose pixels are copied to this one."""
    parts = [(begin, min(begin + UNIT, batch)) for begin in range(0, batch, UNIT)]
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(count, context, initializer=_open, initargs=(folder, batch)) as pool:
        waiting: collections.deque[list[futures.Future]] = collections.deque()
        for step in itertools.count():
            waiting.append([pool.submit(_part, step, *part) for part in parts])
            if len(waiting) > max(2, -(-2 * count // len(parts))):
                images = np.empty((batch, 224, 224, 3), np.uint8)
                for (begin, end), made in zip(parts, waiting.popleft(), strict=True):
                    images[begin:end] = made.result()
                yield images


def _open(folder: pathlib.Path, batch: int) -> None:
    global _stream  # Of a process of `by_processes`, which serves one stream.
    allocation.keep_freed_memory()
    _stream = stream(folder, "sequential", CROP, batch, "never")


def _part(step: int, begin: int, end: int) -> np.ndarray:
    out = np.empty((end - begin, 224, 224, 3), np.uint8)
    found, _ = _stream._make(step, slice(begin, end), out)
    return np.asarray(found.images)


def augmentations(arguments: argparse.Namespace, folder: pathlib.Path) -> Iterator[str]:
    """Rows of the table of augmentations: microseconds an image on one core."""
    yield "| augmentation | 224 px, us/image | 32 px, us/image |"
    yield "|---|---|---|"
    images = {}
    for size, name in ((224, "sequential"), (32, "small_jpeg")):
        source = data.open_source(name, data_dir=folder)
        prepared = data.EvaluationStream(
            source, batch=8 if arguments.tiny else 64, preprocess=(f"resize({size})", f"center_crop({size})")
        )
        images[size] = next(prepared.iterate(pixels="uint8"))["image"]
    for text in AUGMENTATIONS:
        cells = []
        for size, batch in images.items():
            transform = transforms.parse(text.format(size=size))
            drawn = draws.uniforms(np.arange(len(batch)), seed=0, purpose="benchmark", count=transform.draws)
            seconds = _best(lambda: transforms.apply_to_batch(transform, batch.copy(), drawn), arguments)  # noqa: B023
            cells.append(f"{1e6 * seconds / len(batch):.1f}")
        yield f"| `{text.format(size='size')}` | {' | '.join(cells)} |"


def _best(call: Callable[[], object], arguments: argparse.Namespace) -> float:
    seconds = []
    for _ in range(1 if arguments.tiny else 5):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _spread(rates: list[float]) -> str:
    if not rates:
        return "-"
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} - {max(rates):,.0f})"


def _ratio(ours: list[float], theirs: list[float]) -> str:
    return f"{statistics.median(ours) / statistics.median(theirs):.2f}" if theirs else "-"


def _processor() -> str:
    lines = (
        pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if os.path.exists("/proc/cpuinfo")
        else []
    )
    models = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(models) or platform.processor()}, {os.cpu_count()} cores, {platform.system()}"


def main(argv: list[str] | None = None) -> None:
    """Measures, prints the tables and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", default="", help="an interpreter with tensorflow-cpu")
    default = pathlib.Path(__file__).parents[3] / "shared" / "data"
    parser.add_argument("--data_dir", default=os.environ.get("ROBUST_VIT_DATA", str(default)), help="the real images")
    parser.add_argument("--output", default="", help="a markdown file")
    parser.add_argument("--folder", default="", help="where the prepared images stay, for several runs")
    parser.add_argument("--prepare_only", action="store_true", help="fill --folder and measure nothing")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--workers", default=",".join(WORKERS), help="kinds of readers that are compared")
    parser.add_argument("--tiny", action="store_true", help="a few made images: a test that it runs")
    arguments = parser.parse_args(argv)
    arguments.repeats = 1 if arguments.tiny else arguments.repeats
    arguments.workers = arguments.workers.split(",")
    for kind in arguments.workers:
        if kind not in WORKERS:
            raise SystemExit(f"error: {errors.unknown('kind of workers', kind, WORKERS)}")
    allocation.keep_freed_memory()
    arguments.versions = {"robust_vit": robust_vit.__version__}
    arguments.versions |= {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__}
    arguments.versions["pillow"] = PIL.__version__
    tfds.disable_progress_bar()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(arguments.folder or name)
        prepare(folder, arguments)
        if arguments.prepare_only:
            return
        for table in (pipelines, workers, devices, augmentations):
            for line in table(arguments, folder):
                print(line, flush=True)
                lines.append(line)
            lines.append("")
    flags = [f"--peer_python={arguments.peer_python and 'PYTHON'}", f"--repeats={arguments.repeats}"]
    head = [
        "# Input pipeline",
        "",
        f"`python tests/benchmarks/input_pipeline.py {' '.join(flags)}`, {time.strftime('%Y-%m-%d')}, {_processor()}.",
        "Versions: " + ", ".join(f"{key} {value}" for key, value in arguments.versions.items()) + ".",
        "",
        "Batches are uint8 on both sides. Medians (smallest - largest); the two sides take turns in one run. Ours read",
        "array_record in a true permutation, tf.data reads tfrecord in order. Random crops: ours antialiased, tf.data's not.",
        "",
    ]
    text = "\n".join([*head, *lines]).rstrip() + "\n"
    if arguments.output:
        pathlib.Path(arguments.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
