"""One rank of ``family_bench``: logits and gradients of a Hugging Face folder in megatron-core, by layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """``family_worker.py request.json``"""
    from megatron_syne.platform.base import select

    platform = select("cpu")
    import torch
    from safetensors.torch import save_file

    from megatron_syne.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
    from megatron_syne.models.config import resolve_model
    from megatron_syne.parallel.ranks import rank_info
    from megatron_syne.parallel.setup import (
        start_distributed,
        start_model_parallel,
        stop_distributed,
        stop_model_parallel,
    )
    from megatron_syne.preflight.facts import Facts
    from megatron_syne.preflight.rules import tensor_parallel_divides

    request = json.loads(Path(sys.argv[1]).read_text())
    tokens = torch.tensor(request["tokens"])
    info = rank_info()
    precision = PrecisionConfig(params_dtype="fp32")
    platform.start(info.local_rank, precision)
    start_distributed(platform, info, 120)
    for name, layout in request["layouts"].items():
        config = RunConfig(
            run_dir="unused",
            model=ModelConfig(hf_path=request["folder"]),
            parallel=ParallelConfig(**layout),
            precision=precision,
        )
        config.data.seq_length = tokens.shape[1] - 1
        model = resolve_model(config.model)
        assert not list(tensor_parallel_divides(Facts(config, model, info.world_size, "cpu")))
        start_model_parallel(config.parallel, seed=1)
        found = forward_and_backward(config, model, platform, request["folder"], tokens)
        if info.rank < config.parallel.tensor_model_parallel_size:
            save_file(found, Path(request["out"]) / f"{name}.{info.rank}.safetensors")
        stop_model_parallel()
    stop_distributed()


def forward_and_backward(config: Any, model: Any, platform: Any, folder: str, tokens: Any) -> dict[str, Any]:
    """This rank's gradients of the summed loss by the engine's names, and the whole ``logits``."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from megatron_syne.convert.weights import open_source
    from megatron_syne.models.gpt import build_model, load_weights, named_parameters

    [chunk] = build_model(config, model, platform)
    source = open_source(folder)
    source.check_model(model)
    load_weights([chunk], source.parameter)
    source.close()
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1])[None]
    with torch.no_grad():
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(chunk(inputs, positions, None))
    chunk(inputs, positions, None, labels=labels).sum().backward()
    found = {"logits": logits[:, :, : model.vocab_size].contiguous()}
    for name, parameter in named_parameters(chunk):
        gradient = parameter.grad
        if getattr(parameter, "sequence_parallel", False):  # as finalize_model_grads does
            torch.distributed.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        found[name] = gradient.contiguous()
    return found


if __name__ == "__main__":
    main()
