"""Under a real model of transformers, held to transformers' own loss on each document by itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_syne.errors import EXIT_CONFIG, EXIT_DATA, EXIT_NO_INPUT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from megatron_syne.data.tokenizer import load_tokenizer  # noqa: E402
from tools import curate_data  # noqa: E402

TOKENIZER = Path(__file__).resolve().parents[3] / "examples" / "demo" / "base_model"


def run(*arguments: str | Path) -> int:
    """Exit code of the command, as a shell would see it."""
    from megatron_syne.errors import run_cli

    return run_cli(lambda: curate_data.main(["score-perplexity", *map(str, arguments)]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2560, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def by_itself(model, tokenizer, text: str, context: int) -> tuple[float | None, int]:
    """transformers' own mean loss of one document that fits the context, and the tokens it is over."""
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
    if ids.shape[1] == 1:
        return None, 0
    total, count = 0.0, 0
    for at in range(0, ids.shape[1] - 1, context):
        window = ids[:, at : at + context + 1]
        with torch.no_grad():
            logits = model(window[:, :-1]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return math.exp(total / count), count


def test_stories260k(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "stories260k"
    lines = (shared_data / "corpus" / "book-en.jsonl").read_text().splitlines()[:8]
    texts = [json.loads(line)["text"][: 60 + 300 * n] for n, line in enumerate(lines)]
    texts += ["", "a", "Once upon a time, there was a little girl. " * 60]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "out.jsonl"
    assert run("--model", folder, "--input", tmp_path / "in.jsonl", "--output", out, "--platform", "cpu",
               "--dtype", "fp32", "--batch-tokens", 700) == 0  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == texts
    for row in rows:
        value, tokens = by_itself(model, tokenizer, row["text"], context=512)
        assert row["tokens"] == tokens
        assert row["perplexity"] == (None if value is None else pytest.approx(value, rel=1e-4))
    # It was trained on stories like the last text, and not on Shakespeare.
    assert rows[-1]["perplexity"] < 10 < min(row["perplexity"] for row in rows[:8])


def test_batching_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    texts = [f"Number {n}. " * (1 + 3 * n % 17) for n in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = []
    for batch_tokens in (1, 100, 5000):
        out = tmp_path / f"{batch_tokens}.jsonl"
        assert run("--model", tiny, "--tokenizer", TOKENIZER, "--input", tmp_path / "in.jsonl", "--output", out,
                   "--batch-tokens", batch_tokens, "--context", 40) == 0  # fmt: skip
        found.append([json.loads(line)["perplexity"] for line in out.read_text().splitlines()])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


def test_what_cannot_be_scored_with(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "x y z"}\n')
    common = ["--tokenizer", TOKENIZER, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]

    def refused(code: int, words: str, *arguments: str | Path) -> None:
        assert run(*arguments, *common) == code
        assert words in capsys.readouterr().err

    refused(EXIT_NO_INPUT, "config.json: no such file", "--model", tmp_path / "absent")
    refused(EXIT_CONFIG, "more than the model's context of 64", "--model", tiny, "--context", "65")
    refused(EXIT_CONFIG, "--batch-tokens: must be at least 1", "--model", tiny, "--batch-tokens", "0")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((tiny / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    refused(EXIT_DATA, "transformers cannot load this model", "--model", pickled)
    if int(transformers.__version__.partition(".")[0]) < 5:
        turned = tmp_path / "turned"
        turned.mkdir()
        config = json.loads((tiny / "config.json").read_text())
        del config["rope_theta"]
        config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
        (turned / "config.json").write_text(json.dumps(config))
        (turned / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
        refused(EXIT_CONFIG, "rope_parameters alone", "--model", turned)
    assert not (tmp_path / "out.jsonl").exists()
