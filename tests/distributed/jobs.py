"""What the ranks of a bench share: jobs, each a configuration with overrides, one layout after another."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def each_job() -> Iterator[tuple[dict[str, Any], Any, Any, Any]]:
    """(job, configuration, model, platform) of every job in the file ``sys.argv[1]``, its process groups up.

    To be begun before torch is imported: the platform comes first.
    """
    from megatron_syne.platform.base import select

    platform = select("cpu")
    from megatron_syne.config.loader import load_config
    from megatron_syne.models.config import resolve_model
    from megatron_syne.parallel.ranks import rank_info
    from megatron_syne.parallel.setup import (
        start_distributed,
        start_model_parallel,
        stop_distributed,
        stop_model_parallel,
    )
    from megatron_syne.preflight.rules import check

    info = rank_info()
    jobs = json.loads(Path(sys.argv[1]).read_text())
    platform.start(info.local_rank, load_config(jobs[0]["config"]).precision)
    start_distributed(platform, info, 120)
    for job in jobs:
        config = load_config(job["config"], job["overrides"])
        model = resolve_model(config.model)
        check(config, model, info.world_size, "cpu")
        start_model_parallel(config.parallel, config.train.seed)
        yield job, config, model, platform
        stop_model_parallel()
    stop_distributed()


def leave_results(jobs_file: Path, results: Any) -> None:
    """Write ``results.json`` beside the jobs, whole or not at all."""
    target = jobs_file.with_name("results.json")
    target.with_suffix(".tmp").write_text(json.dumps(results))
    target.with_suffix(".tmp").replace(target)
