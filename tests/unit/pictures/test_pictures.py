"""The pixels say what the numbers say."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from drawn import recorded, texts
from matplotlib.text import Text
from PIL import Image

from megatron_syne.errors import CannotCreate, ConfigError
from megatron_syne.pictures import canvas, runs
from megatron_syne.pictures.canvas import colours, picture, style
from megatron_syne.pictures.lengths import draw_lengths
from megatron_syne.pictures.mixture import draw_mixture
from megatron_syne.pictures.runs import Curves, Line, Panel, draw_runs


def pixels(path: Path) -> np.ndarray:
    """[height, width, 3]."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def is_colour(image: np.ndarray, colour: object) -> np.ndarray:
    """[height, width]: where a pixel has this colour."""
    red, green, blue = (round(255 * part) for part in tuple(colour)[:3])  # type: ignore[arg-type]
    return (image == [red, green, blue]).all(axis=2)


def test_areas_are_the_shares(tmp_path: Path) -> None:
    names = ["en", "zh", "code"]
    shares = {"en": [0.8, 0.8, 0.25, 0.25], "zh": [0.2, 0.2, 0.25, 0.25], "code": [0.0, 0.0, 0.5, 0.5]}
    draw_mixture(tmp_path / "m.png", [0, 600, 600, 1000], shares, [("one", 600), ("two", 1000)], {})
    image, shade = pixels(tmp_path / "m.png"), colours(names)
    assert image.shape == (600, 1500, 3)
    areas = {name: is_colour(image, shade[name]) for name in names}
    inside = np.flatnonzero(sum(areas.values()).sum(axis=0) > 100)  # the legend stands beside it
    left, right = inside[0], inside[-1]
    for place, expected in ((0.5, [0.8, 0.2, 0.0]), (0.9, [0.25, 0.25, 0.5])):
        column = int(left + place * (right - left))
        counts = np.array([areas[name][:, column].sum() for name in names])
        assert counts / counts.sum() == pytest.approx(expected, abs=0.02)
    # the change of stage stands at 60 % of the width
    begins = np.flatnonzero(areas["code"].sum(axis=0) > 100)[0]
    assert (begins - left) / (right - left) == pytest.approx(0.6, abs=0.01)


def test_bars_are_the_tokens(tmp_path: Path) -> None:
    edges = [1, 2, 4, 8]
    draw_lengths(tmp_path / "l.png", edges, {"a": [1, 5, 2], "b": [0, 3, 9]}, {"a": 1000, "b": 4000})
    image, shade = pixels(tmp_path / "l.png"), colours(["a", "b"])
    right = image[:, image.shape[1] // 2 :]
    widths = {name: is_colour(right, shade[name]).sum(axis=1).max() for name in ("a", "b")}
    assert widths["b"] / widths["a"] == pytest.approx(4, rel=0.03)


def test_many_sources_differ_in_colour() -> None:
    for count in (3, 20, 50):
        assert len({tuple(colour) for colour in colours([f"s{n}" for n in range(count)]).values()}) == count


def test_a_picture_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.png"
    with pytest.raises(ZeroDivisionError), picture(path, 100, 100):
        raise ZeroDivisionError
    assert not path.parent.exists()
    with picture(path, 320, 200) as (axis,):
        axis.plot([0, 1], [0, 1])
    first = path.read_bytes()
    with picture(path, 320, 200) as (axis,):
        axis.plot([0, 1], [0, 1])
    assert path.read_bytes() == first and [file.name for file in path.parent.iterdir()] == ["x.png"]
    assert pixels(path).shape == (200, 320, 3)
    with pytest.raises(ConfigError, match=r"as \.png"), picture(tmp_path / "x.pdf", 100, 100):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreate), picture(tmp_path / "file" / "x.png", 100, 100):
        pass


def test_letters_that_no_font_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of a process names the way out, and no warning of a library; other warnings stay."""
    monkeypatch.setattr(canvas, "_told_missing", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with picture(tmp_path / "x.png", 320, 200) as (axis,):
            axis.set_title("\U00012000 twice \U00012000\U00012001")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"note: {tmp_path / 'x.png'}: no installed font has ")
    assert "'\U00012000\U00012001'" in said and ".html" in said
    with pytest.warns(UserWarning, match="another"), picture(tmp_path / "x.png", 320, 200) as (axis,):
        axis.set_title("again \U00012000")
        warnings.warn("another", stacklevel=1)
    assert not capsys.readouterr().err


def test_only_installed_fonts_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib would say of each other one, for every text, that it is not there."""
    monkeypatch.setattr(canvas, "CJK_FONTS", ("No Such Font", "DejaVu Serif"))
    assert style()["font.family"] == ["DejaVu Sans", "DejaVu Serif"]


def test_a_dollar_sign_is_no_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in names nor in a unit; the numbers of the axes need none."""
    line = Line(0, r"$\b_{$", [1.0, 2.0], [1e-9, 1e-4])
    panels = [Panel("p$x_{$", "tokens/$a_{$", [line], log=True), Panel("p", "u", [line])]
    odd = Curves("$t_{$", [r"$\a_{$"], "step", panels, [[("$s_{$", 1.0)]])
    seen = recorded(monkeypatch, runs)
    draw_runs(tmp_path / "odd.png", odd)
    written = [text for text, _ in texts(seen[0].figure)]
    assert {"$t_{$", r"$\b_{$", "p$x_{$", "tokens/$a_{$", " $s_{$"} <= set(written)
    assert {"1e-09", "1e-05"} <= set(written), "logarithmic axis"
    assert not [text for text in written if "math" in text or r"\times" in text]
    assert not [text for text in seen[0].figure.findobj(Text) if text.get_parse_math()]
