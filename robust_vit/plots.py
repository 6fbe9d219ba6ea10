"""The house style of figures, and how they are saved: readable on light and on dark paper, the same bytes each time."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker
from matplotlib.backends import backend_agg

from robust_vit import files

INK = "#40464e"
"""Text and axes. In SVG it becomes `currentColor`, so that a page's own text colour is used."""

INK_ON_DARK = "#c6ccd4"

SERIES = ("#2f80d0", "#d0701c", "#2a9a6a", "#b8559e", "#8a6fd0", "#d04a52", "#1f93a6", "#94841a")
"""One colour a run: each has a contrast of at least 3 to white and to near black (tests/studies holds them to it)."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

CONFIDENCES = (1e-3, 1 - 1e-8)
"""Ends of an axis of confidences: some are one, for which a logarithm has no room."""

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, 'DejaVu Sans', sans-serif"

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelpad": 6,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": 100,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",  # The one font that Matplotlib brings: the layout is the same on every machine.
    "font.size": 10,
    "grid.alpha": 0.18,
    "grid.color": INK,
    "grid.linewidth": 0.8,
    "image.interpolation": "nearest",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.labelcolor": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "pdf.fonttype": 42,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "robust_vit",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 9,
    "xtick.major.size": 3.5,
    "ytick.color": INK,
    "ytick.labelsize": 9,
    "ytick.major.size": 0.0,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The house style for everything drawn inside; a user's own Matplotlib settings are left as they were."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def figure(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 6.4,
    height: float = 3.8,
    share_x: bool | str = False,
    share_y: bool | str = False,
    ratios: Sequence[float] | None = None,
) -> tuple[matplotlib_figure.Figure, np.ndarray]:
    """A figure and its axes, `[rows, columns]`; call it inside `style()`.

    No pyplot: figures are plain objects, freed when dropped, and safe in threads.

    Args:
      rows: of axes.
      columns: of axes.
      width: of the whole figure, in inches.
      height: of the whole figure, in inches.
      share_x: True, False, "row" or "col".
      share_y: likewise.
      ratios: relative heights of the rows.
    """
    drawn = matplotlib_figure.Figure(figsize=(width, height), layout="constrained")
    axes = drawn.subplots(
        rows, columns, squeeze=False, sharex=share_x, sharey=share_y, gridspec_kw={"height_ratios": ratios}
    )
    return drawn, axes


def color(index: int) -> str:
    """The colour of the run at this position; after eight they come again, with another marker."""
    return SERIES[index % len(SERIES)]


def marker(index: int) -> str:
    """The marker of the run at this position: no figure tells runs apart by colour alone."""
    return MARKERS[(index + index // len(SERIES)) % len(MARKERS)]


def percent(axis: matplotlib_axes.Axes, which: str = "y") -> None:
    """Labels an axis of shares as percentages."""
    target = axis.yaxis if which == "y" else axis.xaxis
    target.set_major_formatter(ticker.PercentFormatter(xmax=1.0, decimals=None))


def logarithmic(axis: matplotlib_axes.Axes, which: str = "y") -> None:
    """Makes an axis logarithmic, its numbers plain where they are short: 0.01, 2.5, 100."""
    axis.set(**{f"{which}scale": "log"})
    target = axis.yaxis if which == "y" else axis.xaxis
    target.set_major_formatter(_Short())
    target.set_minor_formatter(_Short())


def confidence(axis: matplotlib_axes.Axes) -> None:
    """Makes the horizontal axis one of confidences within `CONFIDENCES`: 90 %, 99 % and 99.9 % are as far apart."""

    def text(value: float, _: int) -> str:
        # Beyond 99.9 % each second power of ten from one, for which there is room.
        if value < 0.9995:
            return f"{100 * value:.3g}%"
        power = round(-np.log10(1.0 - value))
        return "" if power % 2 else "1−10⁻" + "⁰¹²³⁴⁵⁶⁷⁸⁹"[power]

    axis.set_xscale("logit")
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(text))
    axis.xaxis.set_minor_locator(ticker.NullLocator())


def legend(axis: matplotlib_axes.Axes, **options) -> None:
    """A legend, where there is something to tell apart."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        axis.legend(handles, labels, **options)


def render(drawn: matplotlib_figure.Figure, format: str) -> bytes:
    """The figure as a file's content. The same figure gives the same bytes: no dates, no random identifiers.

    Args:
      drawn: made inside `style()`.
      format: "svg" (transparent; text takes the colour of the page around it, or of the reader's light or dark
        preference when opened alone), "pdf" (transparent, dark text) or "png" (white ground, 200 dots per inch).
    """
    buffer = io.BytesIO()
    # Matplotlib subsets fonts for PDF through fontTools, which tells every step of it at the level INFO.
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    with style():
        if format == "svg":
            drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "robust_vit"})
            return _adapt(buffer.getvalue().decode("utf-8")).encode("utf-8")
        if format == "pdf":
            drawn.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": "robust_vit"})
        else:
            drawn.savefig(buffer, format=format, dpi=200, facecolor="white", metadata={"Software": "robust_vit"})
    return buffer.getvalue()


def save(
    drawn: matplotlib_figure.Figure, stem: os.PathLike | str, formats: Sequence[str] = ("svg", "pdf")
) -> list[pathlib.Path]:
    """Writes `stem.svg`, `stem.pdf`, ... whole or not at all, and returns their paths."""
    paths = [pathlib.Path(f"{stem}.{format}") for format in formats]
    for path, format in zip(paths, formats, strict=True):
        files.write_bytes(path, render(drawn, format))
    return paths


def images(axis: matplotlib_axes.Axes, image: np.ndarray, *, symmetric: bool = False) -> None:
    """Shows one image `[height, width, 1 or 3]` without axes.

    Args:
      axis: to draw on.
      image: canonical pixels in [0, 1]; for `symmetric` a difference, whose zero becomes mid-grey.
      symmetric: scale by the largest absolute value.
    """
    image = np.asarray(image, np.float64)
    if symmetric:
        image = 0.5 + 0.5 * image / max(np.abs(image).max(), 1e-12)
    image = np.clip(image, 0.0, 1.0)
    if image.shape[-1] == 1:
        axis.imshow(image[..., 0], cmap="gray", vmin=0.0, vmax=1.0)
    else:
        axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


class _Short(ticker.LogFormatterSciNotation):
    """Labels of a logarithmic axis: powers of ten where a plain number would be long."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        text = super().__call__(x, pos)
        return f"{x:.6g}" if text and 1e-3 <= x < 1e4 else text


def _adapt(svg: str) -> str:
    """The ink to the reader's colour, the font to the reader's."""
    svg = svg.replace(INK, "currentColor").replace("'DejaVu Sans'", _FONTS)
    # `:root` matches only where the SVG is its own document; inside a page the page's colour is inherited.
    rules = (
        f"<style>svg.figure:root{{color:{INK}}}@media (prefers-color-scheme:dark)"
        f"{{svg.figure:root{{color:{INK_ON_DARK}}}}}</style>"
    )
    start = svg.index("<svg")
    end = svg.index(">", start) + 1
    opening = svg[start:end].replace("<svg", '<svg class="figure"', 1)
    return svg[:start] + opening + "\n " + rules + svg[end:]


def rasterize(drawn: matplotlib_figure.Figure) -> np.ndarray:
    """The figure as uint8 `[height, width, 4]`, for tests and notebooks."""
    with style():
        canvas = backend_agg.FigureCanvasAgg(drawn)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba()).copy()
