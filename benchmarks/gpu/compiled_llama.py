"""A plain Llama in torch for torch.compile: what a careful user of torch alone would train on one GPU.

As torchtitan has it (torch.compile of each layer, compiled cross entropy, fp32 weights under autocast or bf16
weights, float8 linear layers by dynamic scaling, selective recomputation), with the matrices of q, k, v and of gate and
up in one each, which is faster, and the last norm and the output layer compiled together with the loss. Compared with
transformers' Llama in ``tests/unit/benchmarks/test_gpu_peers.py``. Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from float8_linear import float8_linear
from torch import nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input [..., in], weight [out, in]) -> [..., out]."""

MATMULS: dict[str, Matmul] = {
    "bf16": linear,
    "tensorwise": partial(float8_linear, rowwise=False),
    "rowwise": partial(float8_linear, rowwise=True),
}
"""Products of the layers; the output layer's are never in float8, as in torchtitan."""

EXPENSIVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
"""Results kept by selective recomputation."""


class Linear(nn.Module):
    """No bias; the product is handed in."""

    def __init__(self, width_in: int, width_out: int, matmul: Matmul) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in).normal_(std=0.02))
        self.matmul = matmul

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matmul(x, self.weight)


class Layer(nn.Module):
    """RMSNorm, attention with rotary embedding and grouped queries, RMSNorm, SwiGLU."""

    def __init__(self, shape: dict[str, int], matmul: Matmul, repeat_keys: bool) -> None:
        super().__init__()
        hidden, ffn = shape["hidden_size"], shape["ffn_hidden_size"]
        self.heads, self.groups = shape["num_attention_heads"], shape["num_query_groups"]
        self.width, self.repeat_keys = hidden // self.heads, repeat_keys
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = Linear(hidden, (self.heads + 2 * self.groups) * self.width, matmul)
        self.out = Linear(hidden, hidden, matmul)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.gate_up = Linear(hidden, 2 * ffn, matmul)
        self.down = Linear(ffn, hidden, matmul)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [batch, seq, hidden]; cos, sin [seq, width of a head], fp32."""
        batch, seq, hidden = x.shape
        joined = self.qkv(self.attention_norm(x)).view(batch, seq, -1, self.width).transpose(1, 2)
        query, key, value = joined.split([self.heads, self.groups, self.groups], dim=1)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        if self.repeat_keys:
            times = self.heads // self.groups
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        attended = scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=not self.repeat_keys
        )
        x = x + self.out(attended.transpose(1, 2).reshape(batch, seq, hidden))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        result: torch.Tensor = x + self.down(silu(gate) * up)
        return result


class Llama(nn.Module):
    """``loss(tokens, labels)``; ``recompute``: ``none``, ``selective`` (all but products and attention) or ``full``."""

    def __init__(
        self,
        shape: dict[str, int],
        precision: str = "bf16",
        repeat_keys: bool = False,
        recompute: str = "none",
        base: float = 500000.0,
    ) -> None:
        super().__init__()
        hidden, width = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
        self.embedding = nn.Embedding(shape["vocab_size"], hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        matmul = MATMULS[precision]
        self.layers = nn.ModuleList(Layer(shape, matmul, repeat_keys) for _ in range(shape["num_layers"]))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.output = Linear(hidden, shape["vocab_size"], linear)
        self.recompute = recompute
        rates = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = torch.outer(torch.arange(shape["seq_length"], dtype=torch.float32), rates).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        """[seq, width of a head], fp32 whatever the weights are; no buffers, which ``to(dtype)`` would change."""
        self.run_layer: Callable[..., torch.Tensor] = run_layer
        self.run_head: Callable[..., torch.Tensor] = loss_of_hidden

    def compile_parts(self) -> None:
        """torch.compile of one layer's work, which all layers share, and of norm, output layer and loss."""
        self.run_layer = torch.compile(run_layer, fullgraph=True)
        self.run_head = torch.compile(loss_of_hidden, fullgraph=True)

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden], before the last norm."""
        x: torch.Tensor = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the residual stream in bf16, half the traffic
        for layer in self.layers:
            if self.recompute == "full":
                x = checkpoint(self.run_layer, layer, x, self.cos, self.sin, False, use_reentrant=False)
            else:
                x = self.run_layer(layer, x, self.cos, self.sin, self.recompute == "selective")
        return x

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, seq, vocabulary]."""
        logits: torch.Tensor = self.output(self.norm(self.hidden_states(tokens)))
        return logits

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over all tokens, computed in fp32."""
        return self.run_head(self.norm, self.output, self.hidden_states(tokens), labels)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in fp32, in Hugging Face's order of halves; x [batch, heads, seq, width]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def run_layer(
    layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, selective: bool
) -> torch.Tensor:
    """One layer; with ``selective`` all but :data:`EXPENSIVE` is computed again in the backward pass."""
    if not selective:
        result: torch.Tensor = layer(x, cos, sin)
        return result
    contexts = partial(create_selective_checkpoint_contexts, kept)
    recomputed: torch.Tensor = checkpoint(layer, x, cos, sin, use_reentrant=False, context_fn=contexts)
    return recomputed


def kept(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """What selective recomputation does with an operation's result."""
    return CheckpointPolicy.MUST_SAVE if op in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def loss_of_hidden(
    norm: nn.Module, output: nn.Module, hidden: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Last norm, output layer and cross entropy, to be compiled as one."""
    return cross_entropy(output(norm(hidden)).float().flatten(0, 1), labels.flatten())


def from_transformers(state: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """State of transformers' ``LlamaForCausalLM`` under this module's names."""
    result = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for number in range(num_layers):
        theirs, ours = f"model.layers.{number}.", f"layers.{number}."
        result |= {
            ours + "attention_norm.weight": state[theirs + "input_layernorm.weight"],
            ours + "qkv.weight": torch.cat(
                [state[f"{theirs}self_attn.{part}_proj.weight"] for part in "qkv"]
            ),
            ours + "out.weight": state[theirs + "self_attn.o_proj.weight"],
            ours + "mlp_norm.weight": state[theirs + "post_attention_layernorm.weight"],
            ours + "gate_up.weight": torch.cat(
                [state[f"{theirs}mlp.{part}_proj.weight"] for part in ("gate", "up")]
            ),
            ours + "down.weight": state[theirs + "mlp.down_proj.weight"],
        }
    return result
