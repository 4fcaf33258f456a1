"""Start torch.distributed and megatron-core's process groups, and take them down."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch.distributed as dist

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.errors import ConfigError
from megatron_syne.platform.base import Platform


@dataclass(frozen=True)
class RankInfo:
    """This process among all: from torchrun's or our launcher's variables, or from Slurm's."""

    rank: int
    world_size: int
    local_rank: int


def rank_info() -> RankInfo:
    """Read RANK/WORLD_SIZE/LOCAL_RANK; where they are not set SLURM_PROCID/NTASKS/LOCALID inside an srun
    step; otherwise one process."""
    env = os.environ
    if "RANK" in env:
        return RankInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return RankInfo(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"]))
    return RankInfo(0, 1, 0)


def start_distributed(platform: Platform, info: RankInfo, timeout_seconds: int) -> None:
    """Join the world over ``MASTER_ADDR``:``MASTER_PORT`` (one process alone needs neither)."""
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if info.world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()
        dist.init_process_group(platform.backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"{info.world_size} processes, but {name} is not set: start through launch/local.sh, "
                "launch/slurm.py or torchrun"
            )
    dist.init_process_group(
        platform.backend, rank=info.rank, world_size=info.world_size, timeout=timeout, init_method="env://"
    )


def start_model_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Build megatron-core's groups and its random state for this layout; all ranks must call."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        # gloo is the backend itself, or not wanted beside nccl: the optimizer is told so too
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def stop_model_parallel() -> None:
    """Forget the layout; the processes can then build another one."""
    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    destroy_rerun_state_machine()


def stop_distributed() -> None:
    """Leave the world. Not called after an error: peers may be gone, and leaving would wait for them."""
    if dist.is_initialized():
        dist.destroy_process_group()
