"""When tiktoken may stand in for a tokenizer.json: never where one id would differ."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import TEXTS

from megatron_syne.data.tokenizer import load_tokenizer
from megatron_syne.data.tokenizers.byte_bpe import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    ByteBpeTokenizer,
    byte_alphabet,
    tokenizers_twin,
)
from megatron_syne.data.tokenizers.byte_level_json import byte_level_of
from megatron_syne.errors import DataError


def tree_of(merges: list[tuple[str, str]], pattern: str = LLAMA3_PATTERN, **model: Any) -> dict[str, Any]:
    """A tokenizer.json of all bytes and these merges; a token gets its id where it is first made."""
    vocab = {character: number for number, character in enumerate(byte_alphabet())}
    for first, second in merges:
        vocab.setdefault(first + second, len(vocab))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, **model},
    }


def ids_by_library(tree: dict[str, Any], texts: list[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(tree))
    backend.encode_special_tokens = True
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def test_trained_tokenizer_is_taken(tokenizer_dir: Path) -> None:
    tree = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    found = byte_level_of(tree)
    assert found is not None and found.pattern == GPT2_PATTERN
    assert found.special == {"<eos>": 0, "<bos>": 1}
    texts = [*TEXTS, "<eos><bos> the dog", "\u2581 中 e\u0301\n\n  x"]
    assert [load_tokenizer(tokenizer_dir).encode(text) for text in texts] == ids_by_library(tree, texts)


def change(*keys: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(tree: dict[str, Any]) -> None:
        place: Any = tree
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return apply


def swap_merges(tree: dict[str, Any]) -> None:
    merges = tree["model"]["merges"]
    merges[0], merges[5] = merges[5], merges[0]


def drop_a_merge(tree: dict[str, Any]) -> None:
    tree["model"]["merges"].pop()


SPECIAL = {"id": 0, "content": "<eos>", "single_word": False, "lstrip": False, "rstrip": False}


@pytest.mark.parametrize(
    "spoil",
    [
        change("normalizer", to={"type": "NFC"}),
        change("normalizer", to={"type": "Lowercase"}),
        change("pre_tokenizer", "add_prefix_space", to=True),
        change("pre_tokenizer", to={"type": "Whitespace"}),
        change("pre_tokenizer", to={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}),
        change("model", "dropout", to=0.5),
        change("model", "continuing_subword_prefix", to="##"),
        change("added_tokens", to=[SPECIAL | {"special": False, "normalized": False}]),
        change("model", "ignore_merges", to=True),  # its special tokens are in the vocabulary as well
        swap_merges,
        drop_a_merge,
    ],
)
def test_what_tiktoken_would_do_otherwise_is_left_to_the_library(
    tokenizer_dir: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    tree = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    spoil(tree)
    assert byte_level_of(tree) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    try:
        ours = load_tokenizer(tmp_path)
    except DataError:  # the library refuses some of them
        return
    assert ours.library == "tokenizers"
    if not tree["model"].get("dropout"):
        assert [ours.encode(text) for text in TEXTS] == ids_by_library(tree, TEXTS)


@pytest.mark.parametrize("pattern", [LLAMA3_PATTERN.replace("{1,3}", ""), r"\w+|\s+", GPT2_PATTERN + "|a"])
def test_an_unknown_pattern_is_left_to_the_library(pattern: str) -> None:
    assert byte_level_of(tree_of([("a", "b")], pattern)) is None
    assert byte_level_of(tree_of([("a", "b")], LLAMA3_PATTERN)) is not None


def test_a_merge_of_pieces_that_do_not_exist_is_left_to_the_library(tmp_path: Path) -> None:
    tree = tree_of([("b", "c"), ("a", "bc"), ("ab", "c")])  # "abc" exists, "ab" does not
    assert "ab" not in tree["model"]["vocab"]
    assert byte_level_of(tree) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer that the library can read"):
        load_tokenizer(tmp_path)


def test_the_order_of_merges_of_one_token_does_not_matter() -> None:
    """Llama-3's list names every way to split a token; only one of them ever comes up."""
    merges = [("a", "a"), ("a", "aa"), ("aa", "a"), ("aa", "aa"), ("aaa", "aa"), ("aa", "aaa")]
    texts = ["a" * count for count in range(1, 40)]
    tree = tree_of(merges, ignore_merges=True)
    found = byte_level_of(tree)
    assert found is not None
    ours = ByteBpeTokenizer("tokenizers", "", *found)
    assert [ours.encode(text) for text in texts] == ids_by_library(tree, texts)


@st.composite
def tokenizers(draw: st.DrawFn) -> dict[str, Any]:
    """Merges over three letters, sound or not: permuted, thinned out, ids not in the order of the merges."""
    pieces = list("abc")
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(1, 12))):
        pair = (draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces)))
        if len("".join(pair)) <= 6 and pair not in merges:
            merges.append(pair)
            pieces.append("".join(pair))
    tree = tree_of(merges, ignore_merges=draw(st.booleans()))
    if draw(st.booleans()):  # every way to split, as Llama-3's
        vocab = tree["model"]["vocab"]
        new = [token for token in vocab if len(token) > 1]
        tree["model"]["merges"] = [
            (token[:at], token[at:])
            for token in new
            for at in draw(st.permutations(range(1, len(token))))
            if token[:at] in vocab and token[at:] in vocab
        ]
    if draw(st.integers(0, 3)) == 0:
        tree["model"]["merges"] = draw(st.permutations(tree["model"]["merges"]))
    if draw(st.integers(0, 3)) == 0 and merges:
        tree["model"]["merges"] = tree["model"]["merges"][:-1]
    return copy.deepcopy(tree)


def test_what_is_proved_is_true() -> None:
    """Any tokenizer that passes gives the library's ids on every text of up to seven letters."""
    texts = ["".join(letters) for count in range(1, 8) for letters in itertools.product("abc", repeat=count)]
    counts = {True: 0, False: 0}

    @settings(deadline=None, max_examples=60)
    @given(tokenizers())
    def check(tree: dict[str, Any]) -> None:
        found = byte_level_of(tree)
        counts[found is not None] += 1
        if found is not None:
            ours = ByteBpeTokenizer("tokenizers", "", *found)
            assert [ids.tolist() for ids in ours.encode_batch(texts)] == ids_by_library(tree, texts)

    check()
    assert min(counts.values()) > 5  # both answers are given


@pytest.mark.parametrize("pattern", [LLAMA3_PATTERN, GPT2_PATTERN], ids=["llama3", "gpt2"])
def test_both_libraries_cut_unicode_alike(pattern: str) -> None:
    """With every pair of bytes a token, lowest bytes first, a cut in another place gives another id."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {bytes(pair): 256 + n for n, pair in enumerate(itertools.product(range(256), repeat=2))}
    tiktoken = ByteBpeTokenizer("tiktoken", "", pattern, ranks, {})
    twin = tokenizers_twin(pattern, ranks)
    planes = itertools.chain(range(1, 0x20000), range(0x20000, 0x110000, 97))
    points = [point for point in planes if not 0xD800 <= point < 0xE000]
    for begin in range(0, len(points), 2048):
        some = map(chr, points[begin : begin + 2048])
        text = "".join(f"a{one}1{one}!{one} {one}\n" for one in some)
        assert tiktoken.encode(text) == twin.encode(text, add_special_tokens=False).ids, hex(points[begin])
