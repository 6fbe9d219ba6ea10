"""SVG files made fit to stand inside one HTML page."""

from __future__ import annotations

import html
import re

_PROLOG = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
_ROOT = re.compile(r"<svg\b([^>]*)>")
_SIZE = re.compile(r'\s(width|height)="([\d.]+)pt"')
_IDENTIFIER = re.compile(r'(\sid="|url\(#|href="#)')


def inline(content: str, *, prefix: str, label: str) -> str:
    """An SVG document as an element: scalable, with a text alternative, and with identifiers of its own.

    Args:
      content: the SVG file. It is trusted: it was drawn by this library.
      prefix: put before every identifier, for two figures of a page may use the same ones.
      label: what a screen reader says.
    """
    content = _PROLOG.sub("", content).strip()
    content = _IDENTIFIER.sub(lambda match: f"{match.group(1)}{prefix}-", content)
    root = _ROOT.search(content)
    if root is None:
        raise ValueError("not an SVG document")
    attributes = root.group(1)
    width = next((value for name, value in _SIZE.findall(attributes) if name == "width"), None)
    attributes = _SIZE.sub("", attributes)
    # Drawn at 4/3 px a point at most: larger than life, lines and letters would be out of proportion to the text.
    pixels = f"{float(width) * 4 / 3:.0f}px" if width else ""
    style = f' style="width:{pixels};--natural:{pixels}"' if pixels else ""
    opened = f'<svg{attributes}{style} role="img" aria-label="{html.escape(label, quote=True)}">'
    return content[: root.start()] + opened + content[root.end() :]
