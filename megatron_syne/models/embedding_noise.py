"""NEFTune: noise on the embeddings while training (arXiv 2310.05914).

The noise of a value is a function of the seed, the sample's number in the run, the position and the channel,
and of nothing else: the same in every layout, on every device, and after a resume. No random state is kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_syne.config.schema import RunConfig
from megatron_syne.parallel.context import held_positions

_MASK = 0xFFFFFFFF


def add_embedding_noise(gpt: Any, config: RunConfig) -> None:
    """Make a ``GPTModel`` of the first stage add ``train.neftune_noise_alpha``'s noise while it trains.

    Uniform in [-1, 1], times alpha / sqrt(L x d) with L the sequence length and d the hidden size (section 2).
    """
    alpha, seed = config.train.neftune_noise_alpha, config.train.seed
    if not gpt.pre_process or not alpha > 0:
        return

    def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        """``output``: this rank's part of the embedding, [seq / CP (/ TP), micro batch, hidden]."""
        if not gpt.training:
            return None
        samples = gpt.sample_ids
        assert samples is not None, "train.neftune_noise_alpha needs sample_ids in each training batch"
        positions, length = _positions(output.size(0), gpt.config.sequence_parallel)
        noise = uniform_noise(seed, samples.to(output.device), positions.to(output.device), output.size(-1))
        return output + (noise * (alpha / math.sqrt(length * output.size(-1)))).to(output.dtype)

    gpt.sample_ids = None
    gpt.embedding.register_forward_hook(add)


def announce_samples(model: Any, sample_ids: torch.Tensor | None) -> None:
    """Say which samples of the run ([micro batch], int64) the next micro-batch holds: the noise is theirs."""
    while hasattr(model, "module"):
        model = model.module
    if hasattr(model, "sample_ids"):
        model.sample_ids = sample_ids


def uniform_noise(seed: int, samples: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers in (-1, 1): [positions, samples, width], fp32, each of its own seed, sample, position, channel."""
    sample_keys = _mixed(_mixed(samples & _MASK) ^ _mixed((samples >> 32) + seed))
    rows = _mixed(sample_keys[None, :] + positions[:, None] * 0x9E3779B9)
    channels = _mixed(torch.arange(1, width + 1, device=samples.device))
    bits = _mixed(rows[:, :, None] ^ channels)
    return ((bits >> 9).float() + 0.5) * 2.0**-22 - 1.0  # 23 bits and a half: exact in fp32


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash in int64 arithmetic (C. Wellons, hash-prospector: 16-15-16, bias 0.17)."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK  # may wrap round in int64; the low 32 bits are right
    return x ^ (x >> 16)


def _positions(held: int, sequence_parallel: bool) -> tuple[torch.Tensor, int]:
    """(positions in the whole sequence of this rank's rows of the embedding, length of that sequence)."""
    from megatron.core import parallel_state

    tp = parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1
    rank = parallel_state.get_tensor_model_parallel_rank() if sequence_parallel else 0
    cp = parallel_state.get_context_parallel_world_size()
    length = held * tp * cp
    whole = held_positions(parallel_state.get_context_parallel_rank(), cp, length)
    return whole[rank * held : (rank + 1) * held], length
