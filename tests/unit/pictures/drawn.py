"""What the tests of pictures share: the axes that were drawn on, texts over one another, figures of a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def recorded(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Any]:
    """The axes of every picture that ``module`` makes from now on, in one list."""
    seen: list[Any] = []
    original = module.picture

    @contextmanager
    def picture(*arguments: Any, **options: Any) -> Iterator[list[Any]]:
        with original(*arguments, **options) as axes:
            yield axes
        seen.extend(axes)

    monkeypatch.setattr(module, "picture", picture)
    return seen


def texts(figure: Any) -> list[tuple[str, Any]]:
    """(text, its box in pixels) of everything that is written when a figure is drawn."""
    from matplotlib.text import Text

    draw = Text.draw
    found: list[tuple[str, Any]] = []

    def noted(self: Any, renderer: Any, *rest: Any, **options: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), Text.get_window_extent(self, renderer)))  # without an arrow
        draw(self, renderer, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        figure.draw_without_rendering()
    return found


def collisions(figure: Any) -> list[str]:
    """Texts of a figure that lie over one another, and those that reach over its edge."""
    written = [(text, box) for text, box in texts(figure) if box.width > 0]
    slack = 1.0  # boxes have a pixel of air around the letters
    wrong = [
        f"{one!r} over {other!r}"
        for (one, a), (other, b) in combinations(written, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > slack and min(a.y1, b.y1) - max(a.y0, b.y0) > slack
    ]
    edge = figure.bbox
    wrong += [
        f"{text!r} over the edge"
        for text, box in written
        if box.x0 < -slack or box.y0 < -slack or box.x1 > edge.x1 + slack or box.y1 > edge.y1 + slack
    ]
    return wrong


class _Parts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "action")]
        self._inside = tag == "script"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts.append(data)
            self._inside = False


def page_figures(path: Path) -> list[dict[str, Any]]:
    """The figures of a page as ``{"data": [...], "layout": {...}}``; the page must refer to no address."""
    parts = _Parts()
    parts.feed(path.read_text(encoding="utf-8"))
    parts.close()
    assert not parts.addresses, parts.addresses
    found = []
    for script in parts.scripts[1:]:  # the first is plotly itself
        assert not re.search(r"https?://", script)
        for call in re.finditer(r"Plotly\.newPlot\(\s*\"[\w-]+\",\s*", script):
            data, end = json.JSONDecoder().raw_decode(script, call.end())
            layout, _ = json.JSONDecoder().raw_decode(script, re.compile(r",\s*").match(script, end).end())  # type: ignore[union-attr]
            found.append({"data": data, "layout": layout})
    return found
