"""What the documents name exists: paths, make targets, modules, options, configuration keys, the map.

Only the standard library and our own schema; reads text, runs nothing.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_syne.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")  # not the changelog: it may name what is gone
TOP = ("megatron_syne", "tools", "launch", "examples", "tests", "benchmarks", ".ci")
# Made by running what the document describes, so absent from a fresh clone.
GENERATED = (".venv", "runs")
PATH = re.compile(
    r"(?<![\w./<$~-])(?:\./)?((?:" + "|".join(map(re.escape, TOP)) + r")(?:/[\w.{},*-]+)*/?)(?![\w<])"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    """A document's text; skips where it is not written yet."""
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"{name} does not exist yet")
    return path.read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    """Contents of the fenced blocks."""
    return [match[2] for match in FENCE.finditer(text)]


def inline_code(text: str) -> list[str]:
    """Contents of the `code` spans outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def expand(path: str) -> Iterator[str]:
    """``a/{b,c}.py`` -> ``a/b.py``, ``a/c.py``."""
    match = re.search(r"\{([^{}]*)\}", path)
    if match is None:
        yield path
        return
    for choice in match[1].split(","):
        yield from expand(path[: match.start()] + choice + path[match.end() :])


def exists(path: str) -> bool:
    """Whether a path or glob pattern, from the root of the checkout, meets something."""
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


def commands(text: str) -> Iterator[list[str]]:
    """Shell commands of the code blocks, continued lines joined, comments and prompts dropped, as words."""
    for block in code_blocks(text):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = line.strip().removeprefix("$ ").strip()
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue  # prose or output with a lone quote
            if words:
                yield words


def config_keys() -> set[str]:
    """Every dotted key of the schema; below a free mapping or a list ``*`` stands for anything."""
    keys: set[str] = set()

    def walk(kind: type, prefix: str) -> None:
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            keys.add(prefix + item.name)
            hint = hints[item.name]
            if dataclasses.is_dataclass(hint):
                walk(typing.cast(type, hint), f"{prefix}{item.name}.")
            elif typing.get_origin(hint) in (list, dict):
                keys.add(f"{prefix}{item.name}.*")

    walk(RunConfig, "")
    return keys


def known_key(key: str, keys: set[str]) -> bool:
    """Whether a dotted override names a field, or something inside a free mapping or list."""
    parts = key.split(".")
    return key in keys or any(".".join(parts[:i]) + ".*" in keys for i in range(1, len(parts)))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    text = read(name)
    found = [
        match[1].rstrip(".,")
        for code in (*code_blocks(text), *inline_code(text))
        for match in PATH.finditer(code)
    ]
    found += [
        link.partition("#")[0]
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if not re.match(r"[a-z]+:|#", link)
    ]
    found += [
        code
        for code in inline_code(text)
        if re.fullmatch(r"[\w-]+\.(?:md|py|txt|toml|sh)", code) and "/" not in code
    ]
    missing = sorted(
        {path for each in found for path in expand(each) if not exists(path) and not anywhere(path)}
    )
    assert not missing, f"{name} names what does not exist: {missing}"


def anywhere(path: str) -> bool:
    """A bare file name may stand for a file in any room (``schema.py``)."""
    if "/" in path:
        return False
    return any(next((ROOT / top).rglob(path), None) for top in TOP if (ROOT / top).is_dir())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    text = read(name)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    lines = [line for block in code_blocks(text) for line in block.splitlines()]
    found = [
        match[1]
        for code in (*lines, *inline_code(text))
        if (match := re.match(r"(?:\$ )?(?:\w+=\S+ )*make (?:\w+=\S+ )*([a-z][\w-]*)", code.strip()))
    ]
    assert set(found) <= targets, f"{name}: no such target: {sorted(set(found) - targets)}"
    if name == "README.md":
        assert {"demo", "test"} <= set(found), "the README shows the two commands"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_fit_the_programs(name: str) -> None:
    """Modules and scripts exist and know the ``--options``; ``a.b=c`` are keys of the schema."""
    text, keys, wrong = read(name), config_keys(), []
    for words in commands(text):
        program = None
        for index, word in enumerate(words):
            if word == "-m" and index + 1 < len(words) and words[index + 1].startswith("megatron_syne"):
                program, rest = ROOT / (words[index + 1].replace(".", "/") + ".py"), words[index + 2 :]
            elif re.fullmatch(r"(?:\./)?(?:tools|launch|examples|benchmarks)/\S+\.(?:py|sh)", word):
                program, rest = ROOT / word, words[index + 1 :]
            if program is not None:
                break
        if program is None:
            continue
        if not program.is_file():
            wrong.append(f"{' '.join(words)}: no file {program.relative_to(ROOT)}")
            continue
        source = program.read_text(encoding="utf-8")
        if "convert import cli" in source:  # options that the conversion tools share
            source += read("megatron_syne/convert/cli.py")
        # a table of subcommands: their options stand in the modules of a room
        if room := re.search(r'run_subcommand\(__doc__, "(\w+)"', source):
            source += "".join(
                file.read_text("utf-8") for file in (ROOT / "megatron_syne" / room[1]).glob("*.py")
            )
        if "import prepare_data" in source:  # hands further options on
            source += read("tools/prepare_data.py")
        for word in rest:
            option = re.match(r"--[a-z][\w-]*", word)
            if option and f'"{option[0]}"' not in source and option[0] not in source:
                wrong.append(f"{program.relative_to(ROOT)}: no option {option[0]}")
            override = re.match(r"([a-z_]+(?:\.\w+)*)=", word)
            if override and not known_key(override[1], keys):
                wrong.append(f"{program.relative_to(ROOT)}: no configuration key {override[1]}")
    assert not wrong, "\n".join([f"{name}:", *wrong])


def test_map_shows_every_room() -> None:
    """Each room of the package and each folder beside it appears in the README."""
    text = read("README.md")
    rooms = sorted(path.parent.name for path in (ROOT / "megatron_syne").glob("*/__init__.py"))
    folders = [top for top in TOP if not top.startswith(".") and (ROOT / top).is_dir()]
    missing = [name for name in (*rooms, *folders) if not re.search(rf"\b{name}/", text)]
    assert not missing, f"README.md: the map of the house lacks {missing}"


def tree_paths(block: str) -> Iterator[str]:
    """Paths of an indented map, one entry a line: ``megatron_syne/``, two spaces deeper ``config/``, ..."""
    stack: list[tuple[int, str]] = []
    for line in block.splitlines():
        match = re.match(r"([ │├└─]*)([\w.][\w.-]*/?(?:[\w.-]+/?)*)(?=\s|$)", line)
        if match is None or not re.search(r"[./]", match[2]):
            continue
        depth, entry = len(match[1]), match[2]
        while stack and stack[-1][0] >= depth:
            stack.pop()
        path = (stack[-1][1] if stack else "") + entry
        if depth and not stack:
            continue  # a continued comment
        yield path
        if entry.endswith("/"):
            stack.append((depth, path))


def test_map_matches_the_tree() -> None:
    maps = [
        block
        for block in code_blocks(read("README.md"))
        if re.search(r"^megatron_syne/", block, re.MULTILINE)
    ]
    missing = [
        path
        for block in maps
        for path in tree_paths(block)
        if not exists(path) and not path.startswith(GENERATED)
    ]
    assert not missing, f"README.md: the map names what does not exist: {missing}"


def test_the_map_is_read_as_meant() -> None:
    block = "megatron_syne/       the library\n  config/            what a run is\n    schema.py\n  errors.py\ntools/\n"
    assert list(tree_paths(block)) == [
        "megatron_syne/",
        "megatron_syne/config/",
        "megatron_syne/config/schema.py",
        "megatron_syne/errors.py",
        "tools/",
    ]
    keys = config_keys()
    assert known_key("train.train_iters", keys) and known_key("data.stages.0.tokens", keys)
    assert not known_key("train.train_steps", keys) and not known_key("optimizer.lr.x", keys)
    block = "```bash\n$ python tools/x.py \\\n    --out 'a b'  # comment\n```\n"
    assert list(commands(block)) == [["python", "tools/x.py", "--out", "a b"]]
