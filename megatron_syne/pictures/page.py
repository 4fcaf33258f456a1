"""Figures of plotly on one HTML page that holds all it needs: no server, no network, opened as a file."""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_syne.errors import ConfigError
from megatron_syne.pictures.canvas import colours, created

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 1em auto; max-width: 1600px; padding: 0 1em; }}
h1 {{ font-size: 1.3em; }}
.figure {{ margin-bottom: 1.5em; break-inside: avoid; }}
</style>
<script>{library}</script>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(path: str | Path, title: str, figures: Sequence[Any]) -> None:
    """One HTML file of plotly ``figures`` below one another appears, whole.

    plotly's script (about 5 MB) is in it once. The same figures give the same bytes.
    Raises ConfigError where the name does not end in ``.html``, CannotCreate.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise ConfigError(f"{path}: pages are written as .html")
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs

    options = {
        "responsive": True,
        "displaylogo": False,  # it links to a site
        "toImageButtonOptions": {"format": "png", "scale": 2},
    }
    parts = [
        to_html(figure, config=options, include_plotlyjs=False, full_html=False, div_id=f"figure-{number}")
        for number, figure in enumerate(figures, 1)
    ]
    body = "\n".join(f'<div class="figure">{part}</div>' for part in parts)
    text = _PAGE.format(title=html.escape(title), library=get_plotlyjs(), body=body)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with created(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def plotly_colours(names: Sequence[str]) -> dict[str, str]:
    """The colours of :func:`canvas.colours` as plotly writes them: ``rgb(31,119,180)``."""
    return css_colours(colours(names))


def css_colours(shades: Mapping[str, Any]) -> dict[str, str]:
    """matplotlib's (red, green, blue, ...) from 0 to 1 as plotly writes them."""
    return {
        name: "rgb({},{},{})".format(*(round(255 * part) for part in colour[:3]))
        for name, colour in shades.items()
    }
