"""Optimizer state in checkpoints: of what trains and nothing else, also where that has changed since.

A state lies beside the weight that it is of, under ``optimizer.state.<kind>.<weight's key>``. The engine stacks
the layers' tensors into one ``[layers, ...]``, which cannot have holes; so where anything is frozen, states have
a key for each layer (``decoder.layers.3...``). A checkpoint of either kind loads into any run:

* what trained before and trains now goes on with its fp32 master weight and its moments;
* what trains anew begins with moments of zero and a master weight from its weight;
* the state of what no longer trains is left aside.

Adam's step: the engine holds one count for all parameters (``DistributedOptimizer.state_dict`` asserts it, as
Transformer Engine's FusedAdam has it). While something goes on training, the count goes on too: otherwise the
bias correction would blow up moments that have long settled. Moments that begin at zero are then not corrected:
their updates are those of Adam times ``overshoot`` at most, which is 1.10 for betas 0.9, 0.95 and settles within
some 50 steps, but 6.6 for beta2 = 0.999. Where nothing goes on, the count begins anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

PREFIX = "optimizer.state."
MOMENTS = ("exp_avg", "exp_avg_sq")
MASTERS = ("param", "fp32_param")  # with and without the sharded optimizer


@dataclasses.dataclass(frozen=True)
class StateFile:
    """What a checkpoint's metadata says of its optimizer state."""

    keys: frozenset[str]
    trained: frozenset[str]
    """Canonical names of the parameters with moments."""

    @property
    def per_layer(self) -> bool:
        """Whether layers are to be asked for by keys of their own: also where no layer has a state.

        By stacked keys a layer's weight could not be told from another's; and those hold every layer.
        """
        stem = f"{PREFIX}{MOMENTS[0]}."
        names = [key.removeprefix(stem) for key in self.keys if key.startswith(stem + "decoder.layers.")]
        return all(_layer_of(name) is not None for name in names)


def state_file(tensors: dict[str, Any]) -> StateFile:
    """From the ``state_dict_metadata`` of a checkpoint."""
    own = PREFIX + MOMENTS[0] + "."
    trained: set[str] = set()
    for key, metadata in tensors.items():
        if not key.startswith(own):
            continue
        name = key.removeprefix(own)
        if name.startswith("decoder.layers.") and _layer_of(name) is None:
            rest = name.removeprefix("decoder.layers.")
            trained |= {f"decoder.layers.{layer}.{rest}" for layer in range(metadata.size[0])}
        else:
            trained.add(name)
    return StateFile(frozenset(tensors), frozenset(trained))


@dataclasses.dataclass(frozen=True)
class Change:
    """How what trains now differs from what a checkpoint has state of; the same on every rank."""

    goes_on: frozenset[str]
    begins: frozenset[str]
    ends: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.begins or self.ends)

    def words(self, reset: bool, betas: tuple[float, float]) -> list[str]:
        """What a user should know, one sentence each."""
        said = []
        if self.begins:
            said.append(f"{_count(self.begins)} train anew: their moments begin at 0")
        if self.ends:
            said.append(f"{_count(self.ends)} no longer train: their optimizer state is left aside")
        excess = overshoot(*betas)
        if self.begins and self.goes_on and not reset and excess > 1.5:
            said.append(
                f"the new ones' first updates are up to {excess:.1f} times Adam's, since its step count goes on "
                f"(adam_beta2 {betas[1]}): warm up, set reset_optimizer, or lower adam_beta2"
            )
        return said


def overshoot(beta1: float, beta2: float) -> float:
    """Largest ratio, over the steps, of an update without Adam's bias correction to one with it (constant
    gradient): max over t of (1 - beta1^t) / sqrt(1 - beta2^t)."""
    return float(max((1 - beta1**t) / (1 - beta2**t) ** 0.5 for t in range(1, 2000)))


def change_since(file: StateFile, per_layer: dict[str, Any]) -> Change:
    """Compare with this run, whose model's sharded state by layer is ``per_layer``; all ranks must call."""
    own = {leaf.key for leaf in leaves(per_layer) if getattr(leaf.data, "requires_grad", False)}
    now = frozenset(name for names in _from_all(sorted(own)) for name in names)
    return Change(now & file.trained, now - file.trained, file.trained - now)


def anything_frozen(chunks: list[Any]) -> bool:
    """Whether any rank has a parameter that does not train; all ranks must call."""
    return any(_from_all(not all(p.requires_grad for chunk in chunks for p in chunk.parameters())))


def agree_on_step(optimizer: Any) -> None:
    """Give every group Adam's step count before it is saved; all ranks must call.

    Rank 0 writes the groups, and Transformer Engine's FusedAdam counts only for those of which it holds
    something: a first stage that is frozen would write no count, and the bias correction would start again.
    """
    groups = optimizer.param_groups
    step = max(_from_all(max((int(group.get("step", 0)) for group in groups), default=0)))
    for group in groups:
        if step:
            group["step"] = step


def leaves(tree: Any) -> Iterator[Any]:
    """The sharded tensors of a (nested) sharded state dict."""
    for _, _, leaf in _places(tree):
        yield leaf


def wanted_from(template: dict[str, Any], file: StateFile, reset: bool) -> dict[str, Any]:
    """Of an optimizer's sharded state dict, the tensors to be read from the file, by their place in it.

    ``reset``: no moments. The layout of master weights may differ by name only (with and without the sharded
    optimizer).
    """
    found = {}
    for place, (_, _, leaf) in enumerate(_places(template)):
        kind, _, name = leaf.key.removeprefix(PREFIX).partition(".")
        if kind in MOMENTS and reset:
            continue
        kinds = MASTERS if kind in MASTERS else (kind,)
        key = next((k for k in (leaf.key, *(f"{PREFIX}{k}.{name}" for k in kinds)) if k in file.keys), None)
        if key is not None:
            found[str(place)] = dataclasses.replace(leaf, key=key)
    return found


def holes(named: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The layers that are missing from the stacked tensors in ``wanted``: to be read too, and thrown away.

    Asked for only by a single process: there the engine takes a layer that nobody asks for to be this rank's own
    (``(rank + 1) % world_size`` in its ``sharded_tensor_to_torch_sharded_tensor``), and torch refuses.
    """
    if dist.get_world_size() > 1:
        return {}
    asked = {leaf.key for leaf in wanted.values()}
    found: dict[str, Any] = {}
    for leaf in leaves(named):
        for kind in (*MOMENTS, *MASTERS) if not leaf.data.requires_grad else ():
            key = f"{PREFIX}{kind}.{leaf.key}"
            if key in asked:
                changes: dict[str, Any] = {"data": torch.empty_like(leaf.data, dtype=torch.float32)}
                if hasattr(leaf, "dtype"):
                    changes["dtype"] = torch.float32
                found[str(len(found))] = dataclasses.replace(leaf, key=key, **changes)
    return found


def filled(
    template: dict[str, Any],
    read: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    step: int,
) -> dict[str, Any]:
    """The optimizer's state dict: ``read`` in its places, and for the others zeros or the weight.

    ``weights``: by key, the model's parameters as loaded. The groups are this run's, with their own options, and
    not the file's: only the step count is given.
    """
    for place, (holder, slot, leaf) in enumerate(list(_places(template))):
        kind, _, name = leaf.key.removeprefix(PREFIX).partition(".")
        if str(place) in read:
            holder[slot] = read[str(place)]
        elif kind in MASTERS:
            holder[slot] = weights[name].detach().float().to(leaf.data.device)
        else:
            holder[slot] = torch.zeros_like(leaf.data)
    inner = template.get("optimizer", template)
    inner["param_groups"] = [
        {**{k: getattr(v, "obj", v) for k, v in listed.items()}, "step": step}
        for listed in inner["param_groups"]
    ]
    return template


def stored_step(common: dict[str, Any]) -> int:
    """Adam's step count in the part of a checkpoint that is not tensors; 0 where there is none."""
    inner = common.get("optimizer", common)
    return max((int(group.get("step", 0)) for group in inner["param_groups"]), default=0)


def _places(tree: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(dict or list, key or index, sharded tensor) in a nested sharded state dict, in its order."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for slot, value in items:
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            yield tree, slot, value
        else:
            yield from _places(value)


def _layer_of(name: str) -> int | None:
    """The layer's number in a key, None where the key is not of one layer."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["decoder", "layers"] and parts[2].isdigit() else None


def _from_all(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _count(names: frozenset[str]) -> str:
    some = sorted(names)
    return f"{len(some)} parameter tensors ({', '.join(some[:2])}{', ...' if len(some) > 2 else ''})"
