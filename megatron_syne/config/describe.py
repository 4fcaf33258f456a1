"""The schema as text for people (``--help-config``): every field with type, default and documentation.

The documentation of a field is the string literal below it; Python drops such literals, so they are read
from the source.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from typing import Any

import yaml

from megatron_syne.config import schema
from megatron_syne.config.build import FREE_PART


def field_docs() -> dict[tuple[str, str], str]:
    """``(class name, field name) -> documentation`` for every field of the schema; "" where it is missing."""
    docs: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " ".join(str(following.value.value).split())
            docs[node.name, statement.target.id] = text
    return docs


def describe_schema() -> str:
    """All options in order: ``key: type = default`` and what it means, one section after the other."""
    lines = [
        "Options of a run (YAML keys; on the command line section.key=value).",
        "<name> stands for a name of your choice, <n> for a position counted from 0.",
    ]
    _describe(schema.RunConfig, "", field_docs(), lines)
    return "\n".join(lines) + "\n"


def _describe(kind: type[Any], prefix: str, docs: dict[tuple[str, str], str], lines: list[str]) -> None:
    hints = typing.get_type_hints(kind)
    sections: list[tuple[type[Any], str]] = []
    lines += ["", f"{prefix.rstrip('.') or 'top level'}: {_first_line(kind)}"]
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        inner = next(
            (each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)), None
        )
        if isinstance(inner, type):
            middle = FREE_PART.get(typing.get_origin(hint), "")
            sections.append((inner, f"{prefix}{field.name}.{middle}"))
            if not middle:
                continue  # described below, as a section
        lines.append(f"  {prefix}{field.name}: {_type(hint)}{_default(field)}")
        lines += textwrap.wrap(
            docs[kind.__name__, field.name], 100, initial_indent="      ", subsequent_indent="      "
        )
    for inner, below in sections:
        _describe(inner, below, docs, lines)


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping to {_type(arguments[1])}"
    if arguments:  # X | None
        return " | ".join(_type(each) for each in arguments)
    names = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true | false",
        Any: "value",
        type(None): "null",
    }
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.metadata.get("required"):
        return " (required)"
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return f" = {text.removesuffix('...' + chr(10)).strip()}"
