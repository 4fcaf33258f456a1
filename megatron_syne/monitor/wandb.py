"""A run on Weights & Biases, where ``monitor.wandb_project`` asks for it: on rank 0 alone, imported only then.

Only figures and the configuration (with its paths, without the launch section) go there: no code, no output of the
console, nothing of the machine, its environment or the repository. The run keeps its id in the run folder and goes on
under it. Key, server and ``WANDB_MODE`` are the package's own environment. Once begun, nothing that goes wrong with it
ends the training.

Every record has its ``step`` among its values, over which the curves are drawn; the service's own step only counts
records: it drops what is sent for a step that it believes to be over, as are an evaluation made up for on resume and
the steps that a killed run repeats.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.monitor.step import fp8_events, is_due, is_per_layer, stage_number, tell, tokens_read
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.monitor.description import Plain
    from megatron_syne.training.trainer import Trainer

ID_FILE = "wandb_id"
"""In the run folder."""


def require_wandb(config: RunConfig) -> None:
    """Raises ConfigError where the run asks for Weights & Biases and the package is not installed."""
    project = config.monitor.wandb_project
    found = find_spec("wandb") if project is not None else None
    # a folder of that name, as the package itself leaves them, is found as well, but has no file
    if project is not None and (found is None or found.origin is None):
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
        self._send(lambda run: run.define_metric("step"))
        self._send(lambda run: run.define_metric("*", step_metric="step"))

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """The step's metrics, and what fell back from FP8 in it."""
        if not is_due(trainer, metrics):
            return
        values = {name: value for name, value in metrics.items() if not is_per_layer(name)}
        values |= {**tokens_read(trainer), "stage_number": stage_number(trainer)}
        self._log(trainer.state.step, values)
        for event in fp8_events(trainer):
            reason = event["reason"]
            self._send(lambda run, reason=reason: run.alert(title="FP8 fell back to bf16", text=reason))

    def on_evaluation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """``validation/<source>``."""
        self._log(trainer.state.step, {f"validation/{name}": loss for name, loss in losses.items()})

    def on_harness(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """``harness/<task>/<metric>``, at the checkpoint's step."""
        self._log(step, {f"harness/{name}": value for name, value in metrics.items()})

    def on_train_end(self, trainer: Trainer) -> None:
        """Send the rest."""
        self._send(lambda run: run.finish())

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Marked as failed there."""
        self._send(lambda run: run.finish(exit_code=1))

    def own_id(self) -> str:
        """The id of this run folder, made once."""
        path = self.run_dir / ID_FILE
        if not path.exists():
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(secrets.token_hex(4) + "\n")
            temporary.replace(path)
        return path.read_text().strip()

    def _log(self, step: int, values: dict[str, float]) -> None:
        self._send(lambda run: run.log({"step": step, **values}))

    def _send(self, what: Callable[[Any], object]) -> None:
        """Do something with the run; where that fails (its service is gone, the disk is full) this is the last."""
        if self.run is None:
            return
        try:
            what(self.run)
        except Exception as error:  # whatever it is, the training is worth more
            self.run = None
            tell(f"Weights & Biases: {error}; nothing more is logged there")
