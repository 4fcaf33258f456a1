"""Another tokenizer under the same model: what is known stays to the bit, what is new is what was asked for."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_toys import Memory, logits, read_json, save, values, whole
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

from megatron_syne.convert.formats.hf import open_hf
from megatron_syne.convert.numbers import from_float32
from megatron_syne.convert.surgery.record import RECORD, read_record
from megatron_syne.convert.surgery.rows import moments, normal
from megatron_syne.convert.surgery.tokens import NONE, Vocabulary, read_vocabulary, same_tokens, sub_pieces
from megatron_syne.convert.surgery.vocabulary import extend_vocab
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SENTENCE = "Once upon a time, there was a little girl named Lily."
OLD = ["<s>", "</s>", "<unk>", "a", "b", "c", "d"]


def word_level(folder: Path, tokens: list[str] | dict[str, int], **named: str) -> Path:
    """A tokenizer whose words are letters; ``<...>`` are added tokens."""
    ids = tokens if isinstance(tokens, dict) else {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ids if token[0] == "<"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def byte_level(text: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


@pytest.fixture
def small(tmp_path: Path, toy_maker: Any) -> Path:
    """An untied toy of 7 tokens with two rows more than its tokenizer."""
    toy: Path = toy_maker(tmp_path / "small", torch.bfloat16, vocab_size=9, bos_token_id=0, eos_token_id=1)
    word_level(toy, OLD, bos_token="<s>", eos_token="</s>")
    (toy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4], "bos_token_id": 0}))
    return toy


def added_to(stories: Path, folder: Path, tokens: list[str]) -> Path:
    """The stories' own sentencepiece tokenizer with added tokens beside it."""
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(stories / name, folder / name)
    (folder / "added_tokens.json").write_text(json.dumps({t: 512 + i for i, t in enumerate(tokens)}))
    return folder


# What stays


@pytest.mark.parametrize("init", ["mean", "subword", "random"])
def test_stories_with_added_tokens(tmp_path: Path, shared_data: Path, init: str) -> None:
    stories = shared_data / "stories260k"
    tokenizer = added_to(stories, tmp_path / "tokenizer", ["<|user|>", "Lily", " dragon", "龍"])
    found = extend_vocab(open_hf(stories), tokenizer, init=init, pad_to=64)
    out = save(found, tmp_path / "out", rows_at_once=100)
    assert read_json(out / "config.json")["vocab_size"] == 576
    assert (out / "added_tokens.json").exists() and (out / "tokenizer.model").exists()
    ids = LlamaTokenizerFast.from_pretrained(stories, from_slow=True, legacy=True)(SENTENCE).input_ids
    before, after = logits(stories, [ids]), logits(out, [ids])
    assert after.shape[-1] == 576
    assert torch.allclose(before, after[..., :512], atol=1e-5), "old text, old ids: as before"
    assert np.array_equal(whole(found, EMBEDDING)[:512], whole(open_hf(stories), EMBEDDING))
    record = read_record(out)
    assert record is not None and record["new_tokens"] == [[512, 516]] and record["new_layers"] == []


def test_stories_under_a_fast_tokenizer(tmp_path: Path, shared_data: Path) -> None:
    """From tokenizer.model to the tokenizer.json that transformers makes of it, with tokens added by it."""
    stories = shared_data / "stories260k"
    tokenizer = LlamaTokenizerFast.from_pretrained(stories, from_slow=True, legacy=True)
    tokenizer.add_tokens(["Timmy"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.model").unlink(missing_ok=True)
    source = open_hf(stories)
    found = extend_vocab(source, tmp_path / "tokenizer", init="subword")
    counts = found.describe()["parameters"]
    assert (counts["kept"], counts["moved"], counts["dropped"], counts["new"]) == (512, 0, 0, 2)
    out = save(found, tmp_path / "out")
    assert not (out / "tokenizer.model").exists(), "the old vocabulary does not lie beside the new one"
    ids = AutoTokenizer.from_pretrained(out)("Timmy<|end|>", add_special_tokens=False).input_ids
    assert {512, 513} <= set(ids)
    # the pieces of Timmy inside a word, by sentencepiece itself: without the space that it puts in front
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(stories / "tokenizer.model")).Encode("\nTimmy")[2:]
    table = values(source, EMBEDDING)
    expected = np.mean([table[n] for n in pieces], axis=0).astype(np.float32)
    assert np.array_equal(values(found, EMBEDDING)[512], expected)


def test_permuted_ids_compute_the_same(tmp_path: Path, toy_maker: Any) -> None:
    """A tokenizer with the same tokens at other ids: logits come out permuted, nothing else."""
    toy = toy_maker(tmp_path / "toy", vocab_size=7, bos_token_id=0, eos_token_id=1)
    word_level(toy, OLD)
    order = ["c", "</s>", "a", "<unk>", "d", "<s>", "b"]
    found = extend_vocab(open_hf(toy), word_level(tmp_path / "new", order))
    out = save(found, tmp_path / "out")
    to_new = torch.tensor([order.index(token) for token in OLD])
    text = torch.tensor([[0, 3, 4, 5, 6, 3, 3, 1]])
    before, after = logits(toy, text), logits(out, to_new[text])
    assert torch.allclose(before, after[..., to_new], atol=1e-6)
    config = read_json(out / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"]) == (5, 1)
    assert found.describe()["parameters"]["moved"] == 6


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_row_is_where_its_token_went(data: st.DataObject) -> None:
    """Any old and any new assignment of ids, with gaps, any padding, against a dictionary."""
    letters = st.sampled_from("abcdefghijkl")
    ids = {"unique_by": (lambda p: p[0], lambda p: p[1]), "min_size": 1, "max_size": 10}
    old = dict(data.draw(st.lists(st.tuples(letters, st.integers(0, 14)), **ids)))
    new = dict(data.draw(st.lists(st.tuples(letters, st.integers(0, 20)), **ids)))
    pad_to, tied = data.draw(st.sampled_from([1, 4, 8])), data.draw(st.booleans())
    weights = Memory(3, "BF16", vocab_size=11, share_embeddings_and_output_weights=tied)
    weights.documents = {"tokenizer.json": vocabulary_file(old)}  # type: ignore[attr-defined]
    known = {token: number for token, number in old.items() if number < 11}
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(vocabulary_file(new))
        if not known.keys() & new.keys():
            with pytest.raises(DataError, match="none of its"):
                extend_vocab(weights, Path(folder), pad_to=pad_to)
            return
        found = extend_vocab(weights, Path(folder), pad_to=pad_to)
    stays = all(new.get(token) == number for token, number in known.items())
    needed = max(max(new.values()) + 1, 11 if stays else 0)
    rows = -(-needed // pad_to) * pad_to
    assert found.model.vocab_size == rows == found.config["vocab_size"]
    for name in [EMBEDDING] + ([] if tied else [HEAD]):
        table = values(weights, name)
        mean = table[sorted(known.values())].mean(axis=0).astype(np.float32)[None]
        expected = np.repeat(from_float32(mean, "BF16"), rows, axis=0)
        if stays:
            expected[: min(11, rows)] = weights.raw[name][: min(11, rows)]
            for token, number in new.items():
                if token not in known:
                    expected[number] = from_float32(mean, "BF16")[0]
        for token, number in new.items():
            if token in known:
                expected[number] = weights.raw[name][known[token]]
        assert np.array_equal(whole(found, name, data.draw(st.integers(1, 5))), expected)


def vocabulary_file(ids: dict[str, int]) -> bytes:
    return Tokenizer(models.WordLevel(ids, unk_token="a")).to_str().encode()


def test_a_table_larger_than_its_tokenizer_keeps_its_size(tmp_path: Path, small: Path) -> None:
    """As Qwen's: a new token takes an unused row, the other unused row stays."""
    source = open_hf(small)
    found = extend_vocab(source, word_level(tmp_path / "new", [*OLD, "e"]), pad_to=1)
    assert found.model.vocab_size == 9
    assert np.array_equal(whole(found, EMBEDDING)[[*range(7), 8]], whole(source, EMBEDDING)[[*range(7), 8]])
    mean = values(source, EMBEDDING)[:7].mean(axis=0).astype(np.float32)[None]
    assert np.array_equal(whole(found, EMBEDDING)[7:8], from_float32(mean, "BF16"))


# What is new


def test_sub_pieces_of_byte_level_tokens(tmp_path: Path, toy_maker: Any) -> None:
    """Chinese tokens added to an English vocabulary: characters cut in two included."""
    old = byte_level(["the girl and the dragon", "a little girl"], 290)
    new = byte_level(["the girl", "春眠不覺曉處處聞啼鳥" * 3, "春風春雨春山"], 330)
    toy = toy_maker(tmp_path / "toy", vocab_size=old.get_vocab_size(), bos_token_id=0, eos_token_id=None)
    old.save(str(toy / "tokenizer.json"))
    (tmp_path / "new").mkdir()
    new.save(str(tmp_path / "new" / "tokenizer.json"))
    source = open_hf(toy)
    found = extend_vocab(source, tmp_path / "new", init="subword")
    broken = whole_characters = 0
    for name in (EMBEDDING, HEAD):
        table, result = values(source, name), values(found, name)
        for token, number in new.get_vocab().items():
            if token in old.get_vocab():
                assert np.array_equal(result[number], table[old.get_vocab()[token]])
                continue
            text = decoders.ByteLevel().decode([token])
            if "\N{REPLACEMENT CHARACTER}" in text:
                pieces = [old.token_to_id(letter) for letter in token]
                broken += 1
            else:
                pieces = old.encode(text, add_special_tokens=False).ids
                whole_characters += 1
            expected = np.mean([table[n] for n in pieces], axis=0).astype(np.float32)
            assert np.array_equal(result[number], expected), token
    assert broken and whole_characters


@pytest.fixture(scope="module")
def real(shared_data: Path) -> dict[str, Vocabulary]:
    """The vocabularies of stories260k (sentencepiece) and of Llama-3 (byte-level)."""
    found = {}
    for name in ("stories260k", "llama3-tokenizer"):
        files = {path.name: path.read_bytes() for path in (shared_data / name).glob("tokenizer*")}
        found[name] = read_vocabulary(files, name)
    return found


@pytest.mark.parametrize("name", ["stories260k", "llama3-tokenizer"])
def test_a_vocabulary_cuts_its_own_tokens_into_themselves(real: dict[str, Vocabulary], name: str) -> None:
    """So nothing is put before or behind a piece, and texts are read rightly out of tokens."""
    own = real[name]
    assert own.scheme == {"stories260k": "sentencepiece", "llama3-tokenizer": "byte-level"}[name]
    assert own.named.get("eos_token") == {"stories260k": "</s>", "llama3-tokenizer": "<|end_of_text|>"}[name]
    tokens = [t for t in own.ids if t not in own.literal][:: 1 if own.size < 1000 else 97]
    cut = sub_pieces(own, own, tokens, own.size)
    same = [ids == [own.ids[token]] for token, ids in zip(tokens, cut, strict=True)]
    # a few cannot be reached: the bytes of letters that are pieces too, runs of bytes that are no text
    assert sum(same) / len(same) > (0.7 if name == "stories260k" else 0.98)
    words = [t for t in tokens if t.lstrip("▁Ġ").isascii() and t.lstrip("▁Ġ").isalpha()]
    assert len(words) > 200
    assert all(
        ids == [own.ids[t]] for t, ids in zip(words, sub_pieces(own, own, words, own.size), strict=True)
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_a_fast_tokenizer_cuts_as_sentencepiece_does(
    tmp_path: Path, shared_data: Path, real: dict[str, Vocabulary], legacy: bool
) -> None:
    """transformers writes the space in front as a normalizer (legacy) or as a pre-tokenizer."""
    stories = shared_data / "stories260k"
    LlamaTokenizerFast.from_pretrained(stories, from_slow=True, legacy=legacy).save_pretrained(tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    assert (b'"Prepend"' if legacy else b'"prepend_scheme"') in content
    fast, slow = read_vocabulary({"tokenizer.json": content}, "fast"), real["stories260k"]
    assert fast.ids == slow.ids and fast.scheme == slow.scheme and fast.literal == slow.literal
    ordinary = [token for token in slow.ids if token not in slow.literal and token[0] != "<"]
    assert sub_pieces(fast, fast, ordinary, 512) == sub_pieces(slow, slow, ordinary, 512)


def test_special_tokens_are_not_text() -> None:
    """Across two ways of spelling, a special token matches a special token and nothing else."""

    def vocabulary(scheme: str, ids: dict[str, int], literal: set[str]) -> Vocabulary:
        return Vocabulary(
            "tokenizer.json", "", scheme, ids, literal, encode=lambda texts: [[] for _ in texts]
        )

    old = vocabulary(
        "sentencepiece", {"<s>": 0, "<x>": 1, "the": 2, "▁": 3, "<0x41>": 4, "A": 5}, {"<s>", "the"}
    )
    new = vocabulary(
        "byte-level", {"<x>": 0, "<s>": 1, "the": 2, "Ġ": 3, "A": 4, "<y>": 5}, {"<s>", "<x>", "<y>"}
    )
    assert same_tokens(new, old, 6).tolist() == [NONE, 0, NONE, 3, 5, NONE]
    assert same_tokens(new, old, 4).tolist() == [NONE, 0, NONE, 3, NONE, NONE]


def test_from_sentencepiece_to_bytes(real: dict[str, Vocabulary]) -> None:
    """Two ways to spell the same text are the same token; special tokens are not mistaken for text."""
    old, new = real["stories260k"], real["llama3-tokenizer"]
    found = same_tokens(new, old, 512)
    pieces = {number: piece for piece, number in old.ids.items()}
    for token, piece in (("Ġthe", "▁the"), ("he", "he"), (".", "."), ("Ċ", None)):
        number = found[new.ids[token]]
        assert (pieces[number] if number != NONE else None) == piece
    assert all(found[new.ids[token]] == NONE for token in new.literal)
    matched = np.flatnonzero(found != NONE)
    assert len(matched) > 200
    by_id = {number: token for token, number in new.ids.items()}
    for number in matched:
        assert new.text(by_id[number]) == old.text(pieces[found[number]])


def test_random_rows(tmp_path: Path, toy_maker: Any) -> None:
    """Mean and variance of each column as the old ones', from seed and id alone."""
    toy = toy_maker(tmp_path / "toy", vocab_size=40, bos_token_id=None, eos_token_id=None)
    letters = [chr(0x4E00 + i) for i in range(4040)]
    word_level(toy, letters[:40])
    source, new = open_hf(toy), word_level(tmp_path / "new", letters)
    found = extend_vocab(source, new, init="random", seed=7)
    drawn = {}
    for name in (EMBEDDING, HEAD):
        known = moments(source, name, [(0, 40)])
        table = values(source, name)
        assert np.allclose(known.mean, table.mean(axis=0)) and np.allclose(known.std, table.std(axis=0))
        drawn[name] = (values(found, name)[40:] - known.mean) / known.std
        assert (
            np.abs(drawn[name].mean(axis=0)).max() < 0.08 and np.abs(drawn[name].std(axis=0) - 1).max() < 0.06
        )
        assert np.abs(np.corrcoef(drawn[name][:-1].ravel(), drawn[name][1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn[EMBEDDING].ravel(), drawn[HEAD].ravel())[0, 1]) < 0.02
    again = extend_vocab(source, new, init="random", seed=7)
    assert np.array_equal(whole(found, HEAD), whole(again, HEAD, rows_at_once=3))
    other = extend_vocab(source, new, init="random", seed=8)
    assert not np.array_equal(whole(found, HEAD)[40:], whole(other, HEAD)[40:])
    fewer = extend_vocab(source, word_level(tmp_path / "fewer", letters[:50]), init="random", seed=7)
    assert np.array_equal(whole(found, HEAD)[:50], whole(fewer, HEAD)), "a row does not depend on the others"


def test_normal_numbers() -> None:
    many = np.array([normal(2**64 - 1, 1, token, 5) for token in range(2000)])
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03 and abs((many**4).mean() - 3) < 0.3
    radii = [np.hypot(row[:8], row[8:]).round(9) for row in (normal(1, 0, token, 16) for token in range(50))]
    assert len(np.unique(radii)) == 50 * 8, "no two tokens draw from the same bits"
    assert np.array_equal(normal(1, 0, 9, 4), normal(1, 0, 9, 4)) and normal(1, 0, 9, 1) != normal(
        1, 0, 10, 1
    )


# What goes with it


def test_ids_follow_their_tokens(tmp_path: Path, small: Path) -> None:
    new = word_level(tmp_path / "new", ["a", "b", "<unk>", "c", "</s>", "d", "<s>"])
    out = save(extend_vocab(open_hf(small), new), tmp_path / "out")
    assert read_json(out / "config.json")["eos_token_id"] == 4
    assert read_json(out / "generation_config.json") == {"eos_token_id": [4, 1], "bos_token_id": 6}
    assert (out / "LICENSE").read_text() == "the licence\n"
    assert read_json(out / "tokenizer_config.json") == {}


def test_a_special_token_that_is_gone(tmp_path: Path, small: Path) -> None:
    gone = ["<s>", "<unk>", "a", "b", "c", "d"]
    with pytest.raises(DataError, match=r"eos_token_id: 1: .*names no eos_token"):
        extend_vocab(open_hf(small), word_level(tmp_path / "new", gone))
    named = word_level(tmp_path / "named", [*gone, "<end>"], eos_token="<end>")
    found = extend_vocab(open_hf(small), named)
    assert found.config["eos_token_id"] == 6
    assert json.loads(found.documents["generation_config.json"])["eos_token_id"] == [6, 3]  # type: ignore[attr-defined]
    assert found.describe()["parameters"]["dropped"] == 1


def test_ids_in_other_keys_are_refused_where_they_would_go_wrong(tmp_path: Path, small: Path) -> None:
    (small / "generation_config.json").write_text(json.dumps({"suppress_tokens": [3]}))
    extend_vocab(open_hf(small), word_level(tmp_path / "more", [*OLD, "e"]))
    with pytest.raises(DataError, match="suppress_tokens"):
        extend_vocab(open_hf(small), word_level(tmp_path / "other", OLD[::-1]))


def test_the_record_keeps_earlier_new_tokens(tmp_path: Path, small: Path) -> None:
    first = extend_vocab(open_hf(small), word_level(tmp_path / "1", [*OLD, "e", "f", "g"]))
    second = extend_vocab(first, word_level(tmp_path / "2", ["g", "h", *OLD, "e"]), init="subword")
    record = json.loads(second.documents[RECORD])  # type: ignore[attr-defined]
    assert record["new_tokens"] == [[0, 2], [9, 10]]
    assert [one["parameters"]["new"] for one in record["operations"]] == [3, 1]
    described = json.dumps(second.describe())
    assert str(tmp_path) not in described and described.count("extend-vocab") == 2
    assert np.array_equal(whole(second, EMBEDDING)[0], whole(first, EMBEDDING)[9])


def test_a_tokenizer_can_be_given_for_weights_without_one(tmp_path: Path, toy_maker: Any) -> None:
    toy = toy_maker(tmp_path / "toy", vocab_size=7, bos_token_id=0, eos_token_id=1)
    new = word_level(tmp_path / "new", [*OLD, "e"])
    with pytest.raises(MissingInput, match="without a tokenizer"):
        extend_vocab(open_hf(toy), new)
    found = extend_vocab(open_hf(toy), new, old_tokenizer_dir=word_level(tmp_path / "old", OLD))
    assert found.describe()["parameters"]["kept"] == 7
    other = word_level(tmp_path / "other", [*OLD[:3], *OLD[:2:-1]])
    assert extend_vocab(open_hf(toy), new, old_tokenizer_dir=other).identity() != found.identity()


def test_what_is_refused(tmp_path: Path, small: Path) -> None:
    new = word_level(tmp_path / "new", [*OLD, "e"])
    source = open_hf(small)
    with pytest.raises(ConfigError, match="one of mean, subword, random"):
        extend_vocab(source, new, init="zero")
    with pytest.raises(ConfigError, match="pad_to"):
        extend_vocab(source, new, pad_to=0)
    with pytest.raises(MissingInput, match="no such folder"):
        extend_vocab(source, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput, match=r"tokenizer\.json and tokenizer\.model"):
        extend_vocab(source, tmp_path / "empty")
    with pytest.raises(DataError, match="none of its 2 tokens"):
        extend_vocab(source, word_level(tmp_path / "strange", ["x", "y"]))
    (new / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenizer.Mine", null]}}')
    with pytest.raises(SecurityRefusal, match="auto_map"):
        extend_vocab(source, new)
    (new / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"3": {"content": "</s>"}}}')
    with pytest.raises(DataError, match=r"'</s>' has id 1 in tokenizer\.json and 3"):
        extend_vocab(source, new)
    (new / "tokenizer_config.json").unlink()
    (new / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        extend_vocab(source, new)
    (new / "tokenizer.json").unlink()
    (new / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        extend_vocab(source, new)
    tree = json.loads((tmp_path / "strange" / "tokenizer.json").read_bytes())
    tree["model"]["vocab"]["y"] = 2**31
    (new / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="has an id 2147483648"):
        extend_vocab(source, new)


def test_a_row_that_is_no_number_is_refused(tmp_path: Path) -> None:
    weights = Memory(vocab_size=7)
    table = values(weights, HEAD)
    table[4, 2] = np.nan
    weights.fill(HEAD, table)
    with pytest.raises(DataError, match=r"lm_head\.weight: rows .*NaN"):
        extend_vocab(
            weights,
            word_level(tmp_path / "new", [*OLD, "e"]),
            old_tokenizer_dir=word_level(tmp_path / "old", OLD),
        )


def test_a_fast_tokenizer_reads_the_result(tmp_path: Path, small: Path) -> None:
    out = save(extend_vocab(open_hf(small), word_level(tmp_path / "new", [*OLD, "e"])), tmp_path / "out")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    ids = tokenizer("abe").input_ids
    assert ids == [3, 4, 7] and all(a < 9 for pair in pairwise(ids) for a in pair)
