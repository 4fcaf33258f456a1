"""A Hugging Face encoder as the topic classifier of a language: fine-tuned here, stored as safetensors.

Llama-3-SynE used a TinyBERT. Folders are read as data alone: safetensors weights, no code out of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.curation.records import require
from megatron_syne.curation.topic_model import read_checked
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal

_MAX_TOKENS = 512
_TRAINING_BATCH = 16
_LABELLING_BATCH = 32
_WARM_UP = 0.1  # share of the steps in which the learning rate rises; it then falls to 0 in a line


@dataclass(frozen=True)
class EncoderModel:
    """A sequence classifier of transformers, its tokenizer, and the names of its outputs."""

    topics: tuple[str, ...]
    max_chars: int
    model: Any
    tokenizer: Any

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[texts, topics], rows summing to 1; batched by length, so that little is padded."""
        import torch

        result = np.zeros((len(texts), len(self.topics)), np.float32)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        self.model.eval()
        with torch.inference_mode():
            for first in range(0, len(order), _LABELLING_BATCH):
                places = order[first : first + _LABELLING_BATCH]
                batch = self.batch([texts[place] for place in places])
                result[places] = self.model(**batch).logits.float().softmax(-1).cpu().numpy()
        return result

    def batch(self, texts: Sequence[str]) -> Any:
        """What the model takes, padded to the longest of the texts."""
        limit = min(_MAX_TOKENS, getattr(self.model.config, "max_position_embeddings", _MAX_TOKENS))
        cut = [text[: self.max_chars] for text in texts]
        return self.tokenizer(cut, truncation=True, max_length=limit, padding=True, return_tensors="pt").to(
            self.model.device
        )

    def files(self) -> dict[str, bytes]:
        """The model and its tokenizer as the files that transformers writes."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, safe_serialization=True)
            self.tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def train_encoder(
    folder: str, texts: Sequence[str], labels: Sequence[str], options: argparse.Namespace
) -> EncoderModel:
    """Fine-tune the encoder in ``folder`` with a new classification head, by AdamW; seeded."""
    import torch

    topics = tuple(sorted(set(labels)))
    torch.manual_seed(options.seed)
    names = dict(enumerate(topics))
    found = _open(
        Path(folder),
        options.device,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        ignore_mismatched_sizes=True,  # a head of another task is replaced
    )
    model = EncoderModel(topics, options.max_chars, *found)
    targets = torch.tensor([topics.index(label) for label in labels])
    batches = -(-len(texts) // _TRAINING_BATCH)
    steps = batches * options.epochs
    rise = max(1, int(_WARM_UP * steps))
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    model.model.train()
    for _ in range(options.epochs):
        order = torch.randperm(len(texts))
        for first in range(0, len(texts), _TRAINING_BATCH):
            places = order[first : first + _TRAINING_BATCH]
            batch = model.batch([texts[place] for place in places.tolist()])
            loss = model.model(**batch, labels=targets[places].to(model.model.device)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model


def load_encoder(folder: Path, described: Mapping[str, Any], max_chars: int, device: str) -> EncoderModel:
    """The encoder of one language out of a model folder; DataError where it is not the one described."""
    topics, hashes = described.get("topics"), described.get("sha256")
    if not isinstance(topics, list) or len(topics) < 2 or not isinstance(hashes, dict):
        raise DataError(f"{folder.parent}/model.json: {folder.name}: topics and sha256 are needed")
    here = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if here != sorted(hashes):
        raise DataError(
            f"{folder}: holds {', '.join(here) or 'nothing'}; model.json names {', '.join(sorted(hashes))}"
        )
    for name in here:
        read_checked(folder / name, described)
    found = _open(folder, device)
    if found[0].config.num_labels != len(topics):
        raise DataError(f"{folder}: {found[0].config.num_labels} outputs for {len(topics)} topics")
    return EncoderModel(tuple(topics), max_chars, *found)


def _open(folder: Path, device: str, **settings: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a local folder. Neither code nor pickles in it are looked at."""
    require("transformers", "hf")
    if not (folder / "config.json").is_file():
        raise MissingInput(f"{folder}/config.json: no such file; expected a Hugging Face folder")
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        try:
            settings_of_file = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        if "auto_map" in settings_of_file:
            raise SecurityRefusal(
                f"{path}: auto_map asks to run code out of the folder; no such model is read"
            )
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **settings
        )
        tokenizer = AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder}: no encoder that can be read: {error}") from None
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {error}") from None
