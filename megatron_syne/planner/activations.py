"""What one micro-batch leaves behind for its backward pass in a layer, and in the loss: read off what operations save.

Base: Korthikanti et al., arXiv 2205.05198, section 4, with what has changed since: no dropout, grouped-query attention,
SwiGLU, and attention that keeps the logarithm of the softmax's denominator in place of the scores (Dao et al., arXiv
2205.14135, section 3.1). Per token and layer, in numbers, ``h`` hidden, ``q`` and ``k`` width of queries and of
keys, ``f`` feed-forward, each of them of one TP rank but ``h``:

========================  ================================  ==========================================================
operation                 Transformer Engine                local layers of the CPU platform
========================  ================================  ==========================================================
RMSNorm (two)             input h, 1 fp32                   the same (zero-centred under bf16: input in fp32)
its linear layer          input h                           input h
rotary embedding          -                                 cosine and sine, for queries and for keys
attention                 q + 2k, output q,                 fp32: q, k and the fused projection q + 2k, output q;
                          1 fp32 per head                   bf16: q + 2k and output q, copied to fp32; 1 fp32 per head;
                                                            masks of windows, documents, CP, in fp32
output projection         input q: attention's output       input q: under fp32 attention's output
SwiGLU                    2f                                2f, silu f, gate's other half f
down projection           input f                           input f
========================  ================================  ==========================================================

SP cuts all that is ``h`` wide over TP. CP cuts the tokens. FP8 inputs of linear layers have one byte (and, blockwise,
an fp32 scale per 128 of them); the attention's output then is kept twice. Where parameters are frozen, activations are
counted as if they trained: an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.models.family import completed
from megatron_syne.planner.model_state import WIDTH
from megatron_syne.planner.stacks import CUDA_PLATFORM, cross_entropy_of

FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """Shape of a micro-batch on one rank, and of the layers there."""

    seq: int
    """Tokens of a sequence on this rank: / CP."""
    cp: int
    tokens: int
    """micro batch x seq."""
    stream: int
    """Tokens of the residual stream: / TP with SP."""
    tp: int
    hidden: int
    head: int
    heads: int
    query: int
    key: int
    ffn: int
    vocab: int
    """Rows of the output layer here, padding with them."""
    width: int
    """Bytes of an activation."""
    engine: bool
    """Transformer Engine's layers, not local ones."""
    layer_norm: bool
    """LayerNorm, not RMSNorm."""
    zero_centered: bool
    mask: int
    """Numbers in the attention mask of local layers; 0 = none."""
    document_mask: int
    """Bytes of the documents' mask that comes with the batch."""

    @property
    def residual(self) -> int:
        """Bytes of the residual stream at one place: what a pipeline stage sends."""
        return self.stream * self.hidden * self.width


def sizes_of(config: RunConfig, model: ModelConfig, seq_length: int, micro_batch: int, engine: bool) -> Sizes:
    """The shapes on each rank for one sequence length and micro-batch."""
    model, parallel = completed(model), config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    heads, groups, head = model.num_attention_heads, model.num_query_groups, model.kv_channels
    assert heads and groups and head and model.hidden_size and model.ffn_hidden_size, "resolve_model first"
    seq, documents = seq_length // cp, config.data.reset_attention_mask
    tokens = seq * micro_batch
    masked = not engine and (documents or cp > 1 or model.window_size is not None)
    return Sizes(
        seq=seq,
        cp=cp,
        tokens=tokens,
        stream=tokens // tp if parallel.sequence_parallel else tokens,
        tp=tp,
        hidden=model.hidden_size,
        head=head,
        heads=heads // tp,
        query=heads * head // tp,
        key=groups * head // tp,
        ffn=model.ffn_hidden_size // tp,
        vocab=padded_vocab_size(model, tp) // tp,
        width=WIDTH[config.precision.params_dtype],
        engine=engine,
        layer_norm=model.normalization == "LayerNorm",
        zero_centered=bool(model.layernorm_zero_centered_gamma),
        mask=(micro_batch if documents else 1) * seq * seq_length if masked else 0,
        document_mask=micro_batch * seq_length * seq_length if documents and not engine else 0,
    )


@dataclass(frozen=True)
class Layer:
    """Bytes that one transformer layer saves, by operation."""

    norm: int
    """Of one of its two norms; ``shared`` of them are its input, which a recomputed part keeps anyway."""
    shared: int
    norm_output: int
    rope: int
    projected: int
    """Queries, keys and values as they go into attention."""
    attention_input: int
    """The same as attention itself keeps them."""
    attention_reused: int
    """How much of that is ``projected`` itself."""
    attention_output: int
    """0 where it is what the output projection keeps."""
    projection_input: int
    denominator: int
    mask: int
    feed_forward: int
    """SwiGLU and the input of the down projection."""
    rounded: bool
    """Emulated FP8: linear layers keep rounded copies of their inputs."""
    rounded_anew: bool
    """Whether recomputation rounds the weights again: so but for delayed scaling."""

    @property
    def attention(self) -> int:
        """What attention itself keeps."""
        return self.attention_input + self.attention_output + self.denominator + self.mask

    @property
    def attention_part(self) -> int:
        return self.norm + self.norm_output + self.rope + self.attention + self.projection_input

    @property
    def feed_forward_part(self) -> int:
        return self.norm + self.norm_output + self.feed_forward


def norm_bytes(sizes: Sizes) -> tuple[int, int]:
    """(bytes that a norm saves, those among them that are its input itself): see the table."""
    stream, wide = sizes.stream, sizes.stream * sizes.hidden
    numbers = stream * FP32 * (2 if sizes.layer_norm else 1)
    if not sizes.engine and sizes.zero_centered and sizes.width < FP32:
        return wide * FP32 + numbers, 0  # an fp32 copy of it
    return wide * sizes.width + numbers, wide * sizes.width


def layer_bytes(sizes: Sizes, fp8: float, emulated: bool, rounded_anew: bool) -> Layer:
    """``fp8``: bytes of an FP8 number where Transformer Engine's layer computes in it, else 0; ``emulated``: its
    linear layers keep rounded copies of their inputs."""
    width, tokens = sizes.width, sizes.tokens
    norm, shared = norm_bytes(sizes)

    def linear_input(count: int) -> int:
        return int(count * (fp8 or width))

    # emulated FP8 rounds the input after SP's gather
    norm_output = linear_input((tokens if emulated else sizes.stream) * sizes.hidden)
    query, key = sizes.query * tokens, sizes.key * tokens
    projected = (2 * query + 3 * key) * width  # values are a view of the fused projection
    own_output = query * width if fp8 else 0
    if sizes.engine:
        attention_input, reused = (query + 2 * key) * width, (query + key) * width
    elif width < FP32:  # local attention computes in fp32
        attention_input, reused, own_output = (query + 2 * key * sizes.cp) * FP32, 0, query * FP32
    elif sizes.cp > 1:
        attention_input, reused = (query + 2 * key * sizes.cp) * FP32, query * FP32
    else:
        attention_input = reused = projected
    activation = sizes.ffn * tokens
    return Layer(
        norm=norm,
        shared=shared,
        norm_output=norm_output,
        rope=0 if sizes.engine else 4 * sizes.seq * sizes.head * width,
        projected=projected,
        attention_input=attention_input,
        attention_reused=reused,
        attention_output=own_output,
        projection_input=linear_input(query),
        denominator=FP32 * sizes.heads * tokens,
        mask=sizes.mask * FP32,
        feed_forward=(2 if sizes.engine else 4) * activation * width + linear_input(activation),
        rounded=emulated,
        rounded_anew=rounded_anew,
    )


def rotary_bytes(sizes: Sizes) -> int:
    """Angles of the rotary embedding, fp32 [seq, 1, 1, head]: cached, one for each model chunk."""
    return FP32 * sizes.seq * sizes.head


def logits_bytes(config: RunConfig, sizes: Sizes) -> int:
    """Peak bytes of the output layer and the loss: their input, logits [tokens, vocab / TP], the loss's own.

    megatron-core's own cross entropy makes fp32 logits and writes the softmax over them; bf16 logits wait beside, and
    in the backward pass their gradient does: 6 bytes for each, or 4 under fp32. Transformer Engine's writes the
    gradient over the logits: their own 2 or 4. On a GPU the gradients of the output layer's input and, where its
    product does not add to the gradient buffer itself, of its weight are beside it for a while; z-loss has a
    gradient of the logits of its own. Small things: labels, masks, z-loss. In parts: :func:`chunked_logits_bytes`.
    """
    if config.memory.loss_chunk_tokens is not None:
        return chunked_logits_bytes(config, sizes, config.memory.loss_chunk_tokens)
    logits, z_loss = sizes.tokens * sizes.vocab, config.train.z_loss > 0
    held = sizes.residual + sizes.tokens * (13 + (13 if z_loss else 0))
    in_place = sizes.engine and cross_entropy_of(CUDA_PLATFORM, config) == "te"
    forward = logits * (sizes.width if in_place or sizes.width == FP32 else FP32 + sizes.width)
    if not sizes.engine:
        return held + forward
    weight = 0 if CUDA_PLATFORM.fused_output_gradient else sizes.vocab * sizes.hidden * sizes.width
    backward = logits * sizes.width + max(weight + sizes.residual, logits * sizes.width if z_loss else 0)
    return held + max(forward, backward)


def chunked_logits_bytes(config: RunConfig, sizes: Sizes, chunk: int) -> int:
    """The same where logits stand for ``chunk`` tokens at a time (``models/chunked_loss.py``).

    Held: the input, and for each token the logarithm of the softmax's denominator. In the backward pass also the
    gradient of the input, and under SP the gathered input. Element-wise work takes an fp32 copy of a part's logits on a
    CPU (and under bf16 the product with the part's input one of that), nothing where it is compiled (not measured on a
    GPU yet); the weight's gradient adds to its buffer.
    """
    part = min(chunk, sizes.tokens)
    copied = 0 if sizes.engine else FP32 * (sizes.vocab + (sizes.hidden if sizes.width < FP32 else 0))
    whole = sizes.tokens * sizes.hidden * sizes.width
    held = sizes.residual + sizes.tokens * (17 + (13 if config.train.z_loss > 0 else 0))
    gathered = whole if sizes.stream < sizes.tokens else 0
    return held + part * (sizes.vocab * sizes.width + copied) + whole + gathered
