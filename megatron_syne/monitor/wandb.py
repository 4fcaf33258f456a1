"""A run on Weights & Biases, where ``monitor.wandb_project`` asks for it: on rank 0 alone, imported only then.

Only figures and options go there: no code, no output of the console, nothing of the machine, its environment or
the repository. The run keeps its id in the run folder and goes on under it. Key, server and ``WANDB_MODE`` are the
package's own environment.
"""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.monitor.step import fp8_events, is_due, is_per_layer, stage_number, tokens_read
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.monitor.description import Plain
    from megatron_syne.training.trainer import Trainer

ID_FILE = "wandb_id"
"""In the run folder."""


def require_wandb(config: RunConfig) -> None:
    """Raises ConfigError where the run asks for Weights & Biases and the package is not installed."""
    project = config.monitor.wandb_project
    if project is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"monitor.wandb_project = {project}: the package wandb is not installed on this machine: "
            "pip install wandb, or set monitor.wandb_project=null"
        )


class WandbRun(Callback):
    """The figures of ``metrics.jsonl`` under the same names."""

    def __init__(self, config: RunConfig, run_dir: Path, options: dict[str, Plain]) -> None:
        """``options``: hyper-parameters."""
        self.project, self.name = (
            config.monitor.wandb_project,
            config.monitor.wandb_name or run_dir.resolve().name,
        )
        self.run_dir, self.options = run_dir, options
        self.run: Any = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Begin, or go on; ConfigError where the service refuses (no key, no such project, no network)."""
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        try:
            self.run = wandb.init(
                project=self.project,
                name=self.name,
                id=self.own_id(),
                resume="allow",
                dir=str(self.run_dir),
                config=dict(self.options),
                settings=settings,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"monitor.wandb_project = {self.project}: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        # what the harness finds for an earlier step must not wait for the present one
        self.run.define_metric("harness/step")
        self.run.define_metric("harness/*", step_metric="harness/step")

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """The step's metrics; a resumed run repeats steps to the bit, and the service drops what it has."""
        if not is_due(trainer, metrics):
            return
        values = {name: value for name, value in metrics.items() if not is_per_layer(name)}
        values |= {**tokens_read(trainer), "stage_number": stage_number(trainer)}
        self.run.log(values, step=trainer.state.step)
        for event in fp8_events(trainer):
            self.run.alert(title="FP8 fell back to bf16", text=event["reason"])

    def on_evaluation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """``validation/<source>``."""
        values = {f"validation/{name}": loss for name, loss in losses.items()}
        self.run.log(values, step=trainer.state.step)

    def on_harness(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """``harness/<task>/<metric>`` over ``harness/step``."""
        values = {f"harness/{name}": value for name, value in metrics.items()}
        self.run.log({"harness/step": step, **values})

    def on_train_end(self, trainer: Trainer) -> None:
        """Send the rest."""
        self.run.finish()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Marked as failed there."""
        if self.run is not None:
            self.run.finish(exit_code=1)

    def own_id(self) -> str:
        """The id of this run folder, made once."""
        path = self.run_dir / ID_FILE
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n")
        return path.read_text().strip()
