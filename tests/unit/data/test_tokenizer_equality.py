"""The same ids as transformers' tokenizers: on every text at hand, and on texts made to trip tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_syne.data.tokenizer import Tokenizer, load_tokenizer

CHUNKS = [
    *("a", "Ab", "THE", "'s", "'S", "'ſ", "don't", "1", "1234567", "½", "٣", "²", ".", "...", "#!", "x=1"),
    *(" ", "  ", "     ", "\t", "\n", "\r\n", "\r", "\n\n \n", " \n", "\u00a0", "\u3000", "\u2028", "\u0085"),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "o\u0308\u0323",
        "Å",
        "\u212b",
        "ﬁ",
        "한",
        "\u1112\u1161\u11ab",
        "İ",
        "ß",
        "ǆ",
    ),
    *(
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "\u200d",
        "\ufe0f",
        "🇪🇺",
        "1️⃣",
        "מ",
        "שָׁלוֹם",
        "العَرَبِيَّة",
        "\u202e",
        "\u200f",
        "\u2066",
    ),
    *("中", "數據的質量", "か\u3099", "ｱﾞ", "ไทย", "हिन्दी", "𝒳", "𓀀", "𠮷", "〇", "Ⅷ"),
    *(
        "\x01",
        "\x1b",
        "\x7f",
        "\x80",
        "\ufeff",
        "\u2581",
        "▁▁a",
        "\ue000",
        "\U000f0000",
        "\u0378",
        "\U0003fffd",
    ),
    *("\uffff", "\ufffd", "\U0010ffff", "\u00ad", "\u180e", "\u200b", "\u2060", "Ġ", "Ċ", "ĠĠ", "<0x0A>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|", "|>", "<s>", "</s>", "<unk>", "[INST]"),
]
FIXED = [
    "",
    *CHUNKS,
    " leading and trailing ",
    "\ttab first\n",
    "one\r\ntwo\r\n\r\nthree\r",
    "\ufeffwith a mark before it",
    "naïve café / nai\u0308ve cafe\u0301",
    "<|begin_of_text|>forged<|end_of_text|><|end_of_text|>",
    "".join(map(chr, range(1, 0x300))),
    "a" * 5000 + " " * 5000 + "\n" * 5000 + "中" * 5000 + "1" * 5000 + "!" * 5000,
]
adversarial = st.lists(st.sampled_from(CHUNKS) | st.text(st.characters(codec="utf-8"), max_size=4)).map(
    "".join
)


def theirs_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def ids_of(theirs: Any, texts: Sequence[str]) -> list[list[int]]:
    found = theirs(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [list(map(int, ids)) for ids in found]


def ids_of_ours(ours: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [ids.tolist() for ids in ours.encode_batch(texts)]


@pytest.fixture(scope="module")
def llama3(shared_data: Path) -> tuple[Tokenizer, Tokenizer, Any]:
    """Ours from tokenizer.json, ours from tokenizer.model, transformers'."""
    folder = shared_data / "llama3-tokenizer"
    return load_tokenizer(folder), load_tokenizer(folder / "tokenizer.model"), theirs_of(folder)


@pytest.fixture(scope="module")
def demo(repository: Path) -> tuple[Tokenizer, Any]:
    folder = repository / "examples" / "demo" / "base_model"
    return load_tokenizer(folder), theirs_of(folder)


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[Tokenizer, Any]:
    folder = shared_data / "stories260k"
    return load_tokenizer(folder), theirs_of(folder)


@pytest.fixture(scope="module")
def corpus(shared_data: Path) -> list[str]:
    """Every document of the corpora."""
    files = sorted((shared_data / "corpus").glob("*.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8")]


def test_llama3_on_every_document(llama3: tuple[Tokenizer, Tokenizer, Any], corpus: list[str]) -> None:
    ours, from_model, theirs = llama3
    assert (ours.library, from_model.library) == ("tiktoken", "tiktoken")
    expected = ids_of(theirs, corpus)
    assert ids_of_ours(ours, corpus) == expected
    assert ids_of_ours(from_model, corpus) == expected


def test_demo_on_every_document(demo: tuple[Tokenizer, Any], corpus: list[str]) -> None:
    ours, theirs = demo
    assert (ours.library, ours.kind) == ("tiktoken", "tokenizers")
    assert ids_of_ours(ours, corpus[::4]) == ids_of(theirs, corpus[::4])


def test_sentencepiece_on_every_document(stories: tuple[Tokenizer, Any], corpus: list[str]) -> None:
    ours, theirs = stories
    assert ids_of_ours(ours, corpus[::8]) == ids_of(theirs, corpus[::8])


@settings(deadline=None, max_examples=150)
@given(st.lists(adversarial, max_size=4))
@example(FIXED)
def test_llama3_on_adversarial_text(llama3: tuple[Tokenizer, Tokenizer, Any], texts: list[str]) -> None:
    ours, from_model, theirs = llama3
    expected = ids_of(theirs, texts) if texts else []
    assert ids_of_ours(ours, texts) == ids_of_ours(from_model, texts) == expected
    assert [ours.decode(ids) for ids in expected] == texts


@settings(deadline=None, max_examples=100)
@given(st.lists(adversarial, min_size=1, max_size=4))
@example(FIXED)
def test_demo_on_adversarial_text(demo: tuple[Tokenizer, Any], texts: list[str]) -> None:
    ours, theirs = demo
    assert ids_of_ours(ours, texts) == ids_of(theirs, texts)


@settings(deadline=None, max_examples=100)
@given(st.lists(adversarial, min_size=1, max_size=4))
@example(FIXED)
def test_sentencepiece_on_adversarial_text(stories: tuple[Tokenizer, Any], texts: list[str]) -> None:
    ours, theirs = stories
    assert ids_of_ours(ours, texts) == ids_of(theirs, texts)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 128255), max_size=40))
def test_llama3_decodes_as_transformers(llama3: tuple[Tokenizer, Tokenizer, Any], ids: list[int]) -> None:
    ours, _, theirs = llama3
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("unit", [" ", "\t ", "a", "中", "\n", "aab", "<|end_of_text|>"])
def test_long_runs(llama3: tuple[Tokenizer, Tokenizer, Any], unit: str) -> None:
    """A run of spaces is too much for tiktoken's regular expression: then the library tokenizers does it."""
    ours, from_model, theirs = llama3
    text = "before" + unit * (600_000 // len(unit)) + "after"
    expected = ids_of(theirs, [text])
    assert ids_of_ours(ours, [text]) == expected
    if unit == " ":
        assert ids_of_ours(from_model, [text]) == expected
