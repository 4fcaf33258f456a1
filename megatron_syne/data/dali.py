"""NVIDIA DALI as the feeder of the loader (``data.loader: dali``): the same batches in the same order.

DALI calls back for micro-batch 0, 1, 2, ... and is told nothing else: what it gets is a function of that
number and of the sample at which the pipeline was started, so it can be started anywhere in the run and has
no state of its own to save (its own checkpoints would restore an iterator wrongly). On a GPU it copies the
next micro-batch to the device while this one is used. The loader's thread drives it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from megatron_syne.data.batches import BatchBuilder
from megatron_syne.errors import ConfigError


class DaliFeeder:
    """``build(start)`` as the thread's own feeder, bit for bit; started anew where ``start`` is not the next."""

    def __init__(self, builder: BatchBuilder, device: torch.device) -> None:
        """``device``: where the tensors are wanted; a GPU has an index. ConfigError where DALI is not installed."""
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"data.loader: dali, but NVIDIA DALI cannot be imported ({error}); pip install "
                "nvidia-dali-cuda130, or set data.loader=thread"
            ) from None
        self._builder, self._device = builder, device
        self._source: _Source | None = None
        self._pipeline: Any = None
        self._next, self._sizes = -1, (0, 0)
        self._stream: torch.Stream | None = None
        if device.index is not None:
            self._stream = torch.Stream(device)
            self._training_stream = torch.accelerator.current_stream(device)

    def build(self, start: int) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of the global batch that starts at sample ``start``."""
        sizes = self._builder.sizes_at(start)
        if start != self._next or sizes != self._sizes:
            self._start(start)
        assert self._source is not None
        self._next = -1  # after an error the pipeline is started anew
        batches = []
        for first in self._builder.first_samples(start):
            outputs = self._pipeline.run()
            if (error := self._source.failed.pop(first, None)) is not None:
                raise error
            pairs = zip(self._source.names, outputs, strict=True)
            batches.append({name: self._tensor(output) for name, output in pairs})
            if self._stream is not None:
                self._stream.synchronize()  # DALI writes there again; it is the loader's thread that waits
        self._next, self._sizes = start + sizes[1], sizes
        return batches

    def _start(self, start: int) -> None:
        from nvidia.dali import fn
        from nvidia.dali.pipeline import Pipeline

        self._source = _Source(self._builder, start)
        self._pipeline = Pipeline(
            batch_size=self._builder.sizes_at(start)[0],
            num_threads=1,
            device_id=self._device.index,  # None = no GPU is touched
            prefetch_queue_depth=2,
        )
        with self._pipeline:
            outputs = fn.external_source(
                source=self._source, num_outputs=len(self._source.names), batch=True, batch_info=True
            )
            self._pipeline.set_outputs(*(out if self._device.index is None else out.gpu() for out in outputs))
        self._pipeline.build()

    def _tensor(self, output: Any) -> torch.Tensor:
        """A copy: DALI writes the next micro-batch but one into the same memory.

        On a GPU it is made in a stream of its own, in memory of that stream's: in the training's stream it would come
        after the whole step under way, and in DALI's it would write to memory that the step may still read. Not run
        on a GPU yet.
        """
        if self._stream is None:
            return from_dlpack(output.as_tensor()).clone()
        with self._stream:
            result = from_dlpack(output.as_tensor()).clone()
        result.record_stream(self._training_stream)  # is read there: no new use of the memory before
        return result


class _Source:
    """What DALI calls: ``BatchInfo`` -> one array per output. Errors wait for the micro-batch that they concern."""

    def __init__(self, builder: BatchBuilder, start: int) -> None:
        self._builder = builder
        self._micro, self._batch = builder.sizes_at(start)
        self._count, self._stride = builder.count_at(start), self._micro * builder.dp
        self._begin = builder.first_samples(start)[0]
        self.failed: dict[int, BaseException] = {}
        self._last = builder.micro_batch(builder.first_samples(start)[0])
        self.names = list(self._last)

    def __call__(self, info: Any) -> list[Any]:
        # asked ahead past a change of the batch, or past the end, this is wrong, and thrown away by the next start
        batch, micro = divmod(info.iteration, self._count)
        first = self._begin + batch * self._batch + micro * self._stride
        try:
            self._last = self._builder.micro_batch(first, self._micro)
        except BaseException as error:  # DALI asks ahead: whoever gets this micro-batch raises it
            self.failed[first] = error
        return list(self._last.values())
