"""Start torch.distributed and megatron-core's process groups, and take them down."""

from __future__ import annotations

import datetime
import gc
import os
import socket

import torch
import torch.distributed as dist

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.errors import ConfigError
from megatron_syne.parallel.ranks import RankInfo
from megatron_syne.platform.base import Platform


def start_distributed(platform: Platform, info: RankInfo, timeout_seconds: int) -> None:
    """Join the world over ``MASTER_ADDR``:``MASTER_PORT`` (one process alone needs neither)."""
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if info.world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(
            platform.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"{info.world_size} processes, but {name} is not set: start through launch/local.sh, "
                "launch/slurm.py or torchrun"
            )
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store = _meet(address, int(port), info, timeout)
        dist.init_process_group(
            platform.backend, store=store, rank=info.rank, world_size=info.world_size, timeout=timeout
        )
    except (OSError, dist.DistNetworkError, dist.DistStoreError) as error:
        raise ConfigError(
            f"rank {info.rank} of {info.world_size} could not meet the others at {address}:{port} "
            f"(MASTER_ADDR:MASTER_PORT): {str(error).splitlines()[0]}. Is the port free on that host, does the "
            "name resolve, and were all ranks started?"
        ) from None


def _meet(address: str, port: int, info: RankInfo, timeout: datetime.timedelta) -> dist.Store:
    """torch's TCPStore; on a loopback address it listens there alone (torch's own would on every interface).

    Below torchrun its agent holds the store already, at this very address.
    """
    listener = None
    hosts = info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if hosts and address in ("127.0.0.1", "localhost"):
        with socket.create_server(("127.0.0.1", port), backlog=2048) as server:
            listener = server.detach()
    return dist.TCPStore(address, port, info.world_size, hosts, timeout, master_listen_fd=listener)


def start_model_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Build megatron-core's groups and its random state for this layout; all ranks must call.

    Nothing where they are there already: the leg of a run that goes on in the same processes keeps them.
    """
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        # gloo is the backend itself, or not wanted beside nccl: the optimizer is told so too
        create_gloo_process_groups=False,
    )
    # Stages must differ, or their layers would start with the same weights; replicas must not (megatron's rule).
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def stop_model_parallel() -> None:
    """Take down the layout's groups; the processes can then build another one. All ranks must call.

    megatron-core only forgets its groups: each gloo one would keep its threads, dozens for every layout.
    """
    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine

    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    dist.barrier()  # a peer may still be in one
    parallel_state.destroy_model_parallel()
    while groups:
        dist.destroy_process_group(groups.pop())
    gc.collect()  # a model that was let go of points at itself, and at its groups
    parallel_state.destroy_global_memory_buffer()
    destroy_rerun_state_machine()


def stop_distributed() -> None:
    """Leave the world. Not called after an error: peers may be gone, and leaving would wait for them."""
    if dist.is_initialized():
        dist.destroy_process_group()
