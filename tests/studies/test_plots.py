"""Figures are readable on both grounds, the same bytes each time, and leave Matplotlib as it was."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib import colors

from robust_vit import plots


def luminance(color):
    channels = np.asarray(colors.to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(first, second):
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("color", plots.SERIES)
@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117", "#1c2128"])
def test_every_run_is_visible_on_light_and_dark_ground(color, ground):
    assert contrast(color, ground) >= 3.0


def test_text_is_readable_on_light_and_dark_ground():
    assert contrast(plots.INK, "#ffffff") >= 7.0
    assert contrast(plots.INK_ON_DARK, "#1c2128") >= 7.0


def test_no_two_runs_share_colour_and_marker():
    assert len({(plots.color(i), plots.marker(i)) for i in range(64)}) == 64


def draw():
    with plots.style():
        figure, axes = plots.figure()
        axes[0, 0].plot([0, 1], [0, 1], color=plots.color(0), label="run")
        axes[0, 0].set_title("A title")
        plots.percent(axes[0, 0])
        plots.legend(axes[0, 0])
    return figure


@pytest.mark.parametrize("format", ["svg", "pdf", "png"])
def test_the_same_figure_is_the_same_bytes(format, tmp_path):
    first, second = plots.render(draw(), format), plots.render(draw(), format)
    assert first == second
    (path,) = plots.save(draw(), tmp_path / "figure", (format,))
    assert path.read_bytes() == first
    assert path.name == f"figure.{format}"


def test_svg_takes_the_readers_colour_and_font():
    svg = plots.render(draw(), "svg").decode()
    assert plots.INK not in svg.replace(f"svg.figure:root{{color:{plots.INK}}}", "")
    assert svg.count("currentColor") > 5
    assert "prefers-color-scheme:dark" in svg
    assert "system-ui" in svg
    assert ">A title<" in svg
    assert "fill: #ffffff" not in svg


def test_a_users_settings_are_kept():
    before = dict(matplotlib.rcParams)
    draw()
    plots.render(draw(), "svg")
    assert dict(matplotlib.rcParams) == before


def test_an_image_of_one_channel_is_grey():
    with plots.style():
        figure, axes = plots.figure(width=2, height=2)
        plots.images(axes[0, 0], np.full((4, 4, 1), 0.5))
    pixels = plots.rasterize(figure)
    center = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
    assert len(set(center[:3])) == 1
    assert abs(int(center[0]) - 127) <= 2


@pytest.mark.parametrize(
    ("low", "high", "expected", "plain"),
    [
        (2.29, 2.47, {"2.3", "2.4"}, True),
        (0.02, 300.0, {"0.1", "1", "10", "100"}, True),
        (1e-7, 1e5, set(), False),
    ],
)
@pytest.mark.parametrize("which", ["x", "y"])
def test_logarithmic_axes_have_plain_numbers_where_these_are_short(which, low, high, expected, plain):
    with plots.style():
        figure, axes = plots.figure(width=3, height=3)
        plots.logarithmic(axes[0, 0], which)
        getattr(axes[0, 0], f"set_{which}lim")(low, high)
        figure.canvas.draw()
        target = getattr(axes[0, 0], f"{which}axis")
        labels = {label.get_text() for label in (*target.get_majorticklabels(), *target.get_minorticklabels())}
    assert expected <= labels
    assert plain != any("10^" in label for label in labels)
