"""A figure without a screen, its colours, and the file it becomes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_syne.errors import CannotCreate, ConfigError

DPI = 100


@contextmanager
def picture(
    path: str | Path, width: int, height: int, rows: int = 1, columns: int = 1
) -> Iterator[list[Any]]:
    """Axes to draw on, row by row; afterwards the PNG of ``width`` x ``height`` pixels appears, whole.

    Raises ConfigError where the name does not end in ``.png``, CannotCreate.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ConfigError(f"{path}: pictures are written as .png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    yield list(figure.subplots(rows, columns, squeeze=False).flat)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # without the library's version in it: the same numbers give the same bytes
        figure.savefig(temporary, format="png", metadata={"Software": None})
        os.replace(temporary, path)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise CannotCreate(f"{path}: cannot be created: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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
    from matplotlib.ticker import EngFormatter

    class Tokens(EngFormatter):
        """SI prefixes, but B for a billion as everybody says."""

        def __call__(self, value: float, position: int | None = None) -> str:
            return str(super().__call__(value, position)).replace("G", "B")

    axis.set_major_formatter(Tokens())
