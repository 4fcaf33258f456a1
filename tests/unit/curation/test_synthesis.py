"""``synthesize``: question/answer records to documents, snippets to prompts, replies back to documents."""

from __future__ import annotations

import json
from pathlib import Path

import labelled
import pytest

from megatron_syne.curation import synthesis
from megatron_syne.errors import ConfigError, DataError, MissingInput

QA = [
    {
        "question": "What is 2 + 2?\n",
        "answer": " 4, as \\frac{8}{2} = {answer}.",
        "discipline": "mathematics",
    },
    {"question": "Why is the sky blue?", "answer": "Rayleigh scattering.", "discipline": "physics", "n": 1},
    {"question": "  ", "answer": "lost", "discipline": "physics"},
]


def documents(path: Path, out: Path, *options: object) -> list[dict]:
    labelled.run(synthesis, "documents", "--input", path, "--output", out, *options)
    return labelled.read(out)


def test_science_documents_are_question_and_answer_as_plain_text(tmp_path: Path) -> None:
    path = labelled.write(tmp_path / "qa.jsonl", QA)
    found = documents(path, tmp_path / "out.jsonl", "--discipline-key", "discipline")
    texts = [
        "What is 2 + 2?\n\n4, as \\frac{8}{2} = {answer}.",
        "Why is the sky blue?\n\nRayleigh scattering.",
    ]
    assert found == [{**record, "text": text} for record, text in zip(QA, texts, strict=False)]
    report = json.loads((tmp_path / "_out.jsonl.report.json").read_text())
    assert report["disciplines"] == {"mathematics": 1, "physics": 1}
    assert report["counts"]["dropped"] == {"empty": 1}


def test_code_documents_have_a_fence(tmp_path: Path) -> None:
    path = labelled.write(
        tmp_path / "code.jsonl",
        [{"problem": "Add.", "solution": "def f(a, b):\n    return a + b", "lang": "python"}],
    )
    keys = ["--kind", "code", "--question-key", "problem", "--answer-key", "solution"]
    found = documents(path, tmp_path / "a.jsonl", *keys, "--language-key", "lang")
    assert found[0]["text"] == "Add.\n\n```python\ndef f(a, b):\n    return a + b\n```"
    assert documents(path, tmp_path / "b.jsonl", *keys)[0]["text"].startswith("Add.\n\n```\ndef")
    fenced = labelled.write(tmp_path / "f.jsonl", [{"problem": "Add.", "solution": "So:\n```\nx\n```"}])
    with pytest.raises(DataError, match=r"f\.jsonl:1:0: field 'solution' holds ```"):
        documents(fenced, tmp_path / "c.jsonl", *keys)
    keys[1] = "science"
    assert documents(fenced, tmp_path / "c.jsonl", *keys)[0]["text"] == "Add.\n\nSo:\n```\nx\n```"


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = labelled.write(tmp_path / "qa.jsonl", QA[:1])
    template = tmp_path / "mine.txt"
    template.write_text("{{{discipline}}}\nF: {question}\nA: {answer}\n", encoding="utf-8")
    found = documents(path, tmp_path / "o.jsonl", "--template", template, "--discipline-key", "discipline")
    assert found[0]["text"].startswith("{mathematics}\nF: What is 2 + 2?\nA: 4, as")
    with pytest.raises(ConfigError, match=r"mine\.txt:1: \{discipline\} needs --discipline-key"):
        documents(path, tmp_path / "p.jsonl", "--template", template)
    template.write_text("a\n{qestion}")
    with pytest.raises(
        ConfigError, match=r"mine\.txt:2: \{qestion\} is unknown here; known: question, answer"
    ):
        documents(path, tmp_path / "p.jsonl", "--template", template)
    template.write_text("{{question}}")
    with pytest.raises(ConfigError, match="nothing is filled in"):
        documents(path, tmp_path / "p.jsonl", "--template", template)
    with pytest.raises(MissingInput, match="absent"):
        documents(path, tmp_path / "p.jsonl", "--template", tmp_path / "absent.txt")


def test_bad_records(tmp_path: Path) -> None:
    path = labelled.write(tmp_path / "qa.jsonl", [QA[0], {"question": "x"}, {"question": 1, "answer": "y"}])
    with pytest.raises(DataError, match=r"qa\.jsonl:2:\d+: no field 'answer'"):
        documents(path, tmp_path / "o.jsonl")
    assert len(documents(path, tmp_path / "o.jsonl", "--on-error", "skip")) == 1
    assert len(labelled.read(tmp_path / "_o.jsonl.quarantine.jsonl")) == 2
    taken = labelled.write(tmp_path / "t.jsonl", [{**QA[0], "text": "mine"}])
    with pytest.raises(DataError, match=r"has a field 'text' already.*--text-key"):
        documents(taken, tmp_path / "p.jsonl")


def test_prompts_and_the_replies_to_them(tmp_path: Path) -> None:
    snippet = "Cells divide. " * 400
    path = labelled.write(tmp_path / "web.jsonl", [{"text": snippet, "topic": "biology", "id": 7}])
    options = ["prompts", "--input", path, "--discipline-key", "topic", "--output", tmp_path / "p.jsonl"]
    labelled.run(synthesis, *options, "--max-chars", 100)
    (record,) = labelled.read(tmp_path / "p.jsonl")
    assert record["id"] == 7 and record["text"] == snippet
    prompt = record["prompt"]
    assert prompt.startswith(
        "Please gain inspiration from the following biology content to create a high-quality biology problem "
        "and solution."
    )
    assert "Cells divide. Cells divide.\n" in prompt and prompt.count("Cells") == 7
    assert "{" not in prompt
    # what is asked for is what is read
    reply = (
        prompt[prompt.index("### Problem") :]
        .replace("(the problem)", "Why?")
        .replace("(the solution)", "So.")
    )
    replies = [{"prompt": prompt, "reply": f"Sure!\n{reply}"}, {"prompt": prompt, "reply": "I cannot."}]
    path = labelled.write(tmp_path / "r.jsonl", replies)
    with pytest.raises(DataError, match=r"r\.jsonl:2:\d+: field 'reply' has no line '### Problem'"):
        documents(path, tmp_path / "o.jsonl", "--reply-key", "reply")
    found = documents(path, tmp_path / "o.jsonl", "--reply-key", "reply", "--on-error", "skip")
    assert [one["text"] for one in found] == ["Why?\n\nSo."]


def test_prompts_need_a_discipline(tmp_path: Path) -> None:
    path = labelled.write(tmp_path / "web.jsonl", [{"text": "x"}])
    options = ["prompts", "--input", path, "--output", tmp_path / "p.jsonl"]
    with pytest.raises(ConfigError, match="either --discipline-key or --discipline"):
        labelled.run(synthesis, *options)
    labelled.run(synthesis, *options, "--discipline", "earth science")
    assert "earth science problem" in labelled.read(tmp_path / "p.jsonl")[0]["prompt"]


@pytest.mark.parametrize(
    "text, expected",
    [("one two three", "one two"), ("北京大学北京大学", "北京大学北京大"), ("short", "short")],
)
def test_beginning(text: str, expected: str) -> None:
    assert synthesis.beginning(text, 8 if text[0] == "o" else 7) == expected


def test_the_templates_are_shipped_and_sound() -> None:
    names = {path.stem for path in synthesis.TEMPLATES.glob("*.txt")}
    assert {"science", "code", "prompt"} <= names
    assert len(set(synthesis.DISCIPLINES)) == 9
