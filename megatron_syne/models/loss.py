"""The loss of a token: cross entropy over the true vocabulary, with z-loss where asked for."""

from __future__ import annotations

from typing import Any

import torch

from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.models.config import padded_vocab_size


def install_loss(gpt: Any, config: RunConfig, model: ModelConfig) -> None:
    """Make a ``GPTModel`` of the last stage compute this run's loss.

    Columns that pad the vocabulary take no part in the softmax: a padded vocabulary trains to the losses of an
    unpadded one. With ``train.z_loss`` the squared log of the softmax's denominator is added while training
    (PaLM, arXiv 2204.02311, section 5; OLMo 2, arXiv 2501.00656): its *gradient*, while the value stays the
    cross entropy alone, so that training and validation losses mean the same with and without it.
    """
    size = model.vocab_size
    assert size is not None, "resolve_model first"
    padded = padded_vocab_size(model, config.parallel.tensor_model_parallel_size) > size
    weight = config.train.z_loss
    if not gpt.post_process or not (padded or weight > 0):
        return
    cross_entropy = gpt.compute_language_model_loss  # the engine's, with the fusion that was asked for

    def loss(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [micro batch, seq], logits [seq, micro batch, vocab / TP] -> [micro batch, seq]."""
        if padded:
            without_padding(logits, size)
        if not (weight > 0 and gpt.training and torch.is_grad_enabled()):
            plain: torch.Tensor = cross_entropy(labels, logits)
            return plain
        # cross entropy = log Z - the label's logit; read before the engine overwrites the logits
        label_logit = label_logits(labels, logits)
        entropy: torch.Tensor = cross_entropy(labels, logits)
        z_loss = weight * (entropy + label_logit) ** 2
        return entropy + (z_loss - z_loss.detach())

    gpt.compute_language_model_loss = loss


def without_padding(logits: torch.Tensor, vocab_size: int) -> None:
    """Overwrite, in place, this TP rank's columns beyond the true vocabulary with what has no probability.

    Unseen by autograd, and rightly: the softmax is 0 there, and so is its gradient. Not -inf: a rank may hold
    nothing but padding, and the fused kernels would take -inf from -inf.
    """
    from megatron.core import parallel_state

    columns = logits.size(-1)
    real = max(0, min(columns, vocab_size - parallel_state.get_tensor_model_parallel_rank() * columns))
    if real < columns:
        with torch.no_grad():
            logits[..., real:] = torch.finfo(logits.dtype).min


def label_logits(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The logit of each label, from whichever TP rank holds it: [micro batch, seq], fp32."""
    whole: torch.Tensor = _LabelLogits.apply(logits, labels.t())
    return whole.t()


class _LabelLogits(torch.autograd.Function):
    """Forward: look up, and sum over TP. Backward: each rank its own, as the engine's cross entropy has it.

    torch's ``gather`` would keep the logits, which the engine overwrites.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """logits [seq, micro batch, vocab / TP], labels [seq, micro batch] -> as labels, fp32."""
        from megatron.core import parallel_state

        columns = logits.size(-1)
        index = labels - parallel_state.get_tensor_model_parallel_rank() * columns
        elsewhere = (index < 0) | (index >= columns)
        index = index.masked_fill(elsewhere, 0).unsqueeze(-1)
        found = logits.gather(-1, index).squeeze(-1).float().masked_fill_(elsewhere, 0.0)
        torch.distributed.all_reduce(found, group=parallel_state.get_tensor_model_parallel_group())
        ctx.save_for_backward(index, elsewhere)
        ctx.columns, ctx.dtype = columns, logits.dtype
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """d loss / d logits: the gradient at the label, zero elsewhere."""
        index, elsewhere = ctx.saved_tensors
        own = gradient.masked_fill(elsewhere, 0.0).to(ctx.dtype).unsqueeze(-1)
        zeros = torch.zeros(*gradient.shape, ctx.columns, dtype=ctx.dtype, device=gradient.device)
        return zeros.scatter_(-1, index, own), None
