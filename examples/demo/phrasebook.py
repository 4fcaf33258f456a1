"""Turns hand-written tables and templates into many different, grammatical texts.

Two kinds of readable files feed it (examples in ``handwritten/``). A *table* holds facts or words::

    # city: name | dish | sight          a table with named columns, one record a line
    西安 | 肉夹馍 | 古城墙
    # time                               a plain list: entries separated by " | ", on any number of lines
    清晨 | 傍晚

A *template* makes texts from them::

    @ speed physics en                   its name, then free tags
    $ v = 20..90/10                      draw a number: from..to/step, or one of a list such as 2, 4, 8
    $ t = 2..9
    $ d = v * t                          a computed value (exact: whole numbers and fractions)
    $ c = city                           a record of a table; {c.dish} is one of its columns
    ? d < 500                            draw everything again until this holds
    {city.name} ... {time} ... {a|b} {2..9} {=d/10:1}      slots: see :meth:`Writer._fill`
    one way to say it || another way     alternatives of a line
    ~ a line that is left out half of the time
    | a line kept as it is, on a line of its own (program text)

Within one text the same slot always has the same value; ``{time}`` and ``{time2}`` are two different
entries of the table ``time``. An empty line starts a new paragraph.
"""

from __future__ import annotations

import ast
import math
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

Record = dict[str, str]
Tables = dict[str, list[Record]]

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:/(\d+))?")
_SLOT = re.compile(r"\{([^{}]+)\}")
_SENTENCE = re.compile(r"(?:^|(?<=[.?!] ))[a-z]")  # English sentences begin with a capital
_REDRAWS = 500
_WORD = "word"  # the only column of a plain list


class PhrasebookError(ValueError):
    """A table or template that says something impossible; the message names it."""


@dataclass(frozen=True)
class Template:
    """One hand-written pattern: its draws and conditions in order, and its lines."""

    name: str
    tags: tuple[str, ...]
    draws: list[tuple[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def read_tables(path: Path) -> Tables:
    """All tables of one file, by name."""
    tables: Tables = {}
    columns: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("//"):
            continue
        if line.startswith("#"):
            name, _, header = line[1:].partition(":")
            columns = [column.strip() for column in header.split("|")] if header else []
            rows = tables.setdefault(name.strip(), [])
            continue
        cells = [cell.strip() for cell in line.split("|")]
        if not columns:
            rows.extend({_WORD: cell} for cell in cells if cell)
        elif len(cells) == len(columns):
            rows.append(dict(zip(columns, cells, strict=True)))
        else:
            raise PhrasebookError(f"{path.name}:{number}: {len(cells)} cells for columns {columns}")
    return tables


def read_templates(path: Path) -> list[Template]:
    """All templates of one file, in order."""
    templates: list[Template] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("//"):
            continue
        if line.startswith("@"):
            name, *tags = line[1:].split()
            templates.append(Template(name, tuple(tags)))
        elif line.startswith("$"):
            key, _, rule = line[1:].partition("=")
            templates[-1].draws.append((key.strip(), rule.strip()))
        elif line.startswith("?"):
            templates[-1].draws.append(("?", line[1:].strip()))
        elif templates:
            templates[-1].lines.append(line.rstrip())
    return templates


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: Fraction(a) / Fraction(b),
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "gcd": math.gcd,
    "lcm": math.lcm,
    "abs": abs,
    "min": min,
    "max": max,
    "bin": lambda n: format(n, "b"),
    "hex": lambda n: format(n, "X"),
    "len": len,
    "upper": str.upper,
    "backwards": lambda text: text[::-1],
    "isprime": lambda n: n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1)),
}


def calculate(expression: str, values: dict[str, Any]) -> Any:
    """Value of an arithmetic expression over ``values``; only the operators and functions above exist."""

    def walk(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return walk(body)
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return _number(values[name])
            case ast.Attribute(value=ast.Name(id=name), attr=column):
                return _number(values[name][column])
            case ast.BinOp(left=left, op=op, right=right):
                return _OPERATORS[type(op)](walk(left), walk(right))
            case ast.UnaryOp(op=op, operand=operand):
                return _OPERATORS[type(op)](walk(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _OPERATORS[type(op)](walk(left), walk(right))
            case ast.BoolOp(values=parts):  # "and" only
                return all(walk(part) for part in parts)
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return _FUNCTIONS[name](*map(walk, arguments))
        raise PhrasebookError(f"cannot calculate {expression!r}")

    try:
        return walk(ast.parse(expression, mode="eval"))
    except (KeyError, SyntaxError, TypeError) as error:
        raise PhrasebookError(f"cannot calculate {expression!r}: {error!r}") from error


def _number(value: Any) -> Any:
    """A cell of digits as a number, a one-word record as its word, everything else unchanged."""
    if isinstance(value, dict):
        value = value.get(_WORD, value)
    if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value):
        return Fraction(value) if "." in value else int(value)
    return value


def show(value: Any, decimals: int | None = None) -> str:
    """How a value is written in a text: whole numbers plainly, fractions as exact decimals."""
    if isinstance(value, dict):
        return value.get(_WORD) or next(iter(value.values()))
    if decimals is not None:
        scaled = Fraction(value) * 10**decimals
        whole = math.floor(scaled + Fraction(1, 2))
        sign, digits = ("-" if whole < 0 else ""), str(abs(whole)).rjust(decimals + 1, "0")
        return sign + (f"{digits[:-decimals]}.{digits[-decimals:]}" if decimals else digits)
    if isinstance(value, Fraction) and value.denominator != 1:
        for places in range(1, 7):
            if (value * 10**places).denominator == 1:
                return show(value, places)
        raise PhrasebookError(f"{value} has no exact decimal form; write it with {{=...:2}}")
    return str(value)


class Writer:
    """Writes texts of templates over tables; the same random source gives the same texts."""

    def __init__(self, tables: Tables, rng: random.Random, join: str) -> None:
        """``join`` stands between the lines of a paragraph: a space in English, nothing in Chinese."""
        self.tables = tables
        self.rng = rng
        self.join = join

    def write(self, template: Template) -> str:
        """One text of ``template``. Raises PhrasebookError where the template is at fault."""
        try:
            values = self._draw(template)
            paragraphs: list[str] = [""]
            for line in template.lines:
                self._add_line(line, values, paragraphs)
        except PhrasebookError as error:
            raise PhrasebookError(f"template {template.name}: {error}") from error
        return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)

    def _add_line(self, line: str, values: dict[str, Any], paragraphs: list[str]) -> None:
        if not line:
            paragraphs.append("")
            return
        if line.startswith("| ") or line == "|":
            text = self._fill(line[2:], values)
            paragraphs[-1] += f"\n{text}" if paragraphs[-1] else text
            return
        if line.startswith("~ "):
            if self.rng.random() < 0.5:
                return
            line = line[2:]
        text = self._fill(self.rng.choice(line.split(" || ")).strip(), values)
        if self.join:
            text = _SENTENCE.sub(lambda found: found[0].upper(), text)
        paragraphs[-1] += (self.join if paragraphs[-1] else "") + text

    def _draw(self, template: Template) -> dict[str, Any]:
        for _ in range(_REDRAWS):
            values: dict[str, Any] = {}
            for key, rule in template.draws:
                if key == "?":
                    if not calculate(rule, values):
                        break
                else:
                    values[key] = self._value(rule, values)
            else:
                return values
        raise PhrasebookError("its conditions never held")

    def _value(self, rule: str, values: dict[str, Any]) -> Any:
        if found := _RANGE.fullmatch(rule):
            low, high, step = int(found[1]), int(found[2]), int(found[3] or 1)
            return self.rng.randrange(low, high + 1, step)
        if rule in self.tables:
            return self._pick(rule, values)
        if "," in rule and "(" not in rule:
            return _number(self.rng.choice([part.strip() for part in rule.split(",")]))
        return calculate(rule, values)

    def _pick(self, table: str, values: dict[str, Any]) -> Record:
        taken = [id(value) for value in values.values()]
        free = [row for row in self.tables[table] if id(row) not in taken]
        if not free:
            raise PhrasebookError(f"table {table} has no more entries")
        return self.rng.choice(free)

    def _fill(self, text: str, values: dict[str, Any]) -> str:
        """Replaces every slot of ``text``; a slot seen for the first time is drawn and remembered.

        ``{x}`` a drawn value or an entry of table x, ``{x2}`` another one, ``{x.column}`` a column,
        ``{a|b}`` one of these (each may hold slots), ``{2..9}`` a number, ``{=a*b}`` a computed value, ``{=a/b:2}`` with 2 decimals.
        """

        def replace(found: re.Match[str]) -> str:
            slot = found[1]
            if slot.startswith("="):
                expression, _, decimals = slot[1:].partition(":")
                return show(calculate(expression, values), int(decimals) if decimals else None)
            if "|" in slot:
                return self.rng.choice(slot.split("|"))
            if _RANGE.fullmatch(slot):
                return show(self._value(slot, values))
            name, _, column = slot.partition(".")
            if name not in values:
                table = name.rstrip("0123456789")
                if table not in self.tables:
                    raise PhrasebookError(f"slot {{{slot}}} is neither drawn nor a table")
                values[name] = self._pick(table, values)
            value = values[name]
            if not column:
                return show(value)
            if column not in value:
                raise PhrasebookError(f"slot {{{slot}}}: no such column")
            return value[column]

        while _SLOT.search(text):  # innermost first: a choice may hold other slots
            text = _SLOT.sub(replace, text)
        return text
