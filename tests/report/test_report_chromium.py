"""The page in a real browser: laid out without overflow on a wide screen and a phone, light and dark, without network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
)

# Measured inside a frame, whose width is the phone's: a window has a least width.
_PROBE = """<!doctype html><body>
<iframe id="f" src="{page}" style="width:{width}px;height:900px;border:0"></iframe><pre id="o"></pre>
<script>document.getElementById("f").onload = function () {{
const d = this.contentDocument, w = this.contentWindow, style = e => w.getComputedStyle(e);
const box = e => e.getBoundingClientRect();
const spill = [...d.querySelectorAll("main *")].filter(e => !e.closest(".scroll,.drawing,pre,svg") && box(e).right > {width} + 1);
document.getElementById("o").textContent = JSON.stringify({{
  overflow: d.documentElement.scrollWidth - {width}, spill: spill.map(e => e.outerHTML.slice(0, 80)),
  figures: [...d.querySelectorAll("figure svg")].map(e => [box(e).width, box(e).height]),
  ground: style(d.body).backgroundColor, ink: style(d.body).color,
  axes: style(d.querySelector("figure svg text")).fill, requests: w.performance.getEntriesByType("resource").length,
  small: [...d.querySelectorAll("main p, main td, main li, nav a")].map(e => parseFloat(style(e).fontSize)).sort()[0]}});
}}</script>"""


def _measure(tmp_path, page, width, *flags):
    probe = tmp_path / "probe.html"
    probe.write_text(_PROBE.format(page=page.as_uri(), width=width), encoding="utf-8")
    profile = tmp_path / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = (_BROWSER, *_FLAGS, *flags, f"--user-data-dir={profile}", "--window-size=1400,1000", "--dump-dom")
    done = subprocess.run((*command, probe.as_uri()), capture_output=True, text=True, timeout=60, check=False)
    match = re.search(r'<pre id="o">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    return json.loads(match.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(_BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1300, "dark")])
def test_layout(page, tmp_path, width, scheme):
    found = _measure(tmp_path, page, width, *(("--force-dark-mode",) if scheme == "dark" else ()))
    assert found["overflow"] <= 0
    assert found["spill"] == []
    assert len(found["figures"]) == 2
    assert all(height > 100 and size > 200 for size, height in found["figures"])
    assert found["requests"] == 0
    assert found["small"] >= 13
    ground, ink, axes = (_luminance(found[key]) for key in ("ground", "ink", "axes"))
    assert (ground > 0.9, ink < 0.05) == (True, True) if scheme == "light" else (ground < 0.02, ink > 0.6)
    for text in (ink, axes):
        assert (max(ground, text) + 0.05) / (min(ground, text) + 0.05) > 7  # WCAG AAA.


def _luminance(color: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2)."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
