"""From the tree to the typed dataclasses: strict types, unknown and missing keys, the nearest valid key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from megatron_syne.config.schema import RunConfig
from megatron_syne.config.tree import Node, Origin, describe

# What people write for megatron-core's long names.
SYNONYMS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "dp": "data_parallel_size",
    "sp": "sequence_parallel",
    "mbs": "micro_batch_size",
    "gbs": "global_batch_size",
    "batch_size": "global_batch_size",
    "learning_rate": "lr",
    "steps": "train_iters",
    "max_steps": "train_iters",
    "warmup_steps": "lr_warmup_iters",
    "rope_theta": "rotary_base",
    "output_dir": "run_dir",
}

# How a key of a free mapping or a position in a list is written in the keys of the schema.
FREE_PART: dict[Any, str] = {dict: "<name>.", list: "<n>."}


class Builder:
    """Builds one configuration; collects every problem and the origin of every value that was given."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.origins: dict[str, Origin] = {}

    def dataclass(self, kind: type[Any], node: Node, prefix: str) -> Any:
        """Instance of a dataclass from a mapping node; problems are collected and the default kept."""
        if not isinstance(node.value, dict):
            self._problem(prefix, node, f"expected a mapping with keys such as {_some_keys(kind)}")
            return None
        hints = typing.get_type_hints(kind)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        given: dict[str, Any] = {}
        for key, child in node.value.items():
            dotted = f"{prefix}.{key}" if prefix else key
            if key not in fields:
                near = nearest_key(dotted, kind, prefix)
                hint = f"did you mean {near}?" if near else f"{prefix or 'the top level'} has {_keys(kind)}"
                self.problems.append(f"{dotted}: unknown key ({child.origin}); {hint}")
            elif child.value is not None:  # null = not given
                self.origins[dotted] = child.origin
                if fields[key].metadata.get("infinite") and child.value == math.inf:
                    given[key] = math.inf
                    continue
                value = self.value(hints[key], child, dotted)
                given[key] = self._path(value, child, dotted) if fields[key].metadata.get("path") else value
        for name, field in fields.items():
            if field.metadata.get("required") and name not in given:
                dotted = f"{prefix}.{name}" if prefix else name
                where = node.origin if node.origin.file is None else f"file {node.origin}"
                self.problems.append(
                    f"{dotted}: missing ({where}); required: write '{dotted.rpartition('.')[2]}: ...' there "
                    f"or give {dotted}=... on the command line"
                )
        return kind(**given)

    def value(self, hint: Any, node: Node, key: str) -> Any:
        """Value of one field, of the type that its annotation asks for."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            (inner,) = [
                each for each in arguments if each is not type(None)
            ]  # the schema has `X | None` only
            return self.value(inner, node, key)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.dataclass(hint, node, key)
        if origin is dict:
            if not isinstance(node.value, dict):
                return self._problem(key, node, "expected a mapping")
            entries = {name: child for name, child in node.value.items() if child.value is not None}
            self.origins.update({f"{key}.{name}": child.origin for name, child in entries.items()})
            return {name: self.value(arguments[1], child, f"{key}.{name}") for name, child in entries.items()}
        if origin is list:
            if not isinstance(node.value, list):
                return self._problem(key, node, "expected a list")
            self.origins.update({f"{key}.{n}": child.origin for n, child in enumerate(node.value)})
            return [self.value(arguments[0], child, f"{key}.{n}") for n, child in enumerate(node.value)]
        if origin is Literal:
            if node.value in arguments and isinstance(node.value, str):
                return node.value
            by_lower = {str(each).lower(): str(each) for each in arguments}
            near = difflib.get_close_matches(str(node.value).lower(), by_lower, 1)
            hint_text = f"; did you mean {by_lower[near[0]]}?" if near else ""
            return self._problem(key, node, f"expected one of {', '.join(map(str, arguments))}", hint_text)
        if hint is Any:
            return self._anything(node, key)
        return self._scalar(hint, node, key)

    def _scalar(self, hint: Any, node: Node, key: str) -> Any:
        value = node.value
        if hint is bool:
            return value if isinstance(value, bool) else self._problem(key, node, "expected true or false")
        if hint is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            whole = isinstance(value, float) and math.isfinite(value) and value.is_integer()
            remedy = f"; write {int(value):_}" if whole else ""  # type: ignore[arg-type]
            return self._problem(key, node, "expected an integer", remedy)
        if hint is float:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and math.isfinite(float(value)):  # type: ignore[arg-type]
                return float(value)  # type: ignore[arg-type]
            return self._problem(key, node, "expected a finite number")
        if hint is str:
            if isinstance(value, str):
                return value
            quote = "" if isinstance(value, dict | list) else "; put it in quotes"
            return self._problem(key, node, "expected text", quote)
        raise TypeError(f"{key}: the schema uses a type that the loader does not know: {hint}")

    def _anything(self, node: Node, key: str) -> Any:
        if isinstance(node.value, dict):
            entries = {name: child for name, child in node.value.items() if child.value is not None}
            self.origins.update({f"{key}.{name}": child.origin for name, child in entries.items()})
            return {name: self._anything(child, f"{key}.{name}") for name, child in entries.items()}
        if isinstance(node.value, list):
            return [self._anything(child, f"{key}.{n}") for n, child in enumerate(node.value)]
        return node.value

    def _path(self, value: Any, node: Node, key: str) -> Any:
        if not isinstance(value, str):
            return value
        if not value:
            return self._problem(key, node, "expected a path")
        if value.startswith("~") or "$" in value:
            return self._problem(
                key, node, "expected a path", "; neither ~ nor $VARIABLE is expanded here: write the path out"
            )
        if "\0" in value or "\n" in value:
            return self._problem(key, node, "expected a path without line breaks")
        return os.path.normpath(os.path.join(node.origin.folder, value))

    def _problem(self, key: str, node: Node, expected: str, remedy: str = "") -> None:
        self.problems.append(f"{key}: {expected}, found {describe(node)} ({node.origin}){remedy}")


def schema_keys(kind: type[Any] = RunConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """All dotted keys in order, each with whether it is a section; ``<name>`` and ``<n>`` in free parts."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        inner = [hint, *typing.get_args(hint)]
        section = next((each for each in inner if dataclasses.is_dataclass(each)), None)
        yield key, section is not None
        if section is not None and isinstance(section, type):
            middle = FREE_PART.get(typing.get_origin(hint), "")
            yield from schema_keys(section, f"{key}.{middle}")


def nearest_key(dotted: str, kind: type[Any], prefix: str) -> str | None:
    """The valid key that an unknown one most likely meant: beside it, or in another section."""
    head = f"{prefix}." if prefix else ""
    leaf = dotted[len(head) :]
    wanted = SYNONYMS.get(leaf.lower(), leaf.lower().replace("-", "_"))
    beside = [head + field.name for field in dataclasses.fields(kind)]
    best, best_score = None, 0.6  # difflib's own usual threshold
    for candidates, bonus in ((beside, 0.05), ([key for key, _ in schema_keys()], 0.0)):
        for candidate in candidates:
            score = difflib.SequenceMatcher(None, wanted, candidate.rpartition(".")[2]).ratio() + bonus
            score -= 0.01 * candidate.count(
                "<"
            )  # rather an option of the run than one of a stage or a source
            if score > best_score:
                best, best_score = candidate, score
    return best


def _keys(kind: type[Any]) -> str:
    return ", ".join(field.name for field in dataclasses.fields(kind))


def _some_keys(kind: type[Any]) -> str:
    return ", ".join(field.name for field in dataclasses.fields(kind)[:3])
