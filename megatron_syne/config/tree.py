"""YAML text as a tree of nodes that remember file and line; merging of trees.

Only plain data is read: tags (``!!python/...``), anchors, aliases and merge keys are refused, and nothing
is expanded (no environment variables, no ``~``). Plain scalars follow the YAML 1.2 core schema, so that
``1e-5`` is a number, ``no`` is text and ``24:00:00`` is text, which YAML 1.1 reads otherwise; ``.inf`` is the
infinite number.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_syne.errors import ConfigError, MissingInput, SecurityRefusal

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a line of a file, or (``file`` None) the command line."""

    file: Path | None = None
    line: int | None = None

    def __str__(self) -> str:
        if self.file is None:
            return "command line"
        return show_path(self.file) if self.line is None else f"{show_path(self.file)}:{self.line}"

    @property
    def folder(self) -> Path:
        """Folder that relative paths written here refer to."""
        return Path.cwd() if self.file is None else self.file.parent


@dataclass(frozen=True)
class Node:
    """One value of the tree: a scalar, a mapping of nodes or a list of nodes, and where it was written."""

    value: Scalar | dict[str, Node] | list[Node]
    origin: Origin


def show_path(file: Path) -> str:
    """The path for people: relative where it lies below the working directory."""
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)


def one_error(problems: list[str], heading: str) -> ConfigError:
    """All problems as one error: the only one as it is, several as numbered lines under the heading."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    lines = [f"{heading}: {len(problems)} problems"]
    return ConfigError("\n".join(lines + [f"  {n}. {text}" for n, text in enumerate(problems, start=1)]))


def resolve_scalar(text: str) -> Scalar:
    """Value of a plain (unquoted) scalar: null, true/false, integer (``10_000`` too), number, else text."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _INT.fullmatch(text) and len(text) <= 30:  # longer ones are no quantity of a run
        return int(text.replace("_", ""))
    if text in (".inf", ".Inf", ".INF"):
        return math.inf
    if _FLOAT.fullmatch(text) and not re.match(r"[-+]?0[0-9]+$", text):
        return float(text)
    return text


def parse(text: str, file: Path | None) -> Node:
    """Tree of one YAML text; ``file`` None = an override of the command line.

    Raises ConfigError naming file and line for invalid YAML, duplicate keys, anchors and foreign tags;
    SecurityRefusal for tags that would run code (``!!python/...``).
    """
    where = "command line" if file is None else show_path(file)
    try:
        _refuse_features(text, file)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark and file else where
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return Node(None, Origin(file, None if file is None else 1))
    return _tree(root, file)


def read_file(file: Path) -> Node:
    """Tree of one file; raises MissingInput where it is absent, ConfigError where it is no YAML mapping."""
    if not os.path.exists(file):  # Path.exists() raises for a name that is too long
        raise MissingInput(f"configuration {show_path(file)} does not exist")
    if not file.is_file():
        raise ConfigError(f"configuration {show_path(file)} is not a regular file")
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(
                f"{show_path(file)}: {size} bytes; a configuration has at most {MAX_FILE_BYTES}"
            )
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{show_path(file)}: not UTF-8 text: byte {error.start}: {error.reason}") from None
    except PermissionError:
        raise MissingInput(f"configuration {show_path(file)} cannot be read: permission denied") from None
    node = parse(text, file)
    if node.value is None:
        return Node({}, node.origin)
    if not isinstance(node.value, dict):
        raise ConfigError(
            f"{node.origin}: expected a mapping such as 'train: {{...}}', found {describe(node)}"
        )
    return node


def describe(node: Node) -> str:
    """What a value is, for error messages."""
    match node.value:
        case None:
            return "null"
        case dict():
            return f"a mapping with the keys {', '.join(node.value)}" if node.value else "an empty mapping"
        case list():
            return f"a list of {len(node.value)}"
        case bool():
            return f"{str(node.value).lower()} (true/false)"
        case int():
            return f"{node.value} (integer)"
        case float():
            return f"{node.value!r} (number)"
        case _:
            return f"{node.value!r} (text)"


def merge(below: Node | None, above: Node) -> Node:
    """``above`` laid over ``below``: mappings merge key by key, everything else is replaced."""
    if below is None or not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    merged = dict(below.value)
    for key, child in above.value.items():
        merged[key] = merge(merged.get(key), child)
    return Node(merged, above.origin)


def _refuse_features(text: str, file: Path | None) -> None:
    # Over the event stream, before anything is built: depth is then bounded and an alias cannot multiply.
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        mark = event.start_mark
        origin = Origin(file, mark.line + 1 if mark and file else None)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(f"{origin}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(
                f"{origin}: anchors and aliases (&, *) are not accepted; use 'base: other.yaml'"
            )
        tag = getattr(event, "tag", None)
        if tag is None:
            continue
        name = tag.replace("tag:yaml.org,2002:", "!!")
        if "python" in tag:
            raise SecurityRefusal(f"{origin}: the tag {name} would run code; write the plain value")
        raise ConfigError(f"{origin}: the tag {name} is not accepted; write the plain value")


def _at(node: yaml.Node, file: Path | None) -> Origin:
    return Origin(file, node.start_mark.line + 1 if file else None)


def _tree(root: yaml.Node, file: Path | None) -> Node:
    origin = _at(root, file)
    if isinstance(root, yaml.ScalarNode):
        return Node(resolve_scalar(root.value) if root.style is None else root.value, origin)
    if isinstance(root, yaml.SequenceNode):
        return Node([_tree(child, file) for child in root.value], origin)
    entries: dict[str, Node] = {}
    for key_node, value_node in root.value:
        at = _at(key_node, file)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{at}: a key must be text, found a mapping or a list")
        key = key_node.value
        if key == "<<" and key_node.style is None:
            raise ConfigError(f"{at}: merge keys (<<) are not accepted; use 'base: other.yaml'")
        if key in entries:
            raise ConfigError(f"{at}: duplicate key {key!r}; it stands already at {entries[key].origin}")
        # The line of the key is where a person looks, also for a block that starts one line below it.
        entries[key] = Node(_tree(value_node, file).value, at)
    return Node(entries, origin)
