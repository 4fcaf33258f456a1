"""Train: ``python -m megatron_syne.train --config run.yaml [section.option=value ...] [--dry-run]``.

One process per rank; start them with ``launch/local.sh run.yaml`` (one machine) or ``launch/slurm.py``.
``assembly`` puts the rooms together.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_syne.assembly import each_leg, open_inputs
from megatron_syne.command_line import Parser
from megatron_syne.config.loader import load_config, save_resolved
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.errors import (
    EXIT_OK,
    EXIT_REQUEUE,
    PeerFailed,
    StoppedCleanly,
    SyneError,
    exit_code_of,
    run_cli,
)
from megatron_syne.models.config import resolve_model
from megatron_syne.parallel.ranks import RankInfo, rank_info
from megatron_syne.parallel.topology import world_size_of
from megatron_syne.platform.base import Platform, resolve_name, select
from megatron_syne.preflight.report import dry_run_report
from megatron_syne.preflight.rules import check
from megatron_syne.resilience.signals import StopOnSignal

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says in the survivors of a rank that died; their tracebacks tell nothing about the cause."""


def main(argv: list[str] | None = None) -> int:
    """Parse, check, then show the plan or train. Returns 0 when training is complete."""
    parser = Parser(prog="megatron_syne.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.option=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="show configuration, rank grid and plan; start nothing"
    )
    parser.add_argument("--help-config", action="store_true", help="list every option with its meaning")
    arguments = parser.parse_args(argv)
    if arguments.help_config:
        from megatron_syne.config.describe import describe_schema

        print(describe_schema())
        return 0
    if not arguments.config:
        parser.error("--config is required")
    config = load_config(arguments.config, arguments.overrides)
    model = resolve_model(config.model)
    platform = resolve_name(config.platform)
    if arguments.dry_run:
        check(config, model, world_size_of(config.parallel), platform)
        print(dry_run_report(config, model, platform))
        return 0
    info = rank_info()
    check(config, model, info.world_size, platform)
    stop = StopOnSignal(config.resilience.exit_signals)  # early: a signal while starting must not be lost
    chosen = select(config.platform)
    open_inputs(config, model)
    return run(config, model, chosen, info, stop)


def run(config: RunConfig, model: ModelConfig, platform: Platform, info: RankInfo, stop: StopOnSignal) -> int:
    """A whole run on this rank. Rank 0 holds the run folder's lock; ``last_exit.json`` tells how it ended."""
    from megatron_syne.parallel.setup import stop_distributed
    from megatron_syne.resilience.exit_record import ExitRecord
    from megatron_syne.resilience.run_lock import RunLock

    run_dir = Path(config.run_dir)
    lock, record = RunLock(run_dir), ExitRecord(run_dir, info.rank)
    if info.rank == 0:
        lock.acquire()
        record.forget()
        save_resolved(config, run_dir / "config.yaml")
    trainer = None
    try:
        for trainer in each_leg(config, model, platform, info):
            trainer.callbacks = [stop, *trainer.callbacks]
            trainer.fit()
        assert trainer is not None
        step, complete = trainer.state.step, trainer.complete
        if info.rank == 0:
            record.write(EXIT_OK if complete else EXIT_REQUEUE, step)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        known = isinstance(error, SyneError)
        first = record.claim(exit_code_of(error), trainer.state.step if trainer else -1, met_alike=known)
        if not known and not first:
            raise PeerFailed("another rank failed first") from None
        if any(words in str(error) for words in LOST_PEER):
            error = PeerFailed(
                f"another rank is gone, killed or lost with its node ({str(error).splitlines()[0]})"
            )
        error.this_rank_only = first  # type: ignore[attr-defined]
        raise error
    finally:
        if trainer is not None:
            trainer.train_data.close()
        lock.release()
    stop_distributed()
    if not complete:
        raise StoppedCleanly(
            f"{trainer.stop_reason} at step {step} of {trainer.train_iters}; "
            "everything is saved, start the same command again to go on"
        )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_cli(main))
