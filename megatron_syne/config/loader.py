"""YAML files and dotted overrides -> :class:`RunConfig`, and back.

    config = load_config("run.yaml", ["parallel.tensor_model_parallel_size=2", "data.stages.0.tokens=1000"])

* ``base: other.yaml`` (or a list, later ones over earlier ones) loads that file below this one; its path is
  relative to the file it stands in. Mappings merge key by key, lists and scalars are replaced.
* ``null`` means "not given": the default again; an entry of a free mapping (``data.sources.en: null``) goes.
* Overrides are ``key=value`` with a YAML value; they lie above all files. ``data.stages.0.tokens`` reaches
  into a list.
* Relative paths: from the folder of the file in which they stand; of an override: the working directory.
  Neither ``~`` nor environment variables are expanded.

Every problem is a :class:`ConfigError` that names the key, the file and line, what was expected and found,
and the nearest valid key; several problems are reported together. YAML tags that would run code
(``!!python/...``) are a :class:`SecurityRefusal`, other tags, anchors and duplicate keys a ConfigError.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_syne.config.build import Builder, nearest_key
from megatron_syne.config.schema import RunConfig
from megatron_syne.config.tree import (
    Node,
    Origin,
    describe,
    merge,
    one_error,
    parse,
    read_file,
    resolve_scalar,
    show_path,
)
from megatron_syne.errors import DISK_ERRNOS, CannotCreate, ConfigError

COMMAND_LINE = Origin()


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file and dotted overrides describe.

    Raises ConfigError (all problems in one), MissingInput for an absent file, SecurityRefusal for code tags.
    """
    path = Path(os.path.abspath(path))
    return _built(_with_bases(path, []), overrides, f"configuration {show_path(path)}")


def config_of(overrides: Sequence[str]) -> RunConfig:
    """The run that dotted overrides alone describe; raises ConfigError, all problems in one."""
    return _built(Node({}, COMMAND_LINE), overrides, "the options")


def _built(root: Node, overrides: Sequence[str], name: str) -> RunConfig:
    for text in overrides:
        root = _override(root, text)
    builder = Builder()
    config = builder.dataclass(RunConfig, root, "")
    if builder.problems:
        raise one_error(builder.problems, name)
    assert isinstance(config, RunConfig)
    vars(config)["_origins"] = builder.origins  # beside the fields: equality and asdict() do not see it
    return config


def config_origin(config: RunConfig, key: str) -> str:
    """Where a value was given, for messages: ``run.yaml:12``, ``command line`` or ``default``."""
    origins: dict[str, Origin] = vars(config).get("_origins", {})
    return str(origins[key]) if key in origins else "default"


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML; ``load_config`` of it gives an equal one."""
    return yaml.dump(
        dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000
    )


def save_resolved(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write :func:`to_yaml` to a file, whole or not at all; raises CannotCreate where the folder refuses."""
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            raise  # run_cli knows these
        raise CannotCreate(f"{show_path(target)}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(to_yaml(config))
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, 0o644)  # mkstemp makes it private; a run folder is read by colleagues
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _with_bases(file: Path, above: list[Path]) -> Node:
    # Real paths: a cycle through a link is a cycle.
    real = Path(os.path.realpath(file))
    if real in above:
        chain = " -> ".join(show_path(each) for each in [*above[above.index(real) :], real])
        raise ConfigError(f"{show_path(above[-1])}: base: files include each other: {chain}")
    node = read_file(file)
    assert isinstance(node.value, dict)
    entries = dict(node.value)
    bases = entries.pop("base", None)
    own = Node(entries, node.origin)
    below: Node | None = None
    for name in _base_names(bases):
        below_this = _with_bases(Path(os.path.normpath(file.parent / name)), [*above, real])
        below = merge(below, below_this)
    return merge(below, own)


def _base_names(bases: Node | None) -> list[str]:
    if bases is None or bases.value is None:
        return []
    nodes = bases.value if isinstance(bases.value, list) else [bases]
    names = [node.value for node in nodes if isinstance(node.value, str) and node.value]
    if len(names) != len(nodes):
        raise ConfigError(
            f"base: expected a file name or a list of file names, found {describe(bases)} ({bases.origin})"
        )
    return names


def _override(root: Node, text: str) -> Node:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"override {text!r} (command line): expected section.key=value, "
            f"for example train.global_batch_size=16"
        )
    if key == "base":
        raise ConfigError("base (command line): a base can be given in a file only")
    try:
        node = parse(value, None)
    except ConfigError as error:
        raise ConfigError(f"override {text!r}: {error}") from None
    return _put(root, key.split("."), node, key)


def _put(tree: Node | None, keys: list[str], value: Node, dotted: str) -> Node:
    if not keys:
        return merge(tree, value)
    head, *rest = keys
    if tree is not None and isinstance(tree.value, list):
        items = list(tree.value)
        if not head.isdecimal() or int(head) >= len(items):
            have = f"0 to {len(items) - 1}" if items else "no entry"
            raise ConfigError(f"{dotted} (command line): {head!r} is no entry of a list that has {have}")
        items[int(head)] = _put(items[int(head)], rest, value, dotted)
        return Node(items, tree.origin)
    if tree is not None and not isinstance(tree.value, dict | None):
        near = nearest_key(dotted, RunConfig, "")
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(
            f"{dotted} (command line): {head!r} cannot be set inside {describe(tree)} ({tree.origin}){hint}"
        )
    entries = dict(tree.value) if tree is not None and isinstance(tree.value, dict) else {}
    entries[head] = _put(entries.get(head), rest, value, dotted)
    # A section that is only passed through keeps the place where it was written.
    return Node(entries, COMMAND_LINE if tree is None else tree.origin)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that :func:`resolve_scalar` would not read as text."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = resolve_scalar(value) == value and value != "<<"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    if value == math.inf:
        return dumper.represent_scalar("tag:yaml.org,2002:float", ".inf")
    text = repr(value)  # shortest text that reads back to the same number
    return dumper.represent_scalar("tag:yaml.org,2002:float", text if "e" not in text else _dotted(text))


def _dotted(text: str) -> str:
    # 1e-05 is text to a YAML 1.1 reader, 1.0e-05 a number to all.
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}"


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _number)
