"""English prose and program text out of the Python installation that runs this.

Prose: the documentation topics (``pydoc_data.topics``) docstrings and long comments. Programs: sources of the standard
library. Both are under the PSF licence; files that carry the copyright notice of somebody else are left out.
A module gives either prose or programs, never both, so the two sources share nothing.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import itertools
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "turtledemo",
    "pydoc_data",
    "encodings",
    "__pycache__",
}
WEB_PIECE, WEB_LIMIT = 900, 3200  # characters: pack docstrings up to the first, cut long ones at the second
CODE_PIECE, CODE_LIMIT = 1500, 5800
_UNDERLINE = re.compile(r"\s*([=\-*~^\"'+#.])\1{2,}\s*")
_EMAIL = re.compile(r"\S+@\S+\.\w+")
_COMMENTS = re.compile(r"(?:^[ \t]*#.*\n){4,}", re.MULTILINE)
_OTHER_OWNER = re.compile(r"copyright\b.*(\(c\)|\d{4})", re.IGNORECASE)


def bucket(name: str) -> int:
    """A number from 0 to 99 that depends on the name only: the place of a module in the split."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100


def modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of the standard library's usable modules, in order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS & set(parts) or any(part.startswith("config-") for part in parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if source.isascii() and not _foreign(source):
            yield ".".join(parts).removesuffix(".py"), source


def _foreign(source: str) -> bool:
    """Whether the file names a copyright holder and was not contributed to the PSF."""
    if "Licensed to PSF" in source:
        return False
    notices = [line for line in source.splitlines() if _OTHER_OWNER.search(line)]
    return any("Python Software Foundation" not in notice for notice in notices)


def web_documents(code_buckets: range) -> Iterator[tuple[str, str]]:
    """(origin, text) of the prose documents: topics, then docstrings and long comments outside ``code_buckets``."""
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield from ((f"topic {name}", piece) for piece in _cut(_prose(text), WEB_LIMIT))
    for name, source in modules():
        if bucket(name) not in code_buckets:
            yield from _packed(f"module {name}", _docstrings(name, source))
    for name in sorted(set(sys.stdlib_module_names) - {"antigravity", "this", "idlelib"}):
        yield from _packed(f"extension {name}", _extension_docstrings(name))


def _packed(origin: str, pieces: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Joins short docstrings of one module until they are a text of reading length."""
    page = ""
    for piece in pieces:
        page = f"{page}\n\n{piece}" if page else piece
        if len(page) >= WEB_PIECE:
            yield from ((origin, part) for part in _cut(page, WEB_LIMIT))
            page = ""
    if len(page) >= 200:
        yield from ((origin, part) for part in _cut(page, WEB_LIMIT))


def _docstrings(module: str, source: str) -> Iterator[str]:
    """Cleaned docstrings of a module, its classes and functions, each under a line that says whose it is."""
    tree = ast.parse(source)
    if text := _prose(ast.get_docstring(tree) or ""):
        yield f"The module {module}\n\n{text}"

    def visit(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                text = _prose(ast.get_docstring(child) or "")
                if len(text) >= 40:
                    arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                    yield f"{name}{arguments}\n\n{text}"
                yield from visit(child, f"{name}.")

    yield from visit(tree, "")
    for block in _COMMENTS.findall(source):
        text = _prose(re.sub(r"(?m)^\s*#+ ?", "", block))
        if len(text) >= 240:
            yield f"A note in the module {module}\n\n{text}"


def _extension_docstrings(module: str) -> Iterator[str]:
    """Docstrings of a module written in C; nothing for a module written in Python or absent here."""
    try:
        loaded = importlib.import_module(module)
    except Exception:  # a module of another platform
        return
    if getattr(loaded, "__file__", "") and str(loaded.__file__).endswith(".py"):
        return
    for name in sorted(vars(loaded)):
        value = getattr(loaded, name)
        if name.startswith("_") or getattr(value, "__module__", module) not in (module, None):
            continue
        if text := _prose(inspect.getdoc(value) or "") if callable(value) else "":
            yield f"{module}.{name}\n\n{text}"
        for method in sorted(vars(value)) if inspect.isclass(value) else ():
            if not method.startswith("_"):
                text = _prose(getattr(vars(value)[method], "__doc__", None) or "")
                if len(text) >= 40:
                    yield f"{module}.{name}.{method}\n\n{text}"


def _prose(text: str) -> str:
    """The readable paragraphs of a docstring: no doctests, underlines, tables, addresses or non-ASCII."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text).expandtabs(4)):
        lines = [line.rstrip() for line in paragraph.splitlines() if not _UNDERLINE.fullmatch(line)]
        paragraph = "\n".join(lines).strip("\n")
        letters = sum(char.isalpha() or char == " " for char in paragraph)
        noise = ">>>" in paragraph or _EMAIL.search(paragraph) or _OTHER_OWNER.search(paragraph)
        if paragraph.strip() and not noise and paragraph.isascii() and letters >= 0.75 * len(paragraph):
            kept.append(re.sub(r"(?<=\S) {3,}", "  ", paragraph))
    return "\n\n".join(kept)


def _cut(text: str, limit: int) -> Iterator[str]:
    """Cuts at paragraphs into pieces of 200 characters up to about ``limit``."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > limit:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if len(piece) >= 200:
        yield piece


def code_documents(code_buckets: range) -> Iterator[tuple[str, str]]:
    """(origin, program text): stretches of 1 to 6 kB of the modules in ``code_buckets``, cut between statements."""
    for name, source in modules():
        if bucket(name) in code_buckets:
            for piece in _program_pieces(source):
                if len(piece) >= 1000 and not _EMAIL.search(piece):
                    yield f"module {name}", piece


def _program_pieces(source: str) -> Iterator[str]:
    """Whole top-level statements, packed to ``CODE_PIECE``; a class beyond ``CODE_LIMIT`` between methods."""
    lines = source.expandtabs(4).splitlines()
    starts = {1}
    for node in ast.parse(source).body:
        starts.add(_first_line(node))
        if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno > 120:
            starts.update(_first_line(child) for child in node.body[1:] if isinstance(child, ast.FunctionDef))
    borders = [*sorted(starts), len(lines) + 1]
    piece: list[str] = []
    size = 0
    for start, stop in itertools.pairwise(borders):
        segment = lines[start - 1 : stop - 1]
        length = sum(len(line) + 1 for line in segment)
        if piece and (size >= CODE_PIECE or size + length > CODE_LIMIT):
            yield "\n".join(piece).strip("\n")
            piece, size = [], 0
        if length <= CODE_LIMIT:
            piece += segment
            size += length
    yield "\n".join(piece).strip("\n")


def _first_line(node: ast.stmt) -> int:
    """Line of a statement or of its first decorator."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])
