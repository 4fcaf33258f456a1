"""The FLOP formula against counts by hand, published figures, and torch's own counter on a real small model."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_syne.config.schema import ModelConfig
from megatron_syne.models.config import resolve_model
from megatron_syne.models.flops import attended_tokens, matmul_parameters, model_flops_per_token


def preset(name: str) -> ModelConfig:
    return resolve_model(ModelConfig(preset=name))


def test_matrices_of_llama3_8b_by_hand() -> None:
    attention = 4096 * (4096 + 1024 + 1024) + 4096 * 4096
    layer = attention + 3 * 4096 * 14336
    assert matmul_parameters(preset("llama3_8b")) == 32 * layer + 128256 * 4096 == 7_504_658_432


@pytest.mark.parametrize(("name", "flops"), [("llama3_8b", 5.147e10), ("llama3_70b", 4.49e11)])
def test_published_counts_at_8192(name: str, flops: float) -> None:
    """Megatron-Bridge's tokens/s and TFLOP/s of one row divide to these."""
    assert model_flops_per_token(preset(name), 8192) == pytest.approx(flops, rel=1e-3)


def test_attention_without_the_causal_half_is_the_older_count() -> None:
    model = preset("llama3_8b")
    older = model_flops_per_token(model, 8192) + 6 * 32 * 4096 * 8192
    assert older == pytest.approx(5.79e10, rel=1e-3)


def test_tied_tables_count_once_as_a_product() -> None:
    model = preset("llama3_2_1b")
    assert model.share_embeddings_and_output_weights
    untied = dataclasses.replace(model, share_embeddings_and_output_weights=False)
    assert matmul_parameters(model) == matmul_parameters(untied)


@pytest.mark.parametrize(("window", "seq"), [(None, 64), (16, 64), (64, 64), (100, 64), (1, 64)])
def test_attended_tokens_by_counting(window: int | None, seq: int) -> None:
    """The mean number of visible tokens, itself included, less at most the half that causal counting leaves out."""
    model = dataclasses.replace(preset("llama3_8b"), window_size=window)
    seen = sum(min(position + 1, window or seq) for position in range(seq)) / seq
    assert seen - 0.5 <= attended_tokens(model, seq) <= seen


@pytest.mark.parametrize("tied", [False, True])
def test_torchs_counter_on_a_llama(tied: bool) -> None:
    """Forward and backward of transformers' Llama with written-out attention, which computes the masked half too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    batch, seq, heads, groups, head, hidden, ffn, layers, vocab = 2, 48, 4, 2, 24, 64, 160, 3, 200
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    tokens = torch.randint(0, vocab, (batch, seq))
    with FlopCounterMode(display=False) as counter:
        llama(tokens, labels=tokens).loss.backward()
    model = dataclasses.replace(
        preset("llama3_8b"),
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head,
        vocab_size=vocab,
        share_embeddings_and_output_weights=tied,
    )
    masked_half = 6 * layers * heads * head * seq
    angles = (
        2 * batch * seq * head // 2
    )  # transformers multiplies positions and frequencies as matrices, forward only
    expected = batch * seq * (model_flops_per_token(model, seq) + masked_half) + angles
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
