"""Save and load weights, optimizer and counters as megatron-core's ``torch_dist``, in any layout."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_syne.checkpoint import folder as folders
from megatron_syne.checkpoint import optimizer_state
from megatron_syne.checkpoint.background import HostCopies
from megatron_syne.checkpoint.capture import Keep, address, sharded_optimizer_state
from megatron_syne.checkpoint.fp8_state import (
    holds_fp8_state,
    sharded_fp8_state,
    wanted_fp8_state,
    with_empty_extra_state,
    without_extra_state,
)
from megatron_syne.checkpoint.pending import PendingSave
from megatron_syne.errors import DataError, IOFault
from megatron_syne.fp8.layers import Fp8Layers
from megatron_syne.models.gpt import keep_full_precision, unwrap
from megatron_syne.training.state import TrainState


class CheckpointManager:
    """Checkpoints of one run below ``root``, one at a time. Every method but :meth:`abandon` must be called by all
    ranks."""

    def __init__(self, root: Path, artifacts: Path | None, keep_latest: int = 3) -> None:
        """``artifacts``: folder with config.json and tokenizer, copied into each checkpoint (under ``hf/``) so
        that a checkpoint can be exported wherever it is taken."""
        self.root = root
        self.artifacts = artifacts
        self.keep_latest = keep_latest
        self.pending: PendingSave | None = None
        self._final = root

    def begin(
        self,
        chunks: list[Any],
        optimizer: Any,
        state: TrainState,
        run: dict[str, Any],
        fp8: Fp8Layers | None = None,
        copies: HostCopies | None = None,
    ) -> None:
        """Begin to write the checkpoint of ``state.step``; :meth:`finish` or :meth:`progress` must follow.

        ``run``: plain values kept beside the state (model configuration, ledger of the data, layout). ``copies``:
        where values are copied to; without, nothing may change before :meth:`finish`.
        """
        assert self.pending is None
        self._final = final = folders.checkpoint_path(self.root, state.step)
        temporary = self._temporary
        text = json.dumps({"state": state.to_dict(), **run}, indent=1) + "\n"
        self._on_rank_0(lambda: self._make(temporary))
        private: set[int] = set()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept = tensor if tensor.is_cpu else copies.copy(tensor) if copies is not None else tensor.cpu()
            private.add(address(kept))
            return kept

        if copies is not None:
            copies.begin()
        sharded = sharded_state(chunks, optimizer, fp8, keep)
        try:
            self.pending = PendingSave(
                sharded, temporary, copies, private, lambda: self._complete(temporary, final, text)
            )
        except (CheckpointException, OSError) as error:
            raise self._failed(error) from None

    def finish(self) -> Path:
        """Wait for the checkpoint begun; its folder, complete on disk. IOFault on all ranks where one cannot write."""
        while True:
            path = self._advance()
            if path is not None:
                return path

    def progress(self, device: torch.device) -> Path | None:
        """Without waiting for the disk: the folder of the checkpoint begun once it is complete, None before.

        One number is reduced over the world while a checkpoint is being written. IOFault as :meth:`finish`.
        """
        if self.pending is None:
            return None
        ended = torch.tensor(int(self.pending.ended), dtype=torch.int32, device=device)
        dist.all_reduce(ended, op=dist.ReduceOp.MIN)
        return self._advance() if ended.item() else None

    def abandon(self) -> str | None:
        """After an error, on this rank alone: stop writing. What was not finished, in words; the folder's name says
        that it is not a checkpoint, and the next save removes it."""
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        pending.abandon()
        return None if self._final.exists() else f"{self._temporary.name} was not finished"

    def _advance(self) -> Path | None:
        assert self.pending is not None
        try:
            complete = self.pending.advance()
        except (CheckpointException, OSError) as error:
            # All ranks come here together (but see PendingSave.advance)
            self.pending = None
            raise self._failed(error) from None
        if not complete:
            return None
        self.pending = None
        return self._final

    @property
    def _temporary(self) -> Path:
        return self._final.with_name(self._final.name + ".tmp")

    def _failed(self, error: BaseException) -> IOFault:
        """The same on all ranks, and its bytes away: they may be what the disk lacks.

        torch's writer may hide "no space left" behind an error of its own, so the space is told too.
        """
        if isinstance(error, OSError):
            cause = f"{error.strerror or error}: {error.filename or self.root}"
        else:
            cause = _cause(error)
        free = shutil.disk_usage(self.root).free
        if dist.get_rank() == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)
        return self._cannot_write(f"{cause} ({free:,} bytes free there)")

    def newest(self) -> Path | None:
        """Newest whole checkpoint; all ranks get rank 0's answer."""
        found = [folders.newest(self.root)] if dist.get_rank() == 0 else [None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _make(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _complete(self, temporary: Path, final: Path, text: str) -> None:
        (temporary / "state.json").write_text(text)
        if self.artifacts is not None:
            shutil.copytree(self.artifacts, temporary / "hf")
        folders.seal(temporary, {"step": folders.step_of(final)})
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


def _metadata(per_layer: bool) -> dict[str, Any]:
    """What the engine is told of the format.

    ``fully_reshardable``: optimizer state as whole tensors, so that TP, PP and DP may all change.
    """
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "non_homogeneous_layers": per_layer,
    }


def _chunk_keys(chunks: list[Any]) -> list[str]:
    """Names of the model chunks in the state dict, as Megatron-LM has them."""
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def model_state(chunks: list[Any], per_layer: bool = False) -> dict[str, Any]:
    """megatron-core's sharded state dict of the weights; ``per_layer``: with a key for each layer."""
    state = {}
    for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True):
        model: Any = unwrap(chunk)
        state[key] = without_extra_state(model.sharded_state_dict(metadata=_metadata(per_layer)))
    return state


def sharded_state(chunks: list[Any], optimizer: Any, fp8: Fp8Layers | None, keep: Keep) -> dict[str, Any]:
    """megatron-core's sharded state dict of model and optimizer, for saving; all ranks must call.

    ``keep``: see ``capture``.
    """
    optimizer_state.agree_on_step(optimizer)
    state = model_state(chunks)
    per_layer = optimizer_state.anything_frozen(chunks)
    named = model_state(chunks, per_layer) if per_layer else state
    state["optimizer"] = sharded_optimizer_state(optimizer, named, _metadata(per_layer), keep)
    if fp8 is not None:
        state["fp8"] = sharded_fp8_state(fp8)
    return state


def _cause(error: BaseException) -> str:
    """The last line of what torch gathered from all ranks: the error itself, below its tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "Errno" in line]
    return (errors or lines or [type(error).__name__])[-1] if not isinstance(error, OSError) else str(error)


def load(
    path: Path,
    chunks: list[Any],
    optimizer: Any | None,
    fp8: Fp8Layers | None = None,
    reset_optimizer: bool = False,
) -> TrainState:
    """Load weights and, where ``optimizer`` is given, its state and the run's counters; any layout.

    Without an optimizer only the weights are taken (starting another run) and a fresh state is returned. What
    trains may have changed: see ``optimizer_state``; rank 0 says so on stderr. ``reset_optimizer``: master
    weights are kept, moments and Adam's step count begin anew.
    """
    folders.read_manifest(path)
    stored = folders.read_metadata(path).state_dict_metadata
    wanted = model_state(chunks)
    if optimizer is None:
        put_weights(chunks, _read(path, wanted))
        return TrainState()
    if fp8 is not None:
        wanted["fp8"] = wanted_fp8_state(fp8, stored)

    file = optimizer_state.state_file(stored)
    change = optimizer_state.change_since(file, model_state(chunks, per_layer=True))
    named = model_state(chunks, file.per_layer)
    template = optimizer.sharded_state_dict(named, is_loading=True, metadata=_metadata(file.per_layer))
    places = optimizer_state.wanted_from(template, file, reset_optimizer)
    wanted |= {"optimizer_tensors": places, "left_aside": optimizer_state.holes(named, places)}
    loaded = _read(path, wanted, whole=not change and not reset_optimizer)
    if fp8 is not None and wanted["fp8"]:
        fp8.load_state(loaded["fp8"])  # first: weights in FP8 are rounded with its scales
    put_weights(chunks, loaded)

    goes_on = bool(change.goes_on) and not reset_optimizer
    step = optimizer_state.stored_step(loaded["optimizer"]) if goes_on else 0
    weights = {leaf.key: leaf.data for leaf in optimizer_state.leaves(named)}
    read = loaded.get("optimizer_tensors", {})
    optimizer.load_state_dict(optimizer_state.filled(template, read, weights, step))
    words = change.words(reset_optimizer, _betas(optimizer))
    if fp8 is not None:
        if not wanted["fp8"] and fp8.state():
            words.append("it holds no FP8 state: scaling begins anew")
    elif holds_fp8_state(stored):
        words.append("its FP8 state is left aside: this run computes without FP8")
    for word in words if dist.get_rank() == 0 else []:
        print(f"{path}: {word}", file=sys.stderr)
    return TrainState.from_dict(folders.read_run(path)["state"])


def _read(path: Path, wanted: dict[str, Any], whole: bool = True) -> dict[str, Any]:
    """megatron-core's load; ``whole``: that each tensor is asked for in full, once, is checked by it."""
    from megatron.core import dist_checkpointing

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: dict[str, Any] = dist_checkpointing.load(
                wanted, str(path), validate_access_integrity=whole
            )
    except CheckpointException as error:
        raise DataError(
            f"{path}: damaged, it cannot be loaded: {_cause(error)}. Move it away to go on from the one before"
        ) from None
    return loaded


def put_weights(chunks: list[Any], loaded: dict[str, Any]) -> None:
    """Put what was loaded for :func:`model_state` into the model."""
    for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True):
        model = unwrap(chunk)
        model.load_state_dict(with_empty_extra_state(loaded[key], model), strict=True)
        for name, parameter in model.named_parameters():
            keep_full_precision(parameter, loaded[key][name])


def _betas(optimizer: Any) -> tuple[float, float]:
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    return float(beta1), float(beta2)
