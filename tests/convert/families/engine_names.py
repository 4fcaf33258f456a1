"""Run by test_family_names.py: parameter names and shapes of what megatron-core builds, as JSON on stdout.

torch's ``fake`` process group makes one process believe to be any rank of any world; nothing is sent.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from megatron_syne.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_syne.platform.base import select


def shapes(rank: int, world_size: int, config: RunConfig, platform: Any) -> dict[str, list[int]]:
    """``{name: shape}`` of one rank, layers numbered over the whole model."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_syne.models.gpt import build_model, named_parameters
    from megatron_syne.parallel.setup import start_model_parallel, stop_model_parallel

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    start_model_parallel(config.parallel, seed=1)
    chunks = build_model(config, config.model, platform)
    found = {name: list(p.shape) for chunk in chunks for name, p in named_parameters(chunk)}
    stop_model_parallel()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    platform = select("cpu")
    platform.start(0, RunConfig().precision)
    from megatron_syne.parallel.topology import world_size_of

    answers = []
    for case in json.loads(sys.argv[1]):
        config = RunConfig(
            run_dir="unused",
            platform="cpu",
            model=ModelConfig(**case["model"]),
            parallel=ParallelConfig(**case["parallel"]),
        )
        config.data.seq_length = 16
        world = world_size_of(config.parallel)
        answers.append([shapes(rank, world, config, platform) for rank in range(world)])
    print("ANSWER " + json.dumps(answers))
