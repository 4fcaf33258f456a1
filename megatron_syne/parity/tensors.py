"""Tensors of the reference by name, whole or by rows.

A Hugging Face folder is read by the safetensors library and not by ours, so that a fault of our reader cannot
stand on both sides.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_syne.convert.files import exists_inside, open_inside, read_json_inside
from megatron_syne.errors import DataError


class Tensors(ABC):
    """Hugging Face tensors by name."""

    folder: Path
    config: dict[str, Any]
    """Contents of ``config.json``."""
    names: set[str]

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor in the format it is stored in."""

    @abstractmethod
    def whole(self, name: str) -> torch.Tensor:
        """All of a tensor."""

    def close(self) -> None:  # noqa: B027 (a folder's files are open for one read only)
        """Close files."""


class FolderTensors(Tensors):
    """A Hugging Face folder, read by the safetensors library."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, read_json_inside(folder, "config.json")
        index = "model.safetensors.index.json"
        if exists_inside(folder, index):
            files = read_json_inside(folder, index).get("weight_map")
            if not isinstance(files, dict):
                raise DataError(
                    f"{folder / index}: weight_map: expected an object, found {type(files).__name__}"
                )
            self._files: dict[str, str] = files
        else:
            with self._open("model.safetensors") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")
        self.names = set(self._files)

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        # By the descriptor of open_inside: the library itself would follow a name or a link anywhere. Opened
        # anew for each tensor, since what it has mapped counts as memory of the process.
        descriptor = open_inside(self.folder, name)
        try:
            with safe_open(f"/proc/self/fd/{descriptor}", "pt") as file:
                yield file
        except SafetensorError as error:
            raise DataError(f"{self.folder / name}: the safetensors library says: {error}") from None
        finally:
            os.close(descriptor)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See :class:`Tensors`."""
        with self._open(self._files[name]) as file:
            result: torch.Tensor = file.get_slice(name)[start:stop]
        return result

    def whole(self, name: str) -> torch.Tensor:
        """See :class:`Tensors`."""
        with self._open(self._files[name]) as file:
            result: torch.Tensor = file.get_tensor(name)
        return result


class StoredTensors(Tensors):
    """Weights in any other format that this package reads, as the Hugging Face tensors that they hold."""

    def __init__(self, folder: Path) -> None:
        from megatron_syne.convert.formats.detect import open_weights

        self._weights = open_weights(folder)
        self.folder, self.config, self.names = folder, self._weights.config, set(self._weights.shapes)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See :class:`Tensors`."""
        out = np.empty((stop - start, self._weights.row_bytes(name)), np.uint8)
        self._weights.read(name, (start, stop), out)
        dtype = _TORCH[self._weights.dtypes[name]]
        return torch.from_numpy(out).view(dtype).view(stop - start, *self._weights.shapes[name][1:])

    def whole(self, name: str) -> torch.Tensor:
        """See :class:`Tensors`."""
        return self.rows(name, 0, self._weights.shapes[name][0])

    def close(self) -> None:
        """See :class:`Tensors`."""
        self._weights.close()


_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def open_tensors(folder: Path) -> Tensors:
    """Tensors of a reference folder. Raises MissingInput, DataError, SecurityRefusal."""
    return FolderTensors(folder) if exists_inside(folder, "config.json") else StoredTensors(folder)
