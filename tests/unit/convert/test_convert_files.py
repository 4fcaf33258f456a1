"""Nothing outside the folder is opened; an output is complete or absent."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatron_syne.convert import files
from megatron_syne.convert.files import check_output, check_space, new_folder, open_inside
from megatron_syne.errors import CannotCreate, IOFault, MissingInput, SecurityRefusal, SyneError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "good").write_text("good")
    return inside


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "", ".", "..", "a\0b", "a\\b"]
)
def test_names_that_lead_elsewhere(folder: Path, name: str) -> None:
    with pytest.raises(SecurityRefusal, match="plain file name"):
        open_inside(folder, name)


def test_links(folder: Path) -> None:
    (folder / "in").symlink_to("good")
    (folder / "out").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    (folder / "etc").symlink_to("/etc")
    os.close(open_inside(folder, "in"))
    for names in (("out",), ("etc", "passwd")):
        with pytest.raises(SecurityRefusal, match="leads out"):
            open_inside(folder, *names)
    with pytest.raises(SyneError):
        open_inside(folder, "loop")


def test_special_files_do_not_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)  # the path of a socket must be short
        listener.bind("socket")
        for name in ("fifo", "folder", "socket"):
            with pytest.raises(SecurityRefusal, match="regular file"):
                open_inside(folder, name)


def test_missing(folder: Path) -> None:
    with pytest.raises(MissingInput, match="nothing"):
        open_inside(folder, "nothing")


def test_new_folder_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as scratch:
        (scratch / "a").write_text("a")
        assert not target.exists() and scratch.parent == tmp_path
    assert (target / "a").read_text() == "a"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, RuntimeError])
def test_new_folder_vanishes_on_any_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("a")
        raise error
    assert os.listdir(tmp_path) == []


def test_new_folder_replaces(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), new_folder(target):
        raise RuntimeError
    assert (target / "old").read_text() == "old"
    with new_folder(target) as scratch:
        (scratch / "new").write_text("new")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == ["new"]


def test_new_folder_without_a_parent(tmp_path: Path) -> None:
    with pytest.raises(CannotCreate, match="cannot be made"), new_folder(tmp_path / "no" / "out"):
        pass


def test_outputs_that_may_not_be(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    (source / "mark").touch()
    for out in (source, source / "sub", tmp_path / "link" / "sub", tmp_path, tmp_path / "link"):
        with pytest.raises(CannotCreate, match="source"):
            check_output(out, source, True, ("mark",))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(CannotCreate, match="exists already"):
        check_output(other, source, False, ("mark",))
    with pytest.raises(CannotCreate, match="not written by this program"):
        check_output(other, source, True, ("mark",))
    (other / "mark").touch()
    assert check_output(other, source, True, ("mark",)) == other
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CannotCreate, match="exists already"):
        check_output(tmp_path / "dangling", source, False, ())


def test_too_little_space(tmp_path: Path) -> None:
    with pytest.raises(IOFault, match="are needed"):
        check_space(tmp_path, 2**62)


def test_json_of_a_moment_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "JSON_LIMIT_BYTES", 10)
    monkeypatch.setattr("megatron_syne.models.json_file.JSON_LIMIT_BYTES", 10)
    (tmp_path / "x.json").write_text('{"a": "long enough"}')
    with pytest.raises(SyneError, match="larger than 10 bytes"):
        files.read_json_inside(tmp_path, "x.json")
