"""Output layer and cross entropy together, a part of the tokens at a time: logits never stand whole.

Of 8,192 tokens and Llama-3's 128,256 columns the logits are 2.1 GB in bf16, the softmax that a cross entropy keeps
for its backward pass 4.2 GB in fp32. Here a chunk's logits live until its sums are taken; what is kept of a token
is the log of its softmax's denominator, and the backward pass computes the logits once more: a fourth matrix
product for the three there were. (Recomputing as in Cut Cross-Entropy, arXiv 2411.09009, but with ordinary matrix
products, so that it works on every machine.) The weight's gradient goes straight into the engine's gradient buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_syne.config.schema import ModelConfig, RunConfig


@dataclass(frozen=True)
class Head:
    """What the chunks of one call have in common."""

    chunk: int
    """Tokens of a chunk; the last one may have fewer."""
    first: int
    """This TP rank's first token id."""
    columns: int
    """This TP rank's columns of the true vocabulary. Those that only pad it are not even computed."""
    z_loss: float
    sequence_parallel: bool
    group: Any
    """TP's process group."""
    fused: bool
    """Elementwise work by torch's compiler: no copy of a chunk in fp32. Not run on a GPU yet."""

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Which tokens go together."""
        return (slice(begin, min(begin + self.chunk, tokens)) for begin in range(0, tokens, self.chunk))


def install_chunked_loss(gpt: Any, config: RunConfig, model: ModelConfig) -> None:
    """Make a ``GPTModel`` of the last stage compute its loss by ``memory.loss_chunk_tokens``.

    The same loss as :func:`megatron_syne.models.loss.install_loss`: padding of the vocabulary takes no part, z-loss
    is in the gradient alone. Without labels the model gives its logits, whole, as before. The output layer is
    called as a module all the same: the engine's hook that awaits gathered parameters hangs on the call.
    """
    if not gpt.post_process:
        return
    chunk, size, weight = config.memory.loss_chunk_tokens, model.vocab_size, config.train.z_loss
    assert chunk is not None and size is not None, "resolve_model first"
    layer, engine_postprocess = gpt.output_layer, gpt._postprocess
    engine_forward: Callable[..., Any] = layer.forward

    def postprocess(*, hidden_states: Tensor, labels: Tensor | None, **others: Any) -> Tensor:
        if labels is None:
            logits: Tensor = engine_postprocess(hidden_states=hidden_states, labels=None, **others)
            return logits
        tied = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
        losses: Tensor = layer(hidden_states, weight=tied, labels=labels)[0]
        return losses

    def forward(
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(logits as the engine's, None), or with labels [micro batch, seq] (their losses, None)."""
        if labels is None:
            engine: tuple[Tensor, None] = engine_forward(input_, weight, runtime_gather_output)
            return engine
        return _losses(input_, layer.weight if weight is None else weight, labels), None

    def _losses(hidden: Tensor, matrix: Tensor, labels: Tensor) -> Tensor:
        rows, first = matrix.size(0), layer.tp_group.rank() * matrix.size(0)
        head = Head(
            chunk=chunk,
            first=first,
            columns=max(0, min(rows, size - first)),
            z_loss=weight if gpt.training else 0.0,
            sequence_parallel=layer.sequence_parallel,
            group=layer.tp_group,
            # Whoever lets the engine fuse its own cross entropy knows that torch's compiler works here.
            fused=gpt.config.cross_entropy_loss_fusion,
        )
        return chunked_loss(hidden, matrix, labels, head)

    gpt._postprocess, layer.forward = postprocess, forward


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Cross entropy of each token: [micro batch, seq], fp32.

    ``hidden`` [seq, micro batch, hidden] (seq / TP of it under ``sequence_parallel``), ``weight`` [vocab / TP,
    hidden], ``labels`` [micro batch, seq], the same on all TP ranks; a label outside of the vocabulary has logit 0,
    as the engine has it. With z-loss its gradient is added, its value is not.
    """
    flat = labels.t().reshape(-1)
    losses: Tensor = _ChunkedLoss.apply(hidden, weight, flat, head)  # type: ignore[no-untyped-call]
    return losses.view(labels.size(1), labels.size(0)).t().contiguous()


class _ChunkedLoss(torch.autograd.Function):
    """(hidden, weight, labels [tokens], head) -> losses [tokens], fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: Head) -> Tensor:
        """Every chunk's sums over this rank's columns, then two collectives over TP for all of them."""
        whole, matrix = _whole(hidden, head), weight[: head.columns]
        tokens = len(whole)
        # Where a rank has padding alone: what has no part in a maximum, a sum or a look-up.
        largest = torch.full((tokens,), torch.finfo(torch.float32).min, device=whole.device)
        sums = torch.zeros(2, tokens, device=whole.device)  # of the exponentials; the label's logit
        denominator = _compiled(_denominator) if head.fused else _denominator
        index, elsewhere = _own(labels, head)
        for part in head.chunks(tokens) if head.columns else ():
            logits = torch.mm(whole[part], matrix.t())
            largest[part], sums[0, part] = denominator(logits)
            found = logits.gather(-1, index[part, None]).squeeze(-1)
            sums[1, part] = found.float().masked_fill_(elsewhere[part], 0.0)
            del logits, found  # before the next chunk's are made
        if head.group.size() > 1:
            own = largest.clone()
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=head.group)
            sums[0] *= torch.exp(own - largest)
            torch.distributed.all_reduce(sums, group=head.group)
        log_z = largest + torch.log(sums[0])
        ctx.save_for_backward(hidden, labels, log_z)
        # As it is, not by save_for_backward: the engine's marks are attributes of this very object.
        ctx.weight, ctx.head = weight, head
        return log_z - sums[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Every chunk's logits again, their gradient in their place, and its two products."""
        hidden, labels, log_z = ctx.saved_tensors
        weight, head = ctx.weight, ctx.head
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        whole, matrix = _whole(hidden, head), weight[: head.columns]
        # Of cross entropy + w (log Z)^2 by a logit: p (1 + 2 w log Z) - [it is the label's], p its probability.
        of_softmax = gradient * (1.0 + 2.0 * head.z_loss * log_z) if head.z_loss else gradient
        index, elsewhere = _own(labels, head)
        softmax_ = _compiled(_softmax_) if head.fused else _softmax_
        grad_hidden = torch.zeros_like(whole) if wants_hidden else None
        into = _gradient_buffer(weight) if wants_weight else None
        for part in head.chunks(len(whole)) if head.columns else ():
            logits = torch.mm(whole[part], matrix.t())
            label = logits.gather(-1, index[part, None]).squeeze(-1)
            of_label = torch.exp(label - log_z[part]) * of_softmax[part] - gradient[part]
            softmax_(logits, log_z[part], of_softmax[part])
            other = logits.gather(-1, index[part, None]).squeeze(-1)
            of_label = torch.where(elsewhere[part], other, of_label.to(logits.dtype))
            logits.scatter_(-1, index[part, None], of_label[:, None])
            if grad_hidden is not None:
                torch.mm(logits, matrix, out=grad_hidden[part])
            if into is not None:
                add_product(into[: head.columns], logits, whole[part])
            del logits
        if grad_hidden is not None:
            grad_hidden = _own_part(grad_hidden.view(-1, *hidden.shape[1:]), head)
        return grad_hidden, None if into is None else _handed_over(weight, into), None, None


def _whole(hidden: Tensor, head: Head) -> Tensor:
    """[tokens, hidden] of all of TP's sequence."""
    if head.sequence_parallel and head.group.size() > 1:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        hidden = gather_from_sequence_parallel_region(hidden, group=head.group)
    return hidden.reshape(-1, hidden.size(-1))


def _own_part(grad_hidden: Tensor, head: Head) -> Tensor:
    """Summed over TP; under SP this rank's part of the sequence."""
    if head.group.size() == 1:
        return grad_hidden
    from megatron.core.tensor_parallel import (
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    reduce = (
        reduce_scatter_to_sequence_parallel_region
        if head.sequence_parallel
        else reduce_from_tensor_model_parallel_region
    )
    summed: Tensor = reduce(grad_hidden, group=head.group)
    return summed


def _own(labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(column of each label, 0 where it is not here; whether it is not here)."""
    index = labels - head.first
    elsewhere = (index < 0) | (index >= head.columns)
    return index.masked_fill(elsewhere, 0), elsewhere


def _denominator(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit and sum of exp(logit - largest) of each row, fp32."""
    largest = logits.amax(dim=-1).float()
    return largest, _in_fp32(logits).sub_(largest[:, None]).exp_().sum(dim=-1)


def _softmax_(logits: Tensor, log_z: Tensor, factor: Tensor) -> None:
    """exp(logit - log Z) times a factor for each row, computed in fp32, in the place of the logits."""
    logits.copy_(_in_fp32(logits).sub_(log_z[:, None]).exp_().mul_(factor[:, None]))


def _in_fp32(logits: Tensor) -> Tensor:
    """A copy, all there is of the kind: torch's mixed arithmetic would make two, one of its own."""
    return logits.to(torch.float32, copy=True)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel for one pass over the logits. Compiled when first wanted: not at import, which it would double."""
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a^T b, summed in the format of ``into`` [m, n], ``a`` [k, m] and ``b`` [k, n] of one format.

    From bf16 into fp32 by torch's product of mixed formats, which torch has for CUDA (in place in 2.11:
    aten/native/cuda/Blas.cpp, ``_addmm_dtype_out_cuda``; before, what is added to had to be of the factors' format).
    Elsewhere of fp32 copies. Not run on a GPU yet.
    """
    if into.dtype == a.dtype:
        into.addmm_(a.t(), b)
        return
    try:
        torch.addmm(into, a.t(), b, out_dtype=into.dtype, out=into)
    except NotImplementedError:  # this machine's torch has no such kernel
        into.addmm_(a.t().to(into.dtype), b.to(into.dtype))
    except RuntimeError as error:
        if "must have the same dtype" not in str(error):
            raise
        into.add_(torch.mm(a.t(), b, out_dtype=into.dtype))


def _gradient_buffer(weight: Tensor) -> Tensor:
    """Where the weight's gradient is summed: the engine's buffer under its DDP, else a new one in fp32."""
    if hasattr(weight, "grad_added_to_main_grad"):
        buffer: Tensor = weight.main_grad  # type: ignore[attr-defined]
        return buffer
    return torch.zeros_like(weight, dtype=torch.float32)


def _handed_over(weight: Any, into: Tensor) -> Tensor | None:
    """What autograd gets for the weight.

    Under the engine's DDP nothing is left to add, but its hook must run, and on the thread of the backward pass
    (``megatron/core/tensor_parallel/layers.py``, ``LinearWithGradAccumulationAndAsyncCommunication``), so it needs
    some tensor of that shape, which it does not read: the weight itself, where the engine allocates one. Where the
    embedding is the same parameter (``zero_out_wgrad``) autograd would sum the two, and the embedding's alone will do.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return into.to(weight.dtype)
    weight.grad_added_to_main_grad = True
    return None if getattr(weight, "zero_out_wgrad", False) else weight.detach()
