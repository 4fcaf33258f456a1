"""Which process among all this one is, from the environment its starter set. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class RankInfo:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int


def rank_info() -> RankInfo:
    """Read RANK/WORLD_SIZE/LOCAL_RANK (our local launcher, torchrun); where they are not set
    SLURM_PROCID/NTASKS/LOCALID inside an srun step; otherwise one process alone."""
    env = os.environ
    if "RANK" in env:
        return RankInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return RankInfo(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"]))
    return RankInfo(0, 1, 0)
