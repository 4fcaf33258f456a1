"""Seconds that one rank spends on one micro-batch in a layer and in the output layer, by part. No torch.

Each product of an M x K by a K x N matrix takes its 2 M N K operations at a share of the peak, and, beside that, the
moving of its three matrices at a share of the memory's bandwidth: what makes narrow slices (high TP) and few tokens
(fp32 gradients are read and written once per micro-batch, whatever its length) slow. Everything else is counted in
bytes:

==============================  ================================================================================
element-wise, one layer         numbers moved per token (h hidden, q query, k key/value, f feed-forward width)
==============================  ================================================================================
two norms                       forward 4 h; backward 6 h
two residual additions          forward 6 h; backward 6 h
rotary embedding                forward 2 (q + k); backward the same
gate x up (SwiGLU)              forward 3 f; backward 5 f
FP8: each product's input       read, written in two layouts of 1 byte; tensorwise and blockwise read it once more
==============================  ================================================================================

h is cut over TP with sequence parallelism, the others always.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.models.family import completed
from megatron_syne.models.flops import attended_tokens
from megatron_syne.planner.hardware import Gpu
from megatron_syne.planner.model_state import gradient_width
from megatron_syne.planner.stacks import Stack, cross_entropy_of

LOGIT_BYTES = {"native": (20.0, 10.0), "te": (6.0, 4.0), "chunked": (2.0, 4.0)}
"""Moved per bf16 logit by the loss, forward and backward. ``native``: the cast to fp32, maximum, subtraction,
exponential, sum, and the gradient back to bf16 (megatron-core's ``vocab_parallel_cross_entropy``). ``te``: read, read
and overwritten by the gradient; backward read and written times the loss's own (Transformer Engine 2.11,
``common/triton/cross_entropy.py``). ``chunked``: read; backward read and overwritten (compiled kernels)."""


@dataclass(frozen=True)
class Rank:
    """What one rank computes with, and on."""

    gpu: Gpu
    stack: Stack
    tokens: int
    """Of one micro-batch after CP."""
    hidden: int
    query: int
    """Width of the query projection over all TP ranks, as of the next three."""
    keys: int
    ffn: int
    vocab: int
    attended: float
    """Tokens that a token attends to, on average."""
    tp: int
    cp: int
    sequence_parallel: bool
    tp_comm_overlap: bool
    cp_comm_type: str
    bytes_per_number: int
    """Of activations: 2 or 4."""
    cast_bytes: int
    """Moved per number that becomes FP8; 0 = no FP8."""
    fp8_products: bool
    """Whether products of cast numbers run at FP8's rate."""
    gradient_bytes: int
    """Of a number in the gradient buffers: 4 or 2."""
    loss_chunk: int | None
    """Tokens of a part of output layer and loss; None = whole."""


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass; communication is what of it shows."""

    matrices: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    host: float = 0.0
    """Waiting for activations that go to host memory and come back."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.matrices + self.attention + self.elementwise + self.tp + self.cp + self.host

    def __add__(self, other: Pass) -> Pass:
        return Pass(
            self.matrices + other.matrices,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.tp + other.tp,
            self.cp + other.cp,
            self.host + other.host,
        )

    def __mul__(self, times: float) -> Pass:
        return Pass(
            self.matrices * times,
            self.attention * times,
            self.elementwise * times,
            self.tp * times,
            self.cp * times,
            self.host * times,
        )


def rank_of(config: RunConfig, model: ModelConfig, gpu: Gpu, stack: Stack) -> Rank:
    """The facts of a configuration that the costs need; ``model`` is the resolved one."""
    model = completed(model)
    parallel, precision = config.parallel, config.precision
    assert model.hidden_size and model.ffn_hidden_size and model.kv_channels, "resolve_model first"
    assert model.num_attention_heads and model.num_query_groups, "resolve_model first"
    seq, cp = config.data.seq_length, parallel.context_parallel_size
    recipe = precision.fp8
    if recipe in stack.recipe_shares:
        stack = replace(stack, fp8_share=stack.recipe_shares[recipe])
    stack = replace(stack, cross_entropy=cross_entropy_of(stack, config))
    return Rank(
        gpu=gpu,
        stack=stack,
        tokens=config.train.micro_batch_size * seq // cp,
        hidden=model.hidden_size,
        query=model.num_attention_heads * model.kv_channels,
        keys=model.num_query_groups * model.kv_channels,
        ffn=model.ffn_hidden_size,
        vocab=padded_vocab_size(model, parallel.tensor_model_parallel_size),
        attended=attended_tokens(model, seq),
        tp=parallel.tensor_model_parallel_size,
        cp=cp,
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=parallel.tp_comm_overlap,
        cp_comm_type=parallel.cp_comm_type or "p2p",
        bytes_per_number=2 if precision.params_dtype == "bf16" else 4,
        cast_bytes=0 if recipe is None else 4 if recipe == "delayed" else 6,
        fp8_products=recipe is not None and not precision.fp8_emulation and gpu.fp8_flops > 0,
        gradient_bytes=gradient_width(config),
        loss_chunk=config.memory.loss_chunk_tokens,
    )


def memory_seconds(rank: Rank, num_bytes: float) -> float:
    """To move that many bytes through the GPU's own memory."""
    return num_bytes / (rank.gpu.memory_bandwidth * rank.stack.memory_share)


def link_seconds(rank: Rank, num_bytes: float, span: int) -> float:
    """To send that many bytes to a rank of a group that reaches over ``span`` neighbouring ranks."""
    gpu = rank.gpu
    rate = gpu.nvlink_bandwidth if span <= gpu.gpus_per_node else gpu.network_bandwidth
    return num_bytes / (rate * rank.stack.link_share)


def product(rank: Rank, m: int, n: int, k: int, fp8: bool, written: int | None = None) -> float:
    """Seconds of an M x K by K x N product; ``written`` = bytes moved per result, not given = it is written once."""
    read = 1 if fp8 else rank.bytes_per_number
    gpu, stack = rank.gpu, rank.stack
    if fp8:
        rate = gpu.fp8_flops * stack.fp8_share
    else:  # fp32 runs as TF32, at half of bf16's rate
        rate = gpu.bf16_flops * stack.bf16_share * 2 / rank.bytes_per_number
    moved = rank.bytes_per_number if written is None else written
    return 2.0 * m * n * k / rate + memory_seconds(rank, float(m) * n * moved + (float(m) + n) * k * read)


@dataclass(frozen=True)
class Linear:
    """Seconds of the three products of a linear layer on this rank."""

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def backward(self) -> float:
        """Both gradients."""
        return self.input_gradient + self.weight_gradient


QKV, PROJ = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
FC1, FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"


def widths(rank: Rank) -> dict[str, tuple[int, int]]:
    """(Inputs, outputs) of a layer's matrices on this rank, by their names within the layer."""
    h, tp = rank.hidden, rank.tp
    qkv, query, ffn = (rank.query + 2 * rank.keys) // tp, rank.query // tp, rank.ffn // tp
    return {QKV: (h, qkv), FC1: (h, 2 * ffn), PROJ: (query, h), FC2: (ffn, h)}


def gradient_traffic(rank: Rank, fused: bool) -> int:
    """Bytes moved for a number of a weight gradient: read and written in its buffer; not ``fused``, also written and
    read before that."""
    if not rank.stack.main_grads:
        return rank.bytes_per_number
    return 2 * rank.gradient_bytes + (0 if fused else 2 * rank.bytes_per_number)


def linear(rank: Rank, inputs: int, outputs: int, fp8: bool, trains: bool = True) -> Linear:
    """A linear layer of these widths on this rank; without a weight gradient where it is frozen."""
    fp8 = fp8 and rank.fp8_products
    gradient = gradient_traffic(rank, rank.stack.fused_layer_gradients)
    return Linear(
        product(rank, rank.tokens, outputs, inputs, fp8),
        product(rank, rank.tokens, inputs, outputs, fp8),
        product(rank, outputs, inputs, rank.tokens, fp8, gradient) if trains else 0.0,
    )


def layer(rank: Rank, fp8: bool = False, trained: Collection[str] | None = None) -> tuple[Pass, Pass]:
    """One transformer layer, (forward, backward), nothing computed again.

    ``fp8`` = its linear layers cast; ``trained`` = names within the layer of what trains, None = all. What is frozen
    has no weight gradient; element-wise work and FP8 casts are counted as if it trained, an upper bound.
    """
    h, tp, t = rank.hidden, rank.tp, rank.tokens
    qkv, query, ffn = (rank.query + 2 * rank.keys) // tp, rank.query // tp, rank.ffn // tp
    sizes = widths(rank)
    columns, rows = (
        [linear(rank, *sizes[name], fp8, trained is None or name in trained) for name in names]
        for names in ((QKV, FC1), (PROJ, FC2))
    )
    linears = columns + rows
    stream = h / tp if rank.sequence_parallel else h
    numbers = (
        10 * stream + 2 * (rank.query + rank.keys) / tp + 3 * ffn,
        12 * stream + 2 * (rank.query + rank.keys) / tp + 5 * ffn,
    )
    passes = rank.stack.elementwise_passes * rank.bytes_per_number
    cast = rank.cast_bytes if fp8 else 0
    casts = (cast * (2 * h + query + ffn), cast * (2 * h + qkv + 2 * ffn))
    elementwise = [
        memory_seconds(rank, t * (count * passes + more)) for count, more in zip(numbers, casts, strict=True)
    ]
    matrices = sum(one.forward for one in linears), sum(one.backward for one in linears)
    attention, cp_comm = attention_seconds(rank), cp_seconds(rank)
    tp_comm = [
        sum(tp_seconds(rank, *pair, fp8)[i] for pair in zip(columns, rows, strict=True)) for i in (0, 1)
    ]
    forward, backward = (
        Pass(matrices[i], attention[i], elementwise[i], tp_comm[i], cp_comm[i]) for i in (0, 1)
    )
    return forward, backward


def attention_seconds(rank: Rank) -> tuple[float, float]:
    """Scores and their product with the values, causal tokens counted once; 2 products forward, 5 backward."""
    work = 2.0 * rank.tokens * rank.query / rank.tp * rank.attended / rank.gpu.bf16_flops
    work *= rank.bytes_per_number / 2
    stack = rank.stack
    return 2 * work / stack.attention_forward_share, 5 * work / stack.attention_backward_share


def tp_seconds(rank: Rank, column: Linear, row: Linear, fp8: bool = False) -> tuple[float, float]:
    """(Forward, backward) TP collectives that show, of a pair of a column- and a row-parallel linear layer.

    With sequence parallelism forward the input is gathered and the output scattered, backward each once more and the
    input gathered again for the weight's gradient; each moves ``(tp - 1) / tp`` of it. Without, one all-reduce (as
    much as both) each way. A frozen weight has no gradient: nothing is gathered again for it, or hides behind it. FP8
    layers gather numbers already cast, of 1 byte. With ``tp_comm_overlap`` each hides behind one product of its layer;
    without it the engine still hides the column-parallel layer's backward ones.
    """
    if rank.tp == 1:
        return 0.0, 0.0
    scatter = tp_collective_seconds(rank)
    gather = scatter / 2 if fp8 and rank.fp8_products and rank.sequence_parallel else scatter
    again = gather if rank.sequence_parallel and column.weight_gradient else 0.0
    share = rank.stack.overlapped_exposed
    columns = showing(again, column.input_gradient, share) + showing(scatter, column.weight_gradient, share)
    if not rank.tp_comm_overlap:
        return gather + scatter, gather + columns
    share = rank.stack.tp_exposed
    columns = showing(again, column.input_gradient, share) + showing(scatter, column.weight_gradient, share)
    forward = showing(gather, column.forward, share) + showing(scatter, row.forward, share)
    return forward, showing(gather, row.input_gradient, share) + columns


def showing(seconds: float, behind: float, share: float) -> float:
    """What shows of communication that overlaps with work: ``share`` of it, or what the work is too short for."""
    return max(share * seconds, seconds - behind)


def tp_collective_seconds(rank: Rank) -> float:
    """To gather or scatter a layer's input over TP."""
    size = float(rank.tokens) * rank.hidden * rank.bytes_per_number * (rank.tp - 1) / rank.tp
    return link_seconds(rank, size, rank.tp)


def cp_seconds(rank: Rank) -> tuple[float, float]:
    """Exchange of keys and values over CP that shows: the ring overlaps with attention, gathers and all-to-alls do
    not. Backward twice as much: keys and values again, and their gradients."""
    if rank.cp == 1:
        return 0.0, 0.0
    keys = 2.0 * rank.tokens * rank.keys / rank.tp * rank.bytes_per_number
    if rank.cp_comm_type == "a2a":
        size = (
            (keys + 2.0 * rank.tokens * rank.query / rank.tp * rank.bytes_per_number)
            * (rank.cp - 1)
            / rank.cp
        )
        one = link_seconds(rank, size, rank.tp * rank.cp)
        return one, one
    one = link_seconds(rank, keys * (rank.cp - 1), rank.tp * rank.cp)
    if rank.cp_comm_type == "p2p":
        one *= rank.stack.overlapped_exposed
    return one, 2 * one


def output_layer(rank: Rank, trains: bool = True) -> tuple[Pass, Pass]:
    """Final norm, output layer (never FP8) and loss, (forward, backward); ``trains``: not frozen.

    In parts (``memory.loss_chunk_tokens``) the logits are computed once more in the backward pass, and the weight's
    gradient is read and written for each part.
    """
    one, kind = tp_collective_seconds(rank), "chunked" if rank.loss_chunk else rank.stack.cross_entropy
    loss = [
        memory_seconds(rank, moved * rank.bytes_per_number / 2 * rank.tokens * rank.vocab / rank.tp)
        for moved in LOGIT_BYTES[kind]
    ]
    if rank.loss_chunk:
        loss = [rank.stack.chunked_passes * seconds for seconds in loss]
    fused = rank.stack.fused_output_gradient or rank.loss_chunk is not None
    own = replace(rank, stack=replace(rank.stack, fused_layer_gradients=fused))
    part = min(rank.loss_chunk or rank.tokens, rank.tokens)
    parts, own = rank.tokens / part, replace(own, tokens=part)
    table = linear(own, rank.hidden, rank.vocab // rank.tp, False, trains)
    again = table.forward if rank.loss_chunk else 0.0
    return Pass(parts * table.forward, 0, loss[0], one), Pass(
        parts * (table.backward + again), 0, loss[1], one
    )


def feed_forward(rank: Rank, fp8: bool) -> Pass:
    """Forward pass of a layer's feed-forward part alone (``recompute_modules: [mlp]``)."""
    h, ffn = rank.hidden, rank.ffn // rank.tp
    up, down = linear(rank, h, 2 * ffn, fp8), linear(rank, ffn, h, fp8)
    numbers = 3 * ffn * rank.stack.elementwise_passes * rank.bytes_per_number
    casts = (rank.cast_bytes if fp8 else 0) * (h + ffn)
    elementwise = memory_seconds(rank, rank.tokens * (numbers + casts))
    return Pass(up.forward + down.forward, 0.0, elementwise, tp_seconds(rank, up, down, fp8)[0])


def norms(rank: Rank) -> Pass:
    """Forward pass of a layer's two norms alone (``recompute_modules: [layernorm]``)."""
    stream = rank.hidden / rank.tp if rank.sequence_parallel else rank.hidden
    numbers = 4 * stream * rank.stack.elementwise_passes * rank.bytes_per_number
    return Pass(elementwise=memory_seconds(rank, rank.tokens * numbers))
