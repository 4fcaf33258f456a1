"""Scores by a causal language model of transformers. Nothing that comes with a model is executed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_syne.curation.perplexity_windows import batches_of, padded_rows
from megatron_syne.errors import ConfigError, DataError, MissingInput
from megatron_syne.platform.base import select

_DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}
_POSITIONS = 1024
"""Positions whose log-probabilities are made at a time: their memory is this x vocabulary x 4 bytes."""


class HuggingFaceScorer:
    """A model from a folder with safetensors. ``context``: tokens it was made for, where its config says so.

    Raises MissingInput or DataError for the folder, ConfigError where transformers is missing or would compute
    another model than the one that is described there.
    """

    def __init__(self, folder: str, dtype: str, platform: str, batch_tokens: int) -> None:
        config_file = Path(folder) / "config.json"
        if not config_file.is_file():
            raise MissingInput(f"{config_file}: no such file; --model is a Hugging Face folder")
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(
                f"scoring with --model needs transformers, but {error}; install the extra megatron_syne[hf]"
            ) from None
        quiet: Any = transformers.utils.logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        auto: Any = transformers
        device = select(platform).device
        try:
            config = auto.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            _check_rope(config_file, config)
            self._model: Any = auto.AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                torch_dtype=_DTYPES[dtype],
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: transformers cannot load this model: {error}") from None
        self._model = self._model.to(device).eval()
        self._device, self._batch_tokens = device, batch_tokens
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self.vocab_size: int = self._model.config.vocab_size
        self.context: int | None = getattr(self._model.config, "max_position_embeddings", None)

    def __call__(self, windows: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
        """Sum of ``-log p`` over the tokens but the first of each window, in nats."""
        sums = np.zeros(len(windows))
        for rows, length in batches_of([len(window) - 1 for window in windows], self._batch_tokens):
            padded = padded_rows([windows[row] for row in rows], len(rows), length)
            sums[rows] = self._forward(torch.from_numpy(padded).to(self._device)).cpu().numpy()
        return sums

    @torch.no_grad()
    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        # Padding stands on the right, where a causal model's tokens do not see it: no mask is needed.
        logits = self._model(input_ids=batch[0], use_cache=False).logits
        total = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        for row, labels in enumerate(batch[1]):
            for at in range(0, len(labels), _POSITIONS):
                losses = torch.nn.functional.cross_entropy(
                    logits[row, at : at + _POSITIONS].float(),
                    labels[at : at + _POSITIONS],
                    ignore_index=-1,
                    reduction="none",
                )
                total[row] += losses.double().sum()
        return total


def _check_rope(file: Path, config: Any) -> None:
    """Version 4 of transformers does not read ``rope_parameters``, the form of version 5: it would compute with
    the default base and without scaling, and say nothing."""
    import transformers

    new = json.loads(file.read_text(encoding="utf-8")).get("rope_parameters")
    if not isinstance(new, dict) or int(transformers.__version__.partition(".")[0]) >= 5:
        return
    base = getattr(config, "rope_theta", None)
    scaled = new.get("rope_type", "default") != "default"
    if new.get("rope_theta", base) != base or scaled != bool(getattr(config, "rope_scaling", None)):
        raise ConfigError(
            f"{file}: has the rotary embedding as rope_parameters alone, which transformers "
            f"{transformers.__version__} does not read; install transformers 5, or add rope_theta and rope_scaling"
        )
