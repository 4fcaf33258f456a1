from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from prepared import TEXTS, many_texts, write_jsonl

from megatron_syne.data.preparation.fim import FillInMiddle, cut
from megatron_syne.data.preparation.prepare import Job, prepare
from megatron_syne.data.tokenizer import load_tokenizer
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.errors import ConfigError

NAMES = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


@pytest.fixture(scope="module")
def fim_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("fim_tokenizer")
    tokenizer = ByteLevelBPETokenizer()
    special = ["<eos>", "<bos>", *NAMES]
    tokenizer.train_from_iterator(TEXTS, vocab_size=320, min_frequency=2, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "bos_token": "<bos>"}))
    return folder


def test_the_share_of_documents_and_of_orders_and_the_places_are_as_asked() -> None:
    fim = FillInMiddle(0.3, 0.75, NAMES)
    texts = [f"{n:05d}" + "x" * 95 for n in range(6000)]
    cuts = [found for text in texts if (found := cut(text, fim, 7)) is not None]
    assert abs(len(cuts) / len(texts) - 0.3) < 0.03
    assert abs(sum(found.suffix_first for found in cuts) / len(cuts) - 0.75) < 0.05
    # two uniform places, sorted: the three pieces are equally long on average, and every place is met
    means = [np.mean([len(found[piece]) for found in cuts]) for piece in range(3)]
    assert all(abs(mean - 100 / 3) < 3 for mean in means)
    assert {len(found.prefix) for found in cuts} >= set(range(0, 80))
    assert any(not found.suffix for found in cuts) and any(not found.prefix for found in cuts)
    assert any(cut(text, fim, 8) != cut(text, fim, 7) for text in texts)


def test_documents_are_whole_again_once_put_back(tmp_path: Path, fim_tokenizer: Path) -> None:
    texts = many_texts(300)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    fim = FillInMiddle(0.6, 0.5, NAMES)
    prepare(Job([source], fim_tokenizer, tmp_path / "x", fim=fim, seed=3))
    tokenizer, reader = load_tokenizer(fim_tokenizer), IndexedReader(tmp_path / "x")
    before, middle, after = (tokenizer.token_id(name) for name in NAMES)
    kinds = {"plain": 0, "psm": 0, "spm": 0}
    for number, text in enumerate(texts):
        *tokens, eos = reader.document(number).tolist()
        assert eos == tokenizer.eos_id
        found = cut(text, fim, 3)
        if found is None:
            kinds["plain"] += 1
            assert tokenizer.decode(tokens) == text and before not in tokens
            continue
        assert tokens[0] == before and [tokens.count(one) for one in (before, middle, after)] == [1, 1, 1]
        at_middle, at_after = tokens.index(middle), tokens.index(after)
        if found.suffix_first:
            kinds["spm"] += 1
            assert at_after == 1
            suffix, rest = tokens[2:at_middle], tokens[at_middle + 1 :]
            # prefix and middle are tokenised apart, as they are at inference
            assert rest == [*tokenizer.encode(found.prefix), *tokenizer.encode(found.middle)]
            assert tokenizer.decode(rest) + tokenizer.decode(suffix) == text
        else:
            kinds["psm"] += 1
            prefix, suffix, rest = (
                tokens[1:at_after],
                tokens[at_after + 1 : at_middle],
                tokens[at_middle + 1 :],
            )
            assert tokenizer.decode(prefix) + tokenizer.decode(rest) + tokenizer.decode(suffix) == text
    assert min(kinds.values()) > 50
    manifest = json.loads((tmp_path / "x.json").read_text())
    assert manifest["options"]["fim"] == {"rate": 0.6, "spm_rate": 0.5, "tokens": list(NAMES), "seed": 3}


def test_a_document_is_short_by_its_own_tokens(tmp_path: Path, fim_tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["ab", TEXTS[0]])
    job = Job([source], fim_tokenizer, tmp_path / "x", fim=FillInMiddle(1.0, 0.0, NAMES), min_tokens=4)
    (manifest,) = prepare(job)
    assert manifest["counts"]["dropped"]["too_short"] == 1  # three sentinels do not make it long


def test_what_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ConfigError, match=r"not in the vocabulary: <\|fim_prefix\|>, "):
        prepare(Job([source], tokenizer_dir, tmp_path / "x", fim=FillInMiddle(0.5, 0.5, NAMES)))
    for rate, spm, names in (
        (0, 0.5, NAMES),
        (1.1, 0.5, NAMES),
        (0.5, -1, NAMES),
        (0.5, 0.5, ("a", "a", "b")),
    ):
        with pytest.raises(ConfigError):
            FillInMiddle(rate, spm, names)
