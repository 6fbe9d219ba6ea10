"""The embedded data set: procedural shapes with textures, every cue labelled, generated on first use.

`textured_shapes/CONFIG` with CONFIG one of

- `aligned`: texture follows shape; `grey`: the same without colour;
- `random`: texture independent of shape; `conflict`: texture of another class than the shape (both labelled by shape);
- `silhouette`, `edges`: the shape alone, black on white;
- `texture_only`: the texture alone, over the whole image, labelled by it;
- `background(rho)`: aligned, and the background's class equals the label with probability rho, else is another;
- `label_noise(p)`: aligned, with a share p of the training labels moved to another class (`clean_label` keeps the true one).

Other sources of images have one label; these have `shape_label`, `texture_label`, `background_label`, `object_mask`, `box`.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import os
import pathlib
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from robust_vit import errors, files
from robust_vit.data import rendering, shapes, tfds_source

_logger = logging.getLogger(__name__)

_CHUNK = 250  # Images rendered at once: a few megabytes a field.
_THREADS = 2
_RECIPE_KEYS = ("size", "train_examples", "test_examples", "seed")


class TexturedShapesConfig(tfds.core.BuilderConfig):
    """A `rendering.Recipe` as a TFDS config."""

    def __init__(self, recipe: rendering.Recipe):
        super().__init__(name=recipe.name, description=f"{recipe}")
        self.recipe = recipe


class TexturedShapes(tfds.core.GeneratorBasedBuilder):
    """Writes a recipe as TFDS array_record files, in row order. Needs no TensorFlow and downloads nothing."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, recipe: rendering.Recipe, **options):
        super().__init__(config=TexturedShapesConfig(recipe), file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.recipe.size
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(shapes.NAMES)),
            "object_mask": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
            "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
        }
        for key in ("row", "clean_label", "shape_label", "texture_label", "background_label"):
            features[key] = tfds.features.Scalar(dtype=np.int64)
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        recipe = self.builder_config.recipe
        return {
            "train": self._generate_examples("train", recipe.train_examples),
            "test": self._generate_examples("test", recipe.test_examples),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        recipe = self.builder_config.recipe
        chunks = deque(np.arange(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK))
        ahead: deque[futures.Future] = deque()
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            try:
                while chunks or ahead:
                    while chunks and len(ahead) < 2 * _THREADS:
                        ahead.append(pool.submit(_encoded, recipe, split, chunks.popleft()))
                    yield from ahead.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def open_split(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike | None,
    on_bad_image: str,
    on_mode: str | None,
    channels: int | None,
    **options,
) -> tfds_source.TfdsSource:
    """Opens "textured_shapes/CONFIG"; generates it first where it is absent or was left unfinished.

    Args:
      name: "textured_shapes/CONFIG", "textured_shapes/background(0.9)", "textured_shapes/random(size=64, seed=1)".
      split: "train" or "test".
      data_dir: None is `~/.cache/robust_vit/datasets` (below XDG_CACHE_HOME where that is set).
      on_bad_image: see `sources.open_source`.
      on_mode: see `sources.open_source`.
      channels: None or 3.
      **options: size (32 or 64), train_examples (10,000), test_examples (2,000), seed (0).
    """
    if channels not in (None, 3):
        raise errors.UserError(f"data.channels is {channels} but textured_shapes has 3: set it to 3, or leave it None.")
    folder = prepare(parse(name, **options), data_dir=data_dir)
    return tfds_source.TfdsSource(folder, split, on_bad_image=on_bad_image, on_mode=on_mode)


def parse(name: str, **options) -> rendering.Recipe:
    """The recipe of "textured_shapes/CONFIG", "textured_shapes/CONFIG(number)" or "...(number, size=64)"; see `open_split`."""
    _, _, config = name.partition("/")
    try:
        call = ast.parse(config or "aligned", mode="eval").body
        arguments, keywords = [], {}
        if isinstance(call, ast.Call):
            arguments = [ast.literal_eval(argument) for argument in call.args]
            keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            call = call.func
        variant = call.id
    except (SyntaxError, ValueError, AttributeError) as error:
        raise errors.UserError(
            f"data set {name!r} is not understood: write for example textured_shapes/background(0.9, size=64)."
        ) from error
    options = {**options, **keywords}
    for key in options:
        if key not in _RECIPE_KEYS:
            raise errors.unknown("option of textured_shapes", key, _RECIPE_KEYS)
    if len(arguments) > 1:
        raise errors.UserError(
            f"data set {name!r} has {len(arguments)} numbers: give at most one, and the rest by name."
        )
    return rendering.Recipe(variant=variant, parameter=arguments[0] if arguments else None, **options)


def prepare(recipe: rendering.Recipe, *, data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """The folder of a recipe's whole data set, generated where it is not there.

    Everything is written to a hidden folder, flushed, and moved into place by one rename, under a lock that dies with the
    process: a killed generation leaves nothing that could be taken for whole, and the next one starts afresh.

    Raises:
      errors.UserError: not enough space, or no permission.
    """
    root = pathlib.Path(data_dir).expanduser() if data_dir else cache_dir()
    home = root / "textured_shapes"
    folder = home / recipe.name / str(TexturedShapes.VERSION)
    if is_whole(folder, recipe):
        return folder
    with files.disk_errors(folder):
        try:
            home.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError) as error:
            raise errors.UserError(f"{error.filename} is no folder: set data.data_dir to one.") from error
        with _locked(home / f".{recipe.name}.lock"):
            if not is_whole(folder, recipe):
                _generate(recipe, folder, staging=home / f".{recipe.name}.partial")
    return folder


def is_whole(folder: pathlib.Path, recipe: rendering.Recipe) -> bool:
    """Whether a folder holds every record of a recipe, readable to the end."""
    if not (folder / "features.json").is_file():
        return False
    try:
        for split, count in (("train", recipe.train_examples), ("test", recipe.test_examples)):
            source = tfds_source.TfdsSource(folder, split, on_bad_image="raise", on_mode=None)
            if len(source) != count or source[count - 1]["row"] != count - 1:
                return False
    except Exception as error:  # Whatever array_record or TFDS says of a damaged folder.
        _logger.warning("%s is damaged (%s): generating it again", folder, error)
        return False
    return True


def cache_dir() -> pathlib.Path:
    """Where embedded data sets are kept: `~/.cache/robust_vit/datasets`, or below XDG_CACHE_HOME."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "robust_vit" / "datasets"


def _generate(recipe: rendering.Recipe, folder: pathlib.Path, *, staging: pathlib.Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    count = recipe.train_examples + recipe.test_examples
    needed = count * (recipe.size**2 * 4 + 1000)
    free = shutil.disk_usage(folder.parents[1]).free
    if free < needed:
        raise errors.UserError(
            f"{folder.parents[1]} has {free / 1e6:.0f} MB free, textured_shapes needs about {needed / 1e6:.0f}: free some "
            "space, or set data.data_dir to a larger disk."
        )
    _logger.info("generating %d images of textured_shapes/%s into %s", count, recipe.name, folder)
    begin = time.perf_counter()
    try:
        builder = TexturedShapes(recipe=recipe, data_dir=str(staging))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare()  # It prints that it downloads, and progress bars.
        made = pathlib.Path(builder.data_path)
        for path in made.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(made, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _logger.info("generated %d images in %.1f s", count, time.perf_counter() - begin)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    import fcntl

    with open(path, "a") as file:
        with contextlib.suppress(
            OSError
        ):  # Some network file systems have no locks: then two may generate the same bytes.
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _encoded(recipe: rendering.Recipe, split: str, rows: np.ndarray) -> list[tuple[int, dict[str, Any]]]:
    rendered = rendering.render(recipe, split, rows)
    examples = []
    for i, row in enumerate(rows):
        example = {key: int(value[i]) for key, value in rendered.items() if key.endswith("label")}
        example |= {
            "image": _png(rendered["image"][i]),
            "object_mask": _png(rendered["object_mask"][i]),
            "box": rendered["box"][i],
            "row": int(row),
        }
        examples.append((int(row), example))
    return examples


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Noise does not compress: the fastest level costs a twentieth of the default one and 3 % of size.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
