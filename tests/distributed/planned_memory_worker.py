"""Bytes that one training step allocates, by the planner's components: ``planned_memory_worker.py jobs.json``.

Each job trains one step through megatron-core's schedule. Every tensor that autograd keeps is counted from when it is
saved to when it is let go, recomputed layers in the backward pass too; with them what pipeline stages receive and
send. Storages count once whatever views of them are kept; weights do not count. Of a loss in parts also what it makes
for itself meanwhile. ``results.json``: per job, per rank, bytes per component.
"""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

from distributed.jobs import each_job, leave_results


class Kept:
    """One tensor that autograd holds."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


class Count:
    """Peak bytes of all live storages: ``all``, and of those that the output layer and the loss alone hold."""

    def __init__(self, chunks: list[Any], fp8: Any) -> None:
        self.weights = storages(parameter for chunk in chunks for parameter in chunk.parameters())
        self.fp8 = fp8
        self.in_logits = False
        self.peaks = {"all": 0, "logits": 0}
        self.made = 0
        self.restore = lambda: None
        self._live: dict[int, tuple[weakref.ref[Any], bool]] = {}

    def keep(self, tensor: Any) -> Kept:
        """For ``saved_tensors_hooks``."""
        kept = Kept(tensor.detach())  # an output that held itself would never be let go
        self.hold(kept)
        return kept

    def hold(self, owner: Any) -> None:
        """Count a tensor as long as it, or the :class:`Kept` with it, lives."""
        self._live[id(owner)] = (weakref.ref(owner), self.in_logits)
        weakref.finalize(owner, self._live.pop, id(owner), None)
        self._look()

    def rounded_weights(self) -> dict[int, int]:
        """Storages of the copies that emulated FP8 keeps over a step."""
        chunks = [] if self.fp8 is None else self.fp8.chunks
        return storages(tensor for chunk in chunks for tensor in chunk.weights.values())

    def _look(self) -> None:
        elsewhere = self.weights.keys() | self.rounded_weights().keys()
        found: dict[int, tuple[int, bool]] = {}
        for reference, in_logits in list(self._live.values()):
            owner = reference()
            if owner is None:
                continue
            storage = (owner.tensor if isinstance(owner, Kept) else owner).untyped_storage()
            if storage._cdata not in elsewhere:
                others = found.get(storage._cdata, (0, True))[1]
                found[storage._cdata] = storage.nbytes(), in_logits and others
        whole = sum(size for size, _ in found.values())
        logits = sum(size for size, alone in found.values() if alone)
        self.peaks = {
            "all": max(self.peaks["all"], whole),
            "logits": max(self.peaks["logits"], logits),
        }


def watch_loss_in_parts(count: Count) -> None:
    """Add to ``count.peaks["logits"]`` what the chunked loss makes at once in its backward pass, by its operations."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from megatron_syne.models import chunked_loss

    class Made(TorchDispatchMode):
        """Live bytes of the storages that operations make."""

        def __init__(self) -> None:
            super().__init__()
            self.known: set[int] = set()
            self.now = self.peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = [t for t in tree_leaves([args, kwargs]) if isinstance(t, torch.Tensor)]
            self.known |= {t.untyped_storage()._cdata for t in given}
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                    self.enter(tensor.untyped_storage())
            return result

        def enter(self, storage: Any) -> None:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.leave, storage._cdata, storage.nbytes())

        def leave(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.now -= size

    function = chunked_loss._ChunkedLoss
    original = function.backward

    def backward(*arguments: Any) -> Any:
        made = Made()
        with made:
            result = original(*arguments)
        count.made = max(count.made, made.peak)
        return result

    function.backward = staticmethod(backward)
    count.restore = lambda: setattr(function, "backward", staticmethod(original))


def storages(tensors: Any) -> dict[int, int]:
    """Each storage and its bytes."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def watch(chunks: list[Any], count: Count, layers_too: bool) -> None:
    """Let ``count`` see what no autograd function saves; ``layers_too``: inputs of layers, gathered over TP again."""
    from megatron_syne.models.gpt import unwrap

    def enter_logits(*_: Any) -> None:
        count.in_logits = True

    for chunk in chunks:
        gpt: Any = unwrap(chunk)
        if gpt.post_process:
            gpt.output_layer.register_forward_pre_hook(enter_logits)
            gpt.output_layer.register_forward_hook(lambda module, inputs, output: count.hold(output[0]))
        else:
            gpt.register_forward_hook(lambda module, inputs, output: count.hold(output))
        if not gpt.pre_process:
            gpt.decoder.register_forward_pre_hook(lambda decoder, inputs: count.hold(decoder.input_tensor))
        for layer in gpt.decoder.layers if layers_too else []:
            layer.register_forward_pre_hook(
                lambda module, inputs, named: count.hold(named["hidden_states"]), with_kwargs=True
            )


def mock_batches(config: Any, model: Any, number: int) -> list[dict[str, Any]]:
    """Micro-batches of one replica; with two documents each."""
    import torch

    micro, length = config.train.micro_batch_size, config.data.seq_length
    batches = []
    for start in range(number):
        tokens = (torch.arange(micro * length) + start).reshape(micro, length) % model.vocab_size
        positions = torch.arange(length).repeat(micro, 1)
        batch = {"tokens": tokens, "labels": tokens.clone(), "position_ids": positions}
        batch["loss_mask"] = torch.ones(micro, length)
        if config.data.reset_attention_mask:
            batch["document_ids"] = positions // (length // 2)
        batches.append(batch)
    return batches


def train_step(
    config: Any, model: Any, platform: Any, chunks: list[Any], optimizer: Any, count: Count
) -> None:
    """One step, everything saved in it counted."""
    import torch
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_syne.config.arithmetic import batch_arithmetic
    from megatron_syne.parallel.topology import data_parallel_size
    from megatron_syne.training.forward import forward_step

    def step(batches: Any, chunk: Any) -> Any:
        output, loss_func = forward_step(platform, batches, chunk)

        def loss(losses: Any) -> Any:
            result = loss_func(losses)
            count.in_logits = False
            return result

        return output, loss

    dp = data_parallel_size(config.parallel, dist.get_world_size())
    batches = mock_batches(config, model, batch_arithmetic(config, dp).num_microbatches)
    iterators = [iter(batches) for _ in chunks]
    several = len(chunks) > 1
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count.keep, lambda kept: kept.tensor):
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if several else iterators[0],
            model=chunks if several else chunks[0],
            num_microbatches=len(batches),
            seq_length=config.data.seq_length,
            micro_batch_size=config.train.micro_batch_size,
            forward_only=False,
        )
    optimizer.step()


def optimizer_storages(optimizer: Any) -> dict[int, int]:
    """Of moments and of what it steps: master weights, or the weights themselves."""
    inner = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
    stepped = [p for each in inner for group in each.param_groups for p in group["params"]]
    states = [tensor for each in inner for state in each.state.values() for tensor in state.values()]
    return storages([*stepped, *states])


def main() -> None:
    results: dict[str, list[dict[str, int]]] = {}
    rank = 0
    for job, config, model, platform in each_job():
        import torch.distributed as dist
        from megatron.core import parallel_state

        from megatron_syne.fp8.attach import attach_fp8
        from megatron_syne.models.gpt import build_model
        from megatron_syne.training.optimizer import build_optimizer, connect, wrap_ddp
        from megatron_syne.training.param_groups import set_trainable

        plain = build_model(config, model, platform)
        fp8 = attach_fp8(plain, config, platform)
        set_trainable(plain, config)
        chunks = wrap_ddp(plain, config)
        optimizer = build_optimizer(chunks, config)
        connect(chunks, optimizer, config)
        count = Count(chunks, fp8)
        watch(chunks, count, config.memory.distribute_saved_activations)
        if config.memory.loss_chunk_tokens is not None:
            watch_loss_in_parts(count)
        train_step(config, model, platform, chunks, optimizer, count)
        count.restore()
        buffers = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
        gathered = parallel_state.get_global_memory_buffer().buffer.values()
        state = optimizer_storages(optimizer)
        own = {
            "parameters": sum(count.weights.values()),
            "gradients": sum(storages(buffers).values()),
            "optimizer": sum(size for key, size in state.items() if key not in count.weights),
            "activations": count.peaks["all"] - count.peaks["logits"],
            "logits": count.peaks["logits"] + count.made,
            "fp8": sum(count.rounded_weights().values()),
            "communication": sum(storages(gathered).values()),
        }
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        results[job["name"]] = everyone
        rank = dist.get_rank()
        del plain, chunks, optimizer, count, fp8, buffers
        gc.collect()
    if rank == 0:
        leave_results(Path(sys.argv[1]), results)


if __name__ == "__main__":
    main()
