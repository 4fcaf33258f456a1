"""Save and load weights, optimizer and counters as megatron-core's ``torch_dist``, in any layout."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_syne.checkpoint import folder as folders
from megatron_syne.checkpoint.fp8_state import sharded_fp8_state, without_extra_state
from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import ConfigError, DataError, IOFault
from megatron_syne.fp8.layers import Fp8Layers
from megatron_syne.models.gpt import unwrap
from megatron_syne.training.state import TrainState


class CheckpointManager:
    """Checkpoints of one run below ``root``. Every method must be called by all ranks."""

    def __init__(self, root: Path, artifacts: Path | None, keep_latest: int = 3) -> None:
        """``artifacts``: folder with config.json and tokenizer, copied into each checkpoint (under ``hf/``) so
        that a checkpoint can be exported wherever it is taken."""
        self.root = root
        self.artifacts = artifacts
        self.keep_latest = keep_latest

    def save(
        self,
        chunks: list[Any],
        optimizer: Any,
        state: TrainState,
        run: dict[str, Any],
        fp8: Fp8Layers | None = None,
    ) -> Path:
        """Write the checkpoint of ``state.step``; returns its folder once it is complete on disk.

        ``run``: plain values kept beside the state (model configuration, ledger of the data, layout).
        """
        final = folders.checkpoint_path(self.root, state.step)
        temporary = final.with_name(final.name + ".tmp")
        self._on_rank_0(lambda: self._make(temporary))
        from megatron.core import dist_checkpointing

        sharded = sharded_state(chunks, optimizer, is_loading=False, fp8=fp8)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dist_checkpointing.save(sharded, str(temporary))
        except (CheckpointException, OSError) as error:
            # All ranks come here together: the engine has them agree on failures before it raises.
            # torch's writer may hide "no space left" behind an error of its own, so the space is told too.
            fault = self._cannot_write(
                f"{_cause(error)} ({shutil.disk_usage(self.root).free:,} bytes free there)"
            )
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # its bytes may be what the disk lacks
            raise fault from None
        dist.barrier()
        self._on_rank_0(lambda: self._finish(temporary, final, state, run))
        return final

    def newest(self) -> Path | None:
        """Newest whole checkpoint; all ranks get rank 0's answer."""
        found = [folders.newest(self.root)] if dist.get_rank() == 0 else [None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _make(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _finish(self, temporary: Path, final: Path, state: TrainState, run: dict[str, Any]) -> None:
        (temporary / "state.json").write_text(json.dumps({"state": state.to_dict(), **run}, indent=1) + "\n")
        if self.artifacts is not None:
            shutil.copytree(self.artifacts, temporary / "hf")
        folders.seal(temporary, {"step": state.step})
        folders.publish(temporary, final)
        folders.clean(self.root, self.keep_latest)

    def _on_rank_0(self, action: Any) -> None:
        """Do something on rank 0 only; a failure becomes the same IOFault on every rank."""
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure[0] = f"{error.strerror or error}: {error.filename or self.root}"
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise self._cannot_write(failure[0])

    def _cannot_write(self, cause: str) -> IOFault:
        return IOFault(
            f"{self.root}: cannot write a checkpoint: {cause}; the earlier ones are kept. Free space, or check the "
            "disk, and start the same command again"
        )


def _chunk_key(chunks: list[Any], index: int) -> str:
    """Name of a model chunk in the state dict, as Megatron-LM has it."""
    return "model" if len(chunks) == 1 else f"model{index}"


def sharded_state(
    chunks: list[Any], optimizer: Any | None, is_loading: bool, fp8: Fp8Layers | None = None
) -> dict[str, Any]:
    """megatron-core's sharded state dict of model and, where given, optimizer.

    ``fully_reshardable``: optimizer state as whole tensors, so that TP, PP and DP may all change.
    """
    from megatron.core import parallel_state

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {
        _chunk_key(chunks, index): without_extra_state(unwrap(chunk).sharded_state_dict(metadata=metadata))
        for index, chunk in enumerate(chunks)
    }
    if fp8 is not None:
        state["fp8"] = sharded_fp8_state(fp8)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _cause(error: BaseException) -> str:
    """The last line of what torch gathered from all ranks: the error itself, below its tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "Errno" in line]
    return (errors or lines or [type(error).__name__])[-1] if not isinstance(error, OSError) else str(error)


def load(path: Path, chunks: list[Any], optimizer: Any | None, fp8: Fp8Layers | None = None) -> TrainState:
    """Load weights and, where ``optimizer`` is given, its state and the run's counters; any layout.

    Without an optimizer only the weights are taken (starting another run) and a fresh state is returned.
    """
    from megatron.core import dist_checkpointing

    folders.read_manifest(path)
    folders.read_metadata(path)
    sharded = sharded_state(chunks, optimizer, is_loading=True, fp8=fp8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = dist_checkpointing.load(sharded, str(path))
    except CheckpointException as error:
        raise DataError(
            f"{path}: damaged, it cannot be loaded: {_cause(error)}. Move it away to go on from the one before"
        ) from None
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[_chunk_key(chunks, index)], strict=True)
    if optimizer is None:
        return TrainState()
    optimizer.load_state_dict(loaded["optimizer"])
    return TrainState.from_dict(folders.read_run(path)["state"])


def read_ledger(path: Path) -> tuple[dict[str, Any], int, int]:
    """(account of the data read so far, samples consumed, step) of the checkpoint that a run goes on from.

    ConfigError for a checkpoint from before there was this account, which kept a fingerprint in its place.
    """
    run = folders.read_run(path)
    if "data" not in run:
        raise ConfigError(
            f"{path} was written before checkpoints kept an account of the data read, and its order of samples "
            "is not today's: it cannot be gone on from. Start a new run_dir with checkpoint.initialize_from set "
            "to it (its weights alone are taken), or finish the run with the version that wrote it"
        )
    return run["data"], int(run["state"]["consumed_samples"]), int(run["state"]["step"])


def check_same_model(path: Path, model: ModelConfig) -> None:
    """Refuse a checkpoint of another architecture, naming every field that differs."""
    stored = folders.read_run(path)["model"]
    differing = [
        f"{name}: checkpoint {stored[name]!r}, configuration {value!r}"
        for name, value in asdict(model).items()
        if name not in ("hf_path", "preset") and stored.get(name) != value
    ]
    if differing:
        raise ConfigError(
            f"{path} holds another model: {'; '.join(differing)}. Restore the model section, or start a new "
            "run_dir with other weights"
        )
