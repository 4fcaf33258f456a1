"""gloo on the CPU platform: one network thread for all groups of one rank, whose collectives are copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from launch.local import free_port

SCRIPT = """
import json, os, sys
from megatron_syne.platform.base import select
platform = select("cpu")
from megatron_syne.config.schema import ParallelConfig, PrecisionConfig
from megatron_syne.parallel.ranks import rank_info
from megatron_syne.parallel.setup import start_distributed, start_model_parallel, stop_distributed
platform.start(0, PrecisionConfig())
start_distributed(platform, rank_info(), 60)
start_model_parallel(ParallelConfig(), 1)
import torch
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer as buffers
group = parallel_state.get_data_parallel_group()
source = torch.arange(4.0)
gathered, reduced = torch.zeros(4), torch.zeros(4)
handles = [
    buffers.dist_all_gather_func(gathered, source, group=group, async_op=False),
    buffers.dist_reduce_scatter_func(reduced, source, op=torch.distributed.ReduceOp.SUM, group=group),
]
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
summed = torch.ones(3)
torch.distributed.all_reduce(summed, group=group)
print(json.dumps({
    "gathered": gathered.tolist(), "reduced": reduced.tolist(), "summed": summed.tolist(),
    "handles": [handle is None for handle in handles], "loops": sum(name.startswith("gloo") for name in names),
    "groups": len(parallel_state._global_process_group_list),
}))
stop_distributed()
"""


def test_groups_share_a_network_thread_and_one_rank_copies() -> None:
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gathered"] == found["reduced"] == [0.0, 1.0, 2.0, 3.0]
    assert found["handles"] == [True, True], "nothing to wait for"
    assert found["summed"] == [1.0, 1.0, 1.0]
    assert found["groups"] > 5
    assert found["loops"] == 1
