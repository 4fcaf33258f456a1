"""The sharded optimizer's state for a checkpoint, in the engine's format but not by the engine's way.

megatron-core gathers ``fully_reshardable`` state (``DistributedOptimizer.get_parameter_state_dp_zero``) as whole fp32
buffers: on every rank, of all of its stage's parameters, twice in host memory and twice more on the GPU while they
are gathered. Of 8 B parameters on one GPU these are 192 GB and 64 GB; only the first data-parallel rank's copy is
then written. With several padded buckets it also takes parameters from the wrong places of the gathered buffer, since
the buffer is gathered without the padding that their positions count.

Here the engine makes its description of the tensors (names, shapes, groups) with empty ones, and each is then given
its values: a state that lies whole on one data-parallel rank is written by that rank from where it is. Of those that
lie across ranks, the one with the largest part collects the others' parts.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_syne.checkpoint.optimizer_state import leaves

Keep = Callable[[torch.Tensor], torch.Tensor]
"""What is done with a tensor that was made for the checkpoint alone, before the next is made."""


def sharded_optimizer_state(
    optimizer: Any, named: dict[str, Any], metadata: dict[str, Any], keep: Keep
) -> dict[str, Any]:
    """megatron-core's sharded state dict of an optimizer, for saving; all ranks must call.

    ``named``: the model's sharded state dict. Tensors may be the optimizer's own: they are to be copied or written
    before it goes on.
    """
    inner = _sharded_one(optimizer)
    if inner is None:
        return dict(optimizer.sharded_state_dict(named, is_loading=False, metadata=metadata))
    with _empty_states(inner):
        described = dict(optimizer.sharded_state_dict(named, is_loading=False, metadata=metadata))
    _fill(inner, described["param_state"], keep)
    return described


def _sharded_one(optimizer: Any) -> Any | None:
    """The one DistributedOptimizer with state that an optimizer consists of; None where it is of another kind."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    one = parts[0] if len(parts) == 1 else None
    if not isinstance(one, DistributedOptimizer) or one.is_stub_optimizer:
        return None
    return one


@contextmanager
def _empty_states(inner: Any) -> Iterator[None]:
    """Have ``get_parameter_state_dp_zero`` answer with tensors without storage, padding and all, and the optimizer's
    ``state_dict`` with its states as they are: Transformer Engine's FusedAdam gives fp32 copies of all that are not
    fp32, at once (2.11, ``fused_adam.py``), of which the engine takes none."""

    def without_values(**_: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {"buckets_coalesced": True}
        for place, (buffer, ranges) in enumerate(zip(inner.buffers, inner.gbuf_ranges, strict=True)):
            (dtype,) = ranges
            empty = torch.empty(buffer.numel, dtype=torch.float32, device="meta")
            found[place] = {dtype: {kind: empty for kind in ("param", "exp_avg", "exp_avg_sq")}}
        return found

    copies = hasattr(inner.optimizer, "get_unscaled_state")
    inner.get_parameter_state_dp_zero = without_values
    if copies:
        inner.optimizer.state_dict = partial(torch.optim.Optimizer.state_dict, inner.optimizer)
    try:
        yield
    finally:
        del inner.get_parameter_state_dp_zero
        if copies:
            del inner.optimizer.state_dict


def _fill(inner: Any, described: dict[int, dict[str, Any]], keep: Keep) -> None:
    """Give each described tensor its values on the rank that is to write it."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    group = inner.data_parallel_group
    rank, size = group.rank(), group.size()
    index = -1
    for buffer, ranges in zip(inner.buffers, inner.gbuf_ranges, strict=True):
        (buckets,) = ranges.values()
        mine = ChainMap(*(bucket["param_map"] for bucket in buckets))
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            index += 1
            bucket = buffer.buckets[bucket_id]
            parts = parts_of(
                start - bucket.offset, end - bucket.offset, bucket.grad_data.numel() // size, size
            )
            owner = max(parts, key=lambda holder: len(parts[holder]))
            own = inner._get_main_param_and_optimizer_states(parameter) if parameter in mine else {}
            for kind, leaf in list(described[index].items()):
                values = _collect(own.get(kind), parts, owner, group, bucket.grad_data.device)
                if rank == owner:
                    assert values is not None
                    made = len(parts) > 1 or not _is_own(inner, parameter, values)
                    values = values.view(leaf.data.shape)
                    leaf.data = (
                        keep(values) if made and not isinstance(leaf, ShardedTensorFactory) else values
                    )
                leaf.replica_id = (*leaf.replica_id[:-1], (rank - owner) % size)
                if rank == owner and made and isinstance(leaf, ShardedTensorFactory):
                    described[index][kind] = _kept_parts(leaf, keep)


def _kept_parts(factory: Any, keep: Keep) -> Any:
    """What the engine would make of a tensor that it stores in parts (SwiGLU's gate and up), each kept by itself.

    Parts of one kept tensor would be smaller than its memory, and the engine copies such once more."""
    parts = factory.build()
    for part in leaves(parts):
        part.data = keep(part.data.contiguous())
    return parts


def parts_of(start: int, end: int, shard: int, size: int) -> dict[int, range]:
    """By rank, which of a parameter's elements it holds, where the parameter lies at ``start`` to ``end`` of a bucket
    and each of ``size`` ranks holds ``shard`` elements of it (``DistributedOptimizer._build_model_gbuf_range``)."""
    found = {}
    for rank in range(size):
        first, last = max(start, rank * shard), min(end, (rank + 1) * shard)
        if first < last:
            found[rank] = range(first - start, last - start)
    return found


def _collect(
    own: torch.Tensor | None, parts: dict[int, range], owner: int, group: Any, device: torch.device
) -> torch.Tensor | None:
    """The whole of a flat tensor on the rank that is ``owner``; all of ``group`` must call.

    ``own``: this rank's part. On the other ranks the result says nothing.
    """
    if len(parts) == 1:
        return own.float() if own is not None else None
    rank = group.rank()
    numel = sum(map(len, parts.values()))
    whole = torch.empty(numel, dtype=torch.float32, device=device) if rank == owner else None
    for holder, part in parts.items():
        place = whole[part.start : part.stop] if whole is not None else None
        if rank == holder:
            assert own is not None
            piece = own.detach().to(device, torch.float32)
        else:
            piece = place if place is not None else torch.empty(len(part), dtype=torch.float32, device=device)
        if holder != owner:  # a broadcast: nccl has no gather of parts of different sizes
            dist.broadcast(piece, src=dist.get_global_rank(group, holder), group=group)
        elif place is not None:
            place.copy_(piece)
    return whole


def _is_own(inner: Any, parameter: Any, values: torch.Tensor) -> bool:
    """Whether the optimizer itself goes on with this tensor's memory: it was not made of what the optimizer holds."""
    group, order = inner.model_param_group_index_map[parameter]
    main = inner.optimizer.param_groups[group]["params"][order]
    held = [main, *(each for each in inner.optimizer.state[main].values() if isinstance(each, torch.Tensor))]
    return address(values) in {address(each) for each in held}


def address(tensor: torch.Tensor) -> int:
    """Of a tensor's storage; 0 where it has none of its own (``meta``, Transformer Engine's quantised weights)."""
    try:
        return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return 0
