"""The reference: transformers' own model class and layers, filled one by one.

Nothing of ours computes here: the model class runs its own forward pass once per probe over layers that only
write down what they are called with, so masks, rotary embedding and arguments are as that version of
transformers makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron_syne.errors import ConfigError, DataError
from megatron_syne.parity.filling import Lender
from megatron_syne.parity.probes import Probe, Run
from megatron_syne.parity.tensors import Tensors


class Reference:
    """A model of transformers without memory, whose layers are filled one by one, in fp32."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._model = _model_class(tensors)
        self.name = f"transformers {_version()} {type(self._model).__name__}"
        self._prefix = self._model.base_model_prefix
        self._base: Any = getattr(self._model, self._prefix)
        self.num_layers = len(self._base.layers)
        self.hidden_size: int = self._model.config.hidden_size
        self.vocab_size: int = self._model.config.vocab_size
        self._embedding = f"{self._prefix}.embed_tokens.weight"
        self._output = self._embedding if self._model.config.tie_word_embeddings else "lm_head.weight"
        needed = [f"{self._prefix}.{name}" for name, _ in self._base.named_parameters()] + [self._output]
        missing = [name for name in needed if name not in tensors.names]
        if missing:
            raise DataError(
                f"{tensors.folder}: {self.name} needs tensors that are not there: {', '.join(missing)}"
            )
        self.layer_bytes = sum(4 * parameter.numel() for parameter in self._base.layers[0].parameters())
        self.vocabulary_bytes = 4 * self.vocab_size * self.hidden_size
        # Its frequencies follow from the configuration; on the meta device they were not computed.
        self._base.rotary_emb = type(self._base.rotary_emb)(config=self._model.config)

    def embedding(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the embedding."""
        return self._tensors.rows(self._embedding, start, stop)

    def output(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output layer: the embedding where the model class ties them."""
        return self._tensors.rows(self._output, start, stop)

    def prepare(self, probe: Probe) -> list[dict[str, Any]]:
        """What the model class's forward pass hands to each of its layers beside the hidden states."""
        calls: list[dict[str, Any]] = []

        def write_down(hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
            calls.append(given)
            return hidden_states

        kept = self._base.norm
        self._base.norm = nn.Identity()
        for layer in self._base.layers:
            layer.forward = write_down
        try:
            count = len(probe.tokens)
            self._base(
                inputs_embeds=torch.zeros(1, count, self.hidden_size),
                position_ids=probe.positions()[None],
                # given, because positions with a gap are otherwise taken for several packed sequences
                attention_mask=torch.ones(1, count, dtype=torch.int64),
                use_cache=False,
            )
        finally:
            self._base.norm = kept
            for layer in self._base.layers:
                del layer.forward
        return calls

    def layer(self, index: int, calls: list[dict[str, Any]], lender: Lender) -> Run:
        """A layer with its weights; ``calls``: what :meth:`prepare` found for it, probe by probe."""
        module = self._filled(self._base.layers[index], f"{self._prefix}.layers.{index}.", lender)
        return lambda probe, hidden: module(hidden[None], **calls[probe])[0]

    def final_norm(self, lender: Lender) -> Run:
        """The norm before the output layer."""
        module = self._filled(self._base.norm, f"{self._prefix}.norm.", lender)
        return lambda probe, hidden: module(hidden)

    def _filled(self, module: nn.Module, prefix: str, lender: Lender) -> Callable[..., Any]:
        try:
            return lender.fill(module, lambda name: self._tensors.whole(prefix + name))
        except DataError as error:
            raise DataError(f"{self._tensors.folder}: {prefix}{error}") from None


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _model_class(tensors: Tensors) -> Any:
    """The model, on the meta device. ConfigError where transformers, or its class for the family, is missing."""
    try:
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    except ImportError as error:
        raise ConfigError(
            f"comparing logits needs transformers, but {error}; install the extra megatron_syne[hf]"
        ) from None
    family = str(tensors.config.get("model_type"))
    if family not in CONFIG_MAPPING:
        raise ConfigError(
            f"{tensors.folder}: model_type {family!r}: transformers {_version()} has no class of its own for it, "
            f"and code that comes with a checkpoint is never run; its logits cannot be compared"
        )
    # sdpa computes attention in blocks; the plain one would need memory for all scores
    config = CONFIG_MAPPING[family].from_dict(tensors.config, attn_implementation="sdpa")
    _check_rope(tensors, config)
    with torch.device("meta"):
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return model(config).float().eval()


def _check_rope(tensors: Tensors, config: Any) -> None:
    """Version 4 of transformers does not read ``rope_parameters``, the form of version 5: it would compute with
    a base of 10000 and without scaling, and say nothing."""
    new = tensors.config.get("rope_parameters")
    if not isinstance(new, dict) or int(_version().partition(".")[0]) >= 5:
        return
    base = new.get("rope_theta", config.rope_theta)
    scaled = new.get("rope_type", "default") != "default"
    if base != config.rope_theta or scaled != bool(config.rope_scaling):
        raise ConfigError(
            f"{tensors.folder / 'config.json'}: has the rotary embedding as rope_parameters alone, which "
            f"transformers {_version()} does not read; install transformers 5, or add rope_theta and rope_scaling"
        )
