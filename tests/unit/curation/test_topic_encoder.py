"""A transformers encoder as the classifier: a small random BERT, made here, fine-tuned and read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import labelled
import pytest

from megatron_syne.curation import topics
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = " ".join([*labelled.EN.values(), labelled.EN_COMMON]).split()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=48,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def trained(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    data = labelled.write(folder / "labels.jsonl", labelled.make(360))
    labelled.run(
        topics, "train", "--input", data, "--model", folder / "model", "--encoder", f"en={bert}",
        "--epochs", 8, "--learning-rate", 3e-3,
    )  # fmt: skip
    return folder / "model"


def test_fine_tuned_stored_as_safetensors_and_applied(trained: Path, tmp_path: Path) -> None:
    described = json.loads((trained / "model.json").read_text())
    assert {name: one["kind"] for name, one in described["languages"].items()} == {
        "en": "encoder",
        "zh": "linear",
    }
    assert described["languages"]["en"]["held_out"]["accuracy"] > 0.8
    names = {path.name for path in (trained / "en.encoder").iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    known = labelled.make(60, seed=3)
    path = labelled.write(tmp_path / "in.jsonl", [{"text": one["text"] * 3} for one in known])
    labelled.run(topics, "apply", "--model", trained, "--input", path, "--output", tmp_path / "out.jsonl")
    found = labelled.read(tmp_path / "out.jsonl")
    assert sum(one["topic"] == truth["topic"] for one, truth in zip(found, known, strict=True)) > 50


def test_probabilities_are_those_of_transformers(trained: Path) -> None:
    import torch
    from transformers import pipeline

    from megatron_syne.curation.labelling import load_labeller

    model = load_labeller(trained).classifiers["en"]
    texts = [one["text"] for one in labelled.make(20, seed=3) if one["language"] == "en"]
    judge = pipeline(
        "text-classification",
        model=str(trained / "en.encoder"),
        device="cpu",
        dtype=torch.float32,
        top_k=None,
    )
    for row, scores in zip(
        model.probabilities(texts), judge(texts, truncation=True, max_length=48), strict=True
    ):
        for one in scores:
            assert one["score"] == pytest.approx(row[model.topics.index(one["label"])], abs=1e-5)


def test_unsafe_and_wrong_folders_are_refused(bert: Path, trained: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    data = labelled.write(tmp_path / "labels.jsonl", labelled.make(24))

    def attempt(encoder: object) -> None:
        labelled.run(
            topics,
            "train",
            "--input",
            data,
            "--model",
            tmp_path / "model",
            "--encoder",
            encoder,
            "--epochs",
            1,
        )

    with pytest.raises(MissingInput, match=r"config\.json: no such file"):
        attempt(tmp_path)
    with pytest.raises(ConfigError, match="no labelled text in de; found: en, zh"):
        attempt(f"de={bert}")
    pickled = tmp_path / "pickled"
    shutil.copytree(bert, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no encoder that can be read"):
        attempt(pickled)
    coded = tmp_path / "coded"
    shutil.copytree(bert, coded)
    config = json.loads((coded / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Model"}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(SecurityRefusal, match="auto_map"):
        attempt(coded)
    assert not (tmp_path / "model" / "model.json").exists()
    changed = tmp_path / "changed"
    shutil.copytree(trained, changed)
    config = json.loads((changed / "en.encoder" / "config.json").read_text())
    (changed / "en.encoder" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(DataError, match="SHA-256 differs"):
        labelled.run(topics, "apply", "--model", changed, "--input", data, "--topic-key", "t", "--output",
                     tmp_path / "o.jsonl")  # fmt: skip
