"""A figure without a screen, what its pictures share (colours, axes of tokens, tables, marks), and its file."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_syne.errors import DISK_ERRNOS, CannotCreate, ConfigError

DPI = 100
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Source Han Sans",
    "SimHei",
    "PingFang SC",
    "Microsoft YaHei",
)
"""Those for what DejaVu Sans has no letters for; of them the installed ones are used."""
_told_missing: set[str] = set()
"""Letters of which it was said already: a plan is several pictures with one name."""
_MISSING_GLYPH = re.compile(r"Glyph (\d+) .*missing from")


def style() -> Any:
    """What all pictures share. No text is a formula: a dollar sign in a name is that and nothing more."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return {
        "font.family": ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)],
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
        "font.size": 11,
        "axes.titlesize": 13,
        "hatch.linewidth": 0.6,
        "axes.axisbelow": True,
    }


@contextmanager
def created(path: Path) -> Iterator[None]:
    """Around the making of a file: CannotCreate where its name or folder cannot be had; a full disk stays OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            raise
        raise CannotCreate(f"{path}: cannot be created: {error.strerror}") from None


@contextmanager
def picture(
    path: str | Path,
    width: int,
    height: int,
    rows: int = 1,
    columns: int = 1,
    *,
    heights: Sequence[float] | None = None,
    widths: Sequence[float] | None = None,
    scale: int = 1,
) -> Iterator[list[Any]]:
    """Axes to draw on, row by row; afterwards the PNG of ``width`` x ``height`` pixels appears, whole.

    ``heights`` and ``widths``: of the rows and columns to each other. ``scale`` 2 = twice as many pixels each way
    for the same drawing, as print needs. Raises ConfigError where the name does not end in ``.png``, CannotCreate.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ConfigError(f"{path}: pictures are written as .png")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    temporary = path.with_name(path.name + ".tmp")
    with matplotlib.rc_context(style()), _missing_glyphs(path):
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights, width_ratios=widths)
        yield list(axes.flat)
        try:
            with created(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                # without the library's version in it: the same numbers give the same bytes
                figure.savefig(temporary, format="png", dpi=DPI * scale, metadata={"Software": None})
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextmanager
def _missing_glyphs(path: Path) -> Iterator[None]:
    """Letters that no font here has, told in one line on stderr in place of a warning for each."""
    missing: list[str] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="Glyph .* missing from")
        shown = warnings.showwarning

        def show(message: Warning | str, *rest: Any, **options: Any) -> None:
            found = _MISSING_GLYPH.match(str(message))
            if found:
                letter = chr(int(found[1]))
                if letter not in _told_missing:
                    _told_missing.add(letter)
                    missing.append(letter)
            else:
                shown(message, *rest, **options)

        warnings.showwarning = show
        yield
    if missing:
        letters = "".join(missing[:20]) + ("..." if len(missing) > 20 else "")
        print(
            f"note: {path}: no installed font has {letters!r}, drawn as boxes; the .html output shows "
            "them, or install one such as Noto Sans CJK",
            file=sys.stderr,
            flush=True,
        )


def colours(names: Sequence[str]) -> dict[str, Any]:
    """A colour for each name: twenty that differ, then shades of a wheel."""
    import matplotlib

    if len(names) <= 20:
        pairs = matplotlib.colormaps["tab20"]  # a dark and a light one in turn: the dark ones first
        return {name: pairs(2 * (number % 10) + number // 10) for number, name in enumerate(names)}
    wheel = matplotlib.colormaps["hsv"]
    return {name: wheel(number / len(names)) for number, name in enumerate(names)}


def tokens_axis(axis: Any) -> None:
    """Write numbers of tokens on an axis as 2 M, 90 B."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, position: tokens_text(value)))


def log_axis(axis: Any, form: str = "{:g}", base: float = 10) -> None:
    """Write the numbers of a logarithmic axis without a formula, where matplotlib would write any."""
    from matplotlib.ticker import LogFormatterSciNotation

    class Plain(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return form.format(x) if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain(base))
    axis.set_minor_formatter(Plain(base))


def tokens_text(tokens: float) -> str:
    """2 M, 90 B, 3.5 T: SI prefixes, but B for a billion as everybody says; four digits at most."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(tokens) >= size * 0.99995:
            return f"{tokens / size:.4g} {letter}"
    return f"{tokens:.4g}"


def wrapped(title: str, width: int) -> str:
    """A title in as many lines as it needs over a picture of ``width`` pixels."""
    return "\n".join(textwrap.fill(line, width // 10, break_on_hyphens=False) for line in title.split("\n"))


def table(axis: Any, header: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[float]) -> None:
    """Fill ``axis`` with a table of text; ``widths`` of the columns to each other."""
    axis.set_axis_off()
    total = sum(widths)
    drawn = axis.table(
        [list(header), *map(list, rows)],
        colWidths=[width / total for width in widths],
        cellLoc="left",
        bbox=[0, 0, 1, 1],
        edges="B",
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(10)
    for (row, _), cell in drawn.get_celld().items():
        cell.set_edgecolor("#bbbbbb")
        cell.PAD = 0.01
        if row == 0:
            cell.set_text_props(weight="bold")


def numbered(axis: Any, points: Sequence[tuple[float, float]]) -> None:
    """A number from 1 in a circle beside each point (x, y), none over another or over a point that has one.

    To be called last: where a circle may stand depends on everything that takes room.
    """
    axis.figure.draw_without_rendering()
    places = [tuple(place) for place in axis.transData.transform(points)] if points else []
    box = axis.bbox
    taken: list[tuple[float, float]] = []
    around = [(0, 1), (1, 1), (-1, 1), (1, 0), (-1, 0), (0, -1), (1, -1), (-1, -1)]
    for number, (x, y) in enumerate(places, 1):
        free = [
            (dx * far, dy * far)
            for far in (17, 30, 43, 56)
            for dx, dy in around
            if box.x0 + 9 < x + dx * far < box.x1 - 9
            and box.y0 + 9 < y + dy * far < box.y1 - 9
            and all(max(abs(x + dx * far - a), abs(y + dy * far - b)) > 19 for a, b in taken)
            and all(max(abs(x + dx * far - a), abs(y + dy * far - b)) > 12 for a, b in places)
        ]
        dx, dy = free[0] if free else (0, 17)
        taken.append((x + dx, y + dy))
        axis.annotate(
            str(number),
            points[number - 1],
            xytext=(dx * 72 / DPI, dy * 72 / DPI),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            weight="bold",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": "black"},
            arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.7, "shrinkB": 3},
            zorder=10,
        )
