"""FP8 state in checkpoints: plain tensors, versioned, the same whatever the layout; never pickled bytes.

Every amax is reduced over TP x CP x DP before it is used, so all ranks of a pipeline stage hold the same state
of their layers, of weights too: each tensor is whole on each of them, is written by the first, and is read by
whichever rank holds the layer next time. Nothing is kept per TP rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_syne.errors import DataError
from megatron_syne.fp8.layers import Fp8Layers

PREFIX, VERSION = "fp8.", "v1"
_FORMAT = f"{PREFIX}{VERSION}."
_EXTRA = "_extra_state"


def sharded_fp8_state(fp8: Fp8Layers) -> dict[str, Any]:
    """``fp8.state()`` as megatron-core's ``ShardedTensor``s by its own keys, each written once."""
    return {key: _whole(key, tensor) for key, tensor in fp8.state().items()}


def wanted_fp8_state(fp8: Fp8Layers, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What to read of this rank's FP8 state, in the shapes that the checkpoint has; empty where it has none.

    ``stored``: the checkpoint's tensors by key (``Metadata.state_dict_metadata``). DataError for a version that
    this program does not know; a layer that is lacking is left to ``fp8.load_state``.
    """
    check_version(stored)
    wanted = {}
    for key, tensor in fp8.state().items():
        entry = stored.get(_FORMAT + key)
        if entry is not None:
            wanted[key] = _whole(key, torch.zeros(entry.size, dtype=tensor.dtype, device=tensor.device))
    return wanted


def holds_fp8_state(stored: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds FP8 state; DataError for a version that this program does not know."""
    check_version(stored)
    return any(key.startswith(_FORMAT) for key in stored)


def check_version(stored: Mapping[str, Any]) -> None:
    """DataError where the checkpoint's FP8 state is of another version."""
    for key in stored:
        if key.startswith(PREFIX) and not key.startswith(_FORMAT):
            raise DataError(
                f"FP8 state of an unknown version: {key}, expected {_FORMAT}...; go on with the program that "
                "wrote it, or start a new run_dir with checkpoint.initialize_from (weights alone are taken)"
            )


def _whole(key: str, tensor: torch.Tensor) -> Any:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor

    replica = (
        0,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedTensor.from_rank_offsets(_FORMAT + key, tensor, replica_id=replica)


def without_extra_state(sharded: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state dict without Transformer Engine's pickled ``_extra_state``.

    Checkpoints from before hold such objects (empty ones, from a CPU); they are not asked for either.
    """
    return {key: value for key, value in sharded.items() if not key.endswith(_EXTRA)}


def with_empty_extra_state(loaded: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """``loaded`` and, for each module that wants an ``_extra_state``, None, which Transformer Engine passes over."""
    plain = torch.nn.Module.set_extra_state
    wanting = [
        f"{name}.{_EXTRA}" if name else _EXTRA
        for name, module in model.named_modules()
        if type(module).set_extra_state is not plain
    ]
    return {**dict.fromkeys(wanting), **loaded}
