"""Number of parameters of a model, whole and as cut over TP and PP; closed formulas, no torch.

One layer: query, key and value ``h * (heads + 2 * groups) * d`` (and a bias of ``(heads + 2 * groups) * d``),
output projection ``heads * d * h``, gate, up and down ``3 * h * ffn``, two norms of ``h`` (LayerNorm: ``2 * h``,
its bias too). Around them: embedding and output layer ``vocab * h`` each (one where they are tied), a final
norm. TP cuts all but the norms; PP deals out the layers, and a tied embedding then also lies on the last stage.
Tests compare with megatron-core's model of every stage and with transformers.
"""

from __future__ import annotations

from megatron_syne.config.schema import ModelConfig, ParallelConfig
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.models.family import completed
from megatron_syne.parallel.topology import chunk_layers


def model_parameters(model: ModelConfig) -> int:
    """Parameters of the Hugging Face model (vocabulary not padded)."""
    matrices, norm = _layer(model)
    hidden, layers, vocab = _sizes(model)
    tables = 1 if model.share_embeddings_and_output_weights else 2
    return layers * (matrices + 2 * norm) + tables * vocab * hidden + norm


def stage_parameters(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Parameters on one rank of each pipeline stage (the same for all its TP and DP ranks)."""
    matrices, norm = _layer(model)
    hidden, layers, _ = _sizes(model)
    tp = parallel.tensor_model_parallel_size
    table = padded_vocab_size(model, tp) // tp * hidden
    stages = chunk_layers(parallel, layers)
    counts = [sum(map(len, chunks)) * (matrices // tp + 2 * norm) for chunks in stages]
    counts[0] += table
    if not (model.share_embeddings_and_output_weights and len(stages) == 1):
        counts[-1] += table
    counts[-1] += norm
    return counts


def _layer(model: ModelConfig) -> tuple[int, int]:
    """Parameters that TP cuts in one layer, and those of one norm."""
    model = completed(model)
    hidden, _, _ = _sizes(model)
    heads, groups, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    ffn = model.ffn_hidden_size
    assert heads and groups and size and ffn, "resolve_model first"
    qkv = (heads + 2 * groups) * size
    cut = hidden * qkv + heads * size * hidden + 3 * hidden * ffn
    norm = 2 * hidden if model.normalization == "LayerNorm" else hidden
    return cut + (qkv if model.add_qkv_bias else 0), norm


def _sizes(model: ModelConfig) -> tuple[int, int, int]:
    assert model.hidden_size and model.num_layers and model.vocab_size, "resolve_model first"
    return model.hidden_size, model.num_layers, model.vocab_size
