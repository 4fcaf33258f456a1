"""``synthesize``: question/answer documents as Llama-3-SynE's second stage reads them, and prompts to make them.

    curate_data.py synthesize documents --kind science --input answers.jsonl --output synthesis.jsonl
    curate_data.py synthesize documents --kind code --input leetcode.jsonl --question-key problem \\
        --answer-key solution --output code.jsonl
    curate_data.py synthesize prompts --input science_pages.jsonl --discipline-key topic --output prompts.jsonl

A document is a question and its answer as plain text, laid out by a template; a prompt asks a language model for a
new problem and its solution, after a snippet of a web page. No model is called here: prompts are JSONL for any
server, and what it answers is the input of ``documents``. Templates lie in ``curation/templates``; ``--template``
takes another file, in which ``{name}`` stands for what the option of that name gives, ``{{`` and ``}}`` for braces.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_syne.curation.records import (
    Documents,
    Record,
    Source,
    add_output_arguments,
    add_reading_arguments,
    line_of,
    name_in,
    refuse_present,
)
from megatron_syne.data.documents.atomic import Outputs
from megatron_syne.data.documents.jsonl import BadLine, text_in
from megatron_syne.errors import ConfigError, MissingInput

TEMPLATES = Path(__file__).parent / "templates"
SCIENCE, CODE = "science", "code"
DISCIPLINES = (
    "mathematics",
    "physics",
    "chemistry",
    "biology",
    "astronomy",
    "earth science",
    "medicine",
    "computer science",
    "general education",
)
"""The nine of Llama-3-SynE (arXiv 2407.18743)."""
SNIPPET_CHARS = 3000

_PART = re.compile(r"\{\{|\}\}|\{([A-Za-z_]+)\}")
_REPLY = re.compile(
    r"^#+ *Problem *:? *$(.*?)^#+ *Solution *:? *$(.*)", re.MULTILINE | re.DOTALL | re.IGNORECASE
)
_FENCE = re.compile(r"^\s*```", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("documents", help="question/answer records to documents of plain text")
    _add_common(one)
    one.add_argument("--kind", choices=[SCIENCE, CODE], default=SCIENCE, help="which template (science)")
    one.add_argument("--question-key", default="question", help="field with the question (question)")
    one.add_argument("--answer-key", default="answer", help="field with the answer (answer)")
    one.add_argument("--reply-key", help="instead of both: field with a model's reply to one of our prompts")
    one.add_argument("--discipline-key", help="field for {discipline} in the template; counted in the report")
    one.add_argument("--language-key", help="field for {language}: the programming language")
    one.add_argument("--text-key", default="text", help="field to add: the document (text)")

    one = actions.add_parser("prompts", help="snippets to prompts for a language model")
    _add_common(one)
    one.add_argument("--text-key", default="text", help="field with the snippet (text)")
    one.add_argument("--discipline-key", help="field with the discipline of each snippet")
    one.add_argument("--discipline", help=f"or one for all; Llama-3-SynE's nine: {', '.join(DISCIPLINES)}")
    one.add_argument(
        "--max-chars", type=int, default=SNIPPET_CHARS,
        help=f"the beginning of a page that makes the snippet, cut between words ({SNIPPET_CHARS})",
    )  # fmt: skip
    one.add_argument("--prompt-key", default="prompt", help="field to add: the prompt (prompt)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_reading_arguments(parser)
    add_output_arguments(parser, split=False)
    parser.add_argument("--template", metavar="FILE", help="a template of your own")


def run(options: argparse.Namespace) -> int:
    """Do what the options say; raises ConfigError, MissingInput, DataError, CannotCreate."""
    return documents(options) if options.action == "documents" else prompts(options)


def documents(options: argparse.Namespace) -> int:
    """``synthesize documents``: each record, and its question and answer as one text."""
    keys = {
        "question": options.question_key,
        "answer": options.answer_key,
        "discipline": options.discipline_key,
        "language": options.language_key or "",  # an empty name is no fault of a fence
    }
    template = Template(options.template or TEMPLATES / f"{options.kind}.txt", keys)

    def fill(record: Record) -> tuple[str, str] | None:
        refuse_present(record, [options.text_key], "--text-key")
        values = {} if options.reply_key is None else reply_in(record, options.reply_key)
        for name, key in keys.items():
            if name not in values:
                values[name] = text_in(record.fields, key, record.line).strip() if key else ""
        if not values["question"] or not values["answer"]:
            return None
        if template.fenced and _FENCE.search(values["answer"]):
            raise BadLine(
                f"field {options.answer_key!r} holds ```, and the template puts ``` around it; "
                "use --kind science, or a template without",
                record.line.offset,
            )
        return template.fill(values), values["discipline"]

    return _write(options, fill, options.text_key, template)


def prompts(options: argparse.Namespace) -> int:
    """``synthesize prompts``: each record, and the prompt made of its text."""
    if (options.discipline is None) == (options.discipline_key is None):
        raise ConfigError("synthesize prompts: give either --discipline-key or --discipline")
    if options.max_chars < 1:
        raise ConfigError(f"--max-chars: must be at least 1, found {options.max_chars}")
    names = {"discipline": "given", "snippet": options.text_key}
    template = Template(options.template or TEMPLATES / "prompt.txt", names)

    def fill(record: Record) -> tuple[str, str] | None:
        refuse_present(record, [options.prompt_key], "--prompt-key")
        text = text_in(record.fields, options.text_key, record.line).strip()
        discipline = options.discipline or name_in(record, options.discipline_key)
        if not text:
            return None
        return template.fill(
            {"discipline": discipline, "snippet": beginning(text, options.max_chars)}
        ), discipline

    return _write(options, fill, options.prompt_key, template)


def _write(
    options: argparse.Namespace,
    fill: Callable[[Record], tuple[str, str] | None],
    key: str,
    template: Template,
) -> int:
    disciplines: Counter[str] = Counter()
    with Outputs(overwrite=options.overwrite) as outputs:
        places = Documents(outputs, options)
        source = Source(options, places.quarantine)
        for chunk in source.chunks(fill):
            for record, filled in chunk:
                if filled is None:
                    source.tally.drop("empty")
                    continue
                text, discipline = filled
                places.write(line_of(record, {key: text}), (discipline,))
                source.tally.written += 1
                disciplines[discipline] += 1
        counts = dict(sorted(disciplines.items()))
        places.publish(source, {"template": template.text, "disciplines": counts})
    for discipline, number in counts.items():
        print(f"  {number:12,}  {discipline or 'all'}")
    print(source.tally.describe(), flush=True)
    return 0


def reply_in(record: Record, key: str) -> dict[str, str]:
    """Question and answer out of a reply in the form that ``templates/prompt.txt`` asks for; raises BadLine.

    Headings, not JSON: formulas are full of backslashes, which models do not escape.
    """
    found = _REPLY.search(text_in(record.fields, key, record.line))
    if found is None:
        reason = f"field {key!r} has no line '### Problem' with a line '### Solution' after it"
        raise BadLine(reason, record.line.offset)
    return {"question": found[1].strip(), "answer": found[2].strip()}


def beginning(text: str, max_chars: int) -> str:
    """The first characters of a text, ended at white space where there is some in their last fifth."""
    if len(text) <= max_chars:
        return text
    cut = text[:max_chars]
    if not text[max_chars].isspace():
        last = max(cut.rfind(" "), cut.rfind("\n"))
        cut = cut[:last] if last >= max_chars * 4 // 5 else cut
    return cut.rstrip()


class Template:
    """A text with ``{name}`` in it; the file's last newline is no part of it.

    ``keys``: what may stand there, and the field it comes from (None: not given). Raises ConfigError for a name
    that is none of them or not given, with the line.
    """

    def __init__(self, path: str | Path, keys: Mapping[str, str | None]) -> None:
        try:
            self.text = Path(path).read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise MissingInput(f"{path}: the template cannot be read: {error}") from None
        self.fenced = _FENCE.search(self.text) is not None
        names = []
        for match in _PART.finditer(self.text):
            name = match[1]
            if name is None:
                continue
            where = f"{path}:{self.text.count(chr(10), 0, match.start()) + 1}"
            if name not in keys:
                raise ConfigError(
                    f"{where}: {{{name}}} is unknown here; known: {', '.join(keys)}; {{{{ and }}}} for braces"
                )
            if keys[name] is None:
                raise ConfigError(f"{where}: {{{name}}} needs --{name}-key")
            names.append(name)
        if not names:
            raise ConfigError(f"{path}: nothing is filled in: expected {{name}} of {', '.join(keys)}")

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with its names replaced, once: braces in a value stay as they are."""
        return _PART.sub(lambda match: values[match[1]] if match[1] else match[0][0], self.text)
