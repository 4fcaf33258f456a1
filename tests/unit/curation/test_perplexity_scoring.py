"""Reading, writing and going on, with a model that is a formula; the real ones have their own tests."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_syne.curation.perplexity_options import Task
from megatron_syne.curation.perplexity_output import GrowingOutput
from megatron_syne.curation.perplexity_scoring import Counts, score_files
from megatron_syne.data.tokenizer import load_tokenizer
from megatron_syne.errors import CannotCreate, DataError, MissingInput

TOKENIZER = Path(__file__).resolve().parents[3] / "examples" / "demo" / "base_model"
VOCABULARY = 2560


class Formula:
    """-log p of a token is its id / 1000 plus a little for its place. Fails at a call, as a kill would."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, windows):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return np.array([window[1:].sum() / 1000 + 0.01 * (len(window) - 1) for window in windows])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)), "utf-8"
    )
    return path


def task_for(tmp_path: Path, name: str = "out", **changes) -> Task:
    task = Task(inputs=[str(tmp_path / "in.jsonl")], output=str(tmp_path / f"{name}.jsonl"), context=16)
    return dataclasses.replace(task, **changes)


def score(task: Task, tokenizer, scorer=None, part_bytes: int = 400, **changes) -> Counts:
    return score_files(task, tokenizer, scorer or Formula(), VOCABULARY, {"model": 1}, part_bytes, **changes)


TEXTS = [f"Document {n}. " * (1 + n % 7) for n in range(40)] + ["", "a"]


def test_numbers_and_order(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "in.jsonl", TEXTS)
    told: list[str] = []
    counts = score(task_for(tmp_path), tokenizer, show=told.append)
    assert re.fullmatch(
        r"\d+ lines, [\d,]+ tokens, [\d,]+ tokens/s, \d+ %(, about \d+:\d\d:\d\d left)?", told[0]
    )
    assert told[-1].startswith("42 lines, ") and told[-1].endswith("100 %")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["n"] for row in rows] == list(range(len(TEXTS)))
    for row, line, before in zip(rows, lines, (tmp_path / "in.jsonl").read_text().splitlines(), strict=True):
        assert line.startswith(before[:-1]), "the input's bytes are kept"
        ids = tokenizer.encode(row["text"])
        assert row["tokens"] == len(ids)
        if len(ids):
            assert row["perplexity"] == pytest.approx(math.exp(np.mean(ids) / 1000 + 0.01), rel=1e-8)
        else:
            assert row["perplexity"] is None
    assert (counts.lines, counts.scored, counts.without_prediction) == (42, 41, 1)
    assert counts.tokens == sum(row["tokens"] for row in rows)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.journal"))


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_a_run_that_was_cut_short_gives_the_same_bytes(fails_at: int, tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "in.jsonl", TEXTS)
    whole = score(task_for(tmp_path, "whole"), tokenizer)
    with pytest.raises(KeyboardInterrupt):
        score(task_for(tmp_path), tokenizer, Formula(fails_at))
    assert not (tmp_path / "out.jsonl").exists()
    again, told = Formula(), []
    counts = score(task_for(tmp_path), tokenizer, again, show=told.append)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert counts == whole
    all_parts = Formula()
    score(task_for(tmp_path, "third"), tokenizer, all_parts)
    assert again.calls == all_parts.calls - (fails_at - 1), "what was done is not done again"
    assert ("goes on after" in told[0]) is (fails_at > 1)


@given(at=st.integers(0, 4000), journal_at=st.integers(0, 4000), noise=st.binary(max_size=20))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_crash_leaves(at: int, journal_at: int, noise: bytes, tmp_path: Path, tokenizer) -> None:
    """Either file cut anywhere, with noise after it: a power failure keeps no order between them."""
    write(tmp_path / "in.jsonl", TEXTS)
    for old in tmp_path.glob("out.jsonl*"):
        old.unlink()
    if not (tmp_path / "whole.jsonl").exists():
        score(task_for(tmp_path, "whole"), tokenizer)
    with pytest.raises(KeyboardInterrupt):
        score(task_for(tmp_path), tokenizer, Formula(fails_at=6))
    for name, size in (("out.jsonl.partial", at), ("out.jsonl.journal", journal_at)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:size] + noise)
    score(task_for(tmp_path), tokenizer)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_killed_when_all_was_written(tmp_path: Path, tokenizer) -> None:
    """What lies behind the last whole part is cut off, and nothing is computed again."""
    write(tmp_path / "in.jsonl", TEXTS)
    score(task_for(tmp_path, "whole"), tokenizer)

    def kill(text: str) -> None:
        if text.startswith("42 lines"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(task_for(tmp_path), tokenizer, show=kill)
    with (tmp_path / "out.jsonl.partial").open("ab") as stream:
        stream.write(b'{"half a line')
    again = Formula()
    score(task_for(tmp_path), tokenizer, again)
    assert again.calls == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_going_on_with_something_else_is_refused(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(KeyboardInterrupt):
        score(task_for(tmp_path), tokenizer, Formula(fails_at=5))
    with pytest.raises(CannotCreate, match=r"other options or inputs \(context\)"):
        score(task_for(tmp_path, context=8), tokenizer)
    with pytest.raises(CannotCreate, match="model"):
        score_files(task_for(tmp_path), tokenizer, Formula(), VOCABULARY, {"model": 2}, 400)
    path.write_text(path.read_text().replace("Document 1.", "Document X.", 1))
    with pytest.raises(DataError, match=r"in.jsonl:\d+: the input up to here has changed"):
        score(task_for(tmp_path), tokenizer)


def test_two_runs_at_once(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "in.jsonl", TEXTS)
    with (
        GrowingOutput(tmp_path / "out.jsonl", {}),
        pytest.raises(CannotCreate, match="another run is writing"),
    ):
        score(task_for(tmp_path), tokenizer)


def test_an_existing_output_is_kept(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "in.jsonl", TEXTS)
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(CannotCreate, match="exists already"):
        score(task_for(tmp_path), tokenizer)
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    score(task_for(tmp_path, overwrite=True), tokenizer)
    assert "perplexity" in (tmp_path / "out.jsonl").read_text()


def test_malformed_lines(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": 3}\n\n{"text": "two"\n{"text": "three"}\n\xff\n')
    with pytest.raises(DataError, match=r"in.jsonl:2:16: .*--on-error skip"):
        score(task_for(tmp_path), tokenizer)
    counts = score(task_for(tmp_path, "skipped", on_error="skip"), tokenizer, part_bytes=20)
    assert (counts.lines, counts.scored, counts.blank, counts.malformed) == (6, 2, 1, 3)
    aside = (tmp_path / "_skipped.jsonl.quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in aside] == [2, 4, 6]
    assert json.loads(aside[2])["raw"].encode("utf-8", "surrogateescape") == b"\xff"


def test_a_field_of_the_same_name_is_not_overwritten(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one", "tokens": 7}\n')
    with pytest.raises(DataError, match=r"in.jsonl:1:0: has a field 'tokens' already.*--tokens-field"):
        score(task_for(tmp_path), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"], "nothing to go on from is left behind"
    score(task_for(tmp_path, tokens_field="scored", field="ppl"), tokenizer)
    assert set(json.loads((tmp_path / "out.jsonl").read_text())) == {"text", "tokens", "ppl", "scored"}


def test_other_kinds_of_input(tmp_path: Path, tokenizer) -> None:
    """gzip, plain text and a folder of them; the numbers are those of the same text as JSONL."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one two three"}\n'))
    (folder / "b.txt").write_text("one two three")
    score(task_for(tmp_path, inputs=[str(folder)]), tokenizer)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0] == rows[1]
    with pytest.raises(MissingInput):
        score(task_for(tmp_path, "no", inputs=[str(tmp_path / "absent.jsonl")]), tokenizer)


def test_a_model_without_numbers_and_a_tokenizer_too_many(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "in.jsonl", ["one two", "three"])
    for value in (math.nan, math.inf, 1e9):
        with pytest.raises(DataError, match=r"in.jsonl:1: the model gives a mean"):
            score(task_for(tmp_path), tokenizer, lambda windows, v=value: np.full(len(windows), v))
    with pytest.raises(DataError, match=r"beyond the model's vocabulary of 20"):
        score_files(task_for(tmp_path, "v"), tokenizer, Formula(), 20, {"model": 1}, 400)
