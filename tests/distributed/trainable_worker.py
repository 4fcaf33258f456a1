"""``worker.py``, and of each job what every rank has of the optimizer: written to ``facts.json`` by rank 0.

Per job and rank: bytes of the optimizer's own tensors (moments, and master weights that are not the weights), its
groups, and the names of what trains; and whether weights that do not train are bit-equal after training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from megatron_syne.platform.base import select

    select("cpu")
    import torch.distributed as dist

    from distributed import worker
    from megatron_syne.checkpoint import manager
    from megatron_syne.training.param_groups import canonical_parameters
    from megatron_syne.training.trainer import Trainer

    jobs_file, facts = Path(sys.argv[1]), []
    fit, load = Trainer.fit, manager.load

    def load_and_reset(path: Path, chunks, optimizer, fp8=None, reset_optimizer=False):
        """A run whose folder is called so begins with new moments whenever it goes on."""
        return load(path, chunks, optimizer, fp8, reset_optimizer or path.parts[-3].endswith("reset"))

    def fit_and_tell(trainer: Trainer) -> None:
        own = canonical_parameters(trainer.chunks)
        before = {name: parameter.detach().clone() for name, parameter in own}
        fit(trainer)
        optimizer = trainer.optimizer
        tensors = [
            t for state in optimizer.chained_optimizers for s in state.state.values() for t in s.values()
        ]
        mine = {
            "bytes": sum(t.numel() * t.element_size() for t in tensors),
            "groups": [
                {**{k: group[k] for k in ("lr_mult", "wd_mult", "lr", "weight_decay", "step")},
                 "count": len(group["params"])}
                for group in optimizer.param_groups
            ],
            "trains": {name: p.numel() for name, p in own if p.requires_grad},
            "changed": [name for name, p in own if not p.detach().equal(before[name])],
            "names": [name for name, _ in own],
        }  # fmt: skip
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        facts.append(everyone)

    Trainer.fit, manager.load = fit_and_tell, load_and_reset
    worker.main()
    names = [job["name"] for job in json.loads(jobs_file.read_text())]
    if (jobs_file.with_name("results.json")).exists():
        jobs_file.with_name("facts.json").write_text(json.dumps(dict(zip(names, facts, strict=True))))


if __name__ == "__main__":  # checkpoint saving starts helper processes that import this file again
    main()
