"""litgpt's conversion of a Hugging Face folder to ``lit_model.pth``: ``litgpt_import.py SOURCE OUT``.

The call is that of ``litgpt convert_to_litgpt``. litgpt writes into the folder that it reads, so the source's
files are linked into OUT; and it knows named models only, so the config of ``config.json`` is added to its table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from litgpt.config import name_to_config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

NAME = "Llama-3-benchmark"


def model_config(hf: dict[str, Any]) -> dict[str, Any]:
    """The litgpt config of a plain Llama-3 ``config.json``, with the keys of litgpt's own Llama-3 entries."""
    return {
        "name": NAME,
        "hf_config": {},
        "block_size": hf["max_position_embeddings"],
        "vocab_size": hf["vocab_size"],
        "padded_vocab_size": hf["vocab_size"],
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_embd": hf["hidden_size"],
        "n_query_groups": hf["num_key_value_heads"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": hf["rms_norm_eps"],
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": hf["intermediate_size"],
        "rope_base": int(hf["rope_theta"]),
    }


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    name_to_config[NAME] = model_config(json.loads((options.source / "config.json").read_text()))
    options.out.mkdir(parents=True)
    for file in options.source.resolve().iterdir():
        (options.out / file.name).symlink_to(file)
    convert_hf_checkpoint(options.out, model_name=NAME)


if __name__ == "__main__":
    main()
