"""Train a configuration on CUDA: ``fp8_state_worker.py folder run.yaml overrides...``

Leaves the FP8 state and the record of the guard as they were before the first step in ``<folder>/start.pt`` and
after the last in ``<folder>/end.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    folder, config_file, *overrides = sys.argv[1:]
    from megatron_syne.platform.base import select

    platform = select("cuda")
    import torch

    from megatron_syne.assembly import build_trainer
    from megatron_syne.config.loader import load_config
    from megatron_syne.models.config import resolve_model
    from megatron_syne.parallel.ranks import rank_info
    from megatron_syne.training.callback import Callback

    class Keep(Callback):
        def on_train_start(self, trainer) -> None:
            self.keep(trainer, "start.pt")

        def on_train_end(self, trainer) -> None:
            self.keep(trainer, "end.pt")

        def keep(self, trainer, name: str) -> None:
            state = {key: value.cpu() for key, value in trainer.fp8.state().items()}
            Path(folder).mkdir(parents=True, exist_ok=True)
            torch.save({"state": state, "bf16_layers": sorted(trainer.fp8.bf16_layers)}, Path(folder) / name)

    config = load_config(config_file, overrides)
    trainer = build_trainer(config, resolve_model(config.model), platform, rank_info())
    trainer.callbacks = [*trainer.callbacks, Keep()]
    trainer.fit()


if __name__ == "__main__":
    main()
