"""Floating-point operations of a training step: one formula for the planner, the monitor and the benchmarks. No torch.

Model FLOPs of one token, forward and backward (each multiply-add counts 2, the backward pass twice the forward:
Kaplan et al., arXiv 2001.08361, section 2.1, and PaLM, arXiv 2204.02311, appendix B):

    6 x (parameters of the matrices, without the input embedding, with the output layer)
    + 6 x layers x heads x head width x tokens attended to twice on average

Causal attention is counted once: at position i a token attends to i tokens, ``seq / 2`` on average, for two
matrix products (scores, values), so ``6 x 2 x seq / 2``. A sliding window attends to less. What is computed
again (recompute), norms, rotary embedding, softmax, the loss and the optimizer do not count; nor does padding of
the vocabulary. Frozen parameters count as if they trained: such runs do less, and their TFLOP/s and MFU read too
high. For Llama-3 8B at 8,192 tokens this is 5.15e10, as Megatron-Bridge counts since 25.09; its older
tables and torchtitan count attention without the causal half (5.79e10).
"""

from __future__ import annotations

from megatron_syne.config.schema import ModelConfig
from megatron_syne.models.family import completed


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that each token is multiplied with: all matrices of the layers and the output layer (also where it
    is tied to the embedding), vocabulary not padded."""
    model = completed(model)
    hidden, heads, groups, size = (
        model.hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.kv_channels,
    )
    ffn, layers, vocab = model.ffn_hidden_size, model.num_layers, model.vocab_size
    assert hidden and heads and groups and size and ffn and layers and vocab, "resolve_model first"
    return layers * hidden * ((2 * heads + 2 * groups) * size + 3 * ffn) + vocab * hidden


def attended_tokens(model: ModelConfig, seq_length: int) -> float:
    """Tokens that a token attends to on average over a sequence: seq / 2, less with a window (to half a token)."""
    window = model.window_size
    if window is None or window >= seq_length:
        return seq_length / 2
    return window - window * window / (2 * seq_length)


def model_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """FLOPs of one token in a training step (forward and backward) at a sequence length; see the module's head."""
    model = completed(model)
    assert model.num_layers and model.num_attention_heads and model.kv_channels, "resolve_model first"
    width = model.num_layers * model.num_attention_heads * model.kv_channels
    return 6.0 * matmul_parameters(model) + 12.0 * width * attended_tokens(model, seq_length)
