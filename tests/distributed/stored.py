"""Single tensors out of a training checkpoint, by torch's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def stored_tensor(checkpoint: Path, key: str) -> Any:
    """The whole tensor under a key of a ``torch_dist`` checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata[key]
    state = {key: torch.empty(metadata.size, dtype=metadata.properties.dtype)}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state[key]
