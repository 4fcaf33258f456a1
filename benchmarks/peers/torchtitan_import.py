"""torchtitan's conversion of a Hugging Face folder to its DCP folder: ``torchtitan_import.py SOURCE OUT``.

The calls are those of torchtitan's ``scripts/checkpoint_conversion/convert_from_hf.py``, which the package does
not carry: its model built on the CPU, its state-dict adapter, ``dcp.load`` through its reader, ``dcp.save``.
The script knows named flavours only; here the config of the same kind is made from ``config.json``. As there,
the model and the DCP folder are float32; ``--dtype bfloat16`` builds and writes them in the type of the source.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import get_attention_config, make_ffn_config, make_gqa_config
from torchtitan.models.llama3 import Llama3Model, model_registry
from torchtitan.models.llama3.model import Llama3TransformerBlock

INIT = {"weight": partial(nn.init.normal_, std=0.02), "bias": nn.init.zeros_}
"""Asked for by the configs; never run, as the script does not either."""


def model_config(hf: dict[str, Any]) -> Llama3Model.Config:
    """The torchtitan config of a plain Llama-3 ``config.json``, its QKV fused as in the named flavours."""
    dim, vocab_size, heads = hf["hidden_size"], hf["vocab_size"], hf["num_attention_heads"]

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=dim, eps=hf["rms_norm_eps"], param_init=INIT)

    rope = ComplexRoPE.Config(
        dim=dim // heads, max_seq_len=hf["max_position_embeddings"], theta=hf["rope_theta"], scaling="none"
    )
    layers = [
        Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=dim,
                n_heads=heads,
                n_kv_heads=hf["num_key_value_heads"],
                wqkv_param_init=INIT,
                wo_param_init=INIT,
                inner_attention=get_attention_config("flex"),
                fuse_qkv=True,
                rope=rope,
            ),
            feed_forward=make_ffn_config(
                dim=dim, hidden_dim=hf["intermediate_size"], w1_param_init=INIT, w2w3_param_init=INIT
            ),
        )
        for _ in range(hf["num_hidden_layers"])
    ]
    return Llama3Model.Config(
        dim=dim,
        vocab_size=vocab_size,
        enable_weight_tying=hf["tie_word_embeddings"],
        tok_embeddings=Embedding.Config(num_embeddings=vocab_size, embedding_dim=dim, param_init=INIT),
        norm=norm(),
        lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=INIT),
        layers=layers,
    )


@torch.inference_mode()
def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    config = model_config(json.loads((options.source / "config.json").read_text()))
    adapter_class = model_registry("8B").state_dict_adapter
    assert adapter_class is not None
    adapter = adapter_class(config, None)
    torch.set_default_dtype(getattr(torch, options.dtype))
    with torch.device("cpu"):
        model = ModelWrapper(config.build())
    torch.set_default_dtype(torch.float32)
    weights = adapter.to_hf(model._get_state_dict())
    dcp.load(weights, storage_reader=adapter.get_hf_storage_reader(str(options.source)))
    dcp.save(adapter.from_hf(weights), checkpoint_id=options.out)


if __name__ == "__main__":
    main()
