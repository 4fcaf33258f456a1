"""Run by test_topology.py: what megatron-core itself builds for each layout, as JSON on stdout.

torch's ``fake`` process group makes one process believe to be any rank of any world; nothing is sent.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from megatron_syne.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_syne.platform.base import select


def build(rank: int, world_size: int, config: RunConfig, platform: Any) -> dict[str, Any]:
    """Coordinates, global layer numbers of each chunk and number of parameters of one rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state as groups
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_syne.models.gpt import build_model, unwrap
    from megatron_syne.parallel.setup import start_model_parallel, stop_model_parallel

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    start_model_parallel(config.parallel, seed=1)
    chunks = [unwrap(chunk) for chunk in build_model(config, config.model, platform)]
    found = {
        "coordinates": [
            groups.get_tensor_model_parallel_rank(),
            groups.get_context_parallel_rank(),
            groups.get_data_parallel_rank(),
            groups.get_pipeline_model_parallel_rank(),
        ],
        "layers": [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in chunks],
        "parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters()),
    }
    stop_model_parallel()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    platform = select("cpu")
    platform.start(0, RunConfig().precision)
    answers = []
    for case in json.loads(sys.argv[1]):
        config = RunConfig(
            run_dir="unused",
            platform="cpu",
            model=ModelConfig(**case["model"]),
            parallel=ParallelConfig(**case["parallel"]),
        )
        config.data.seq_length = 16
        world = case["world_size"]
        answers.append([build(rank, world, config, platform) for rank in range(world)])
    print("ANSWER " + json.dumps(answers))
