"""Which parameters train, and with which share of the learning rate and weight decay.

A frozen parameter has ``requires_grad = False`` before DDP is built: no gradient is computed for it, it has no
place in the gradient buffers and no optimizer state. A pipeline stage may be left with nothing that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_syne.config.schema import OptimizerConfig, RunConfig
from megatron_syne.errors import ConfigError, SyneError
from megatron_syne.models import parameter_names as names
from megatron_syne.models.gpt import named_parameters, unwrap

Multipliers = tuple[float, float]
_ATTRIBUTE = "update_multipliers"


def set_trainable(chunks: list[nn.Module], config: RunConfig) -> None:
    """Freeze what ``optimizer.freeze`` and ``train_only`` say, before DDP is built; all ranks must call.

    Also puts the multipliers of :func:`group_overrides` on each parameter. Raises ConfigError, on every rank
    alike, for a pattern that fits no parameter of any rank and where nothing is left to train.
    """
    options = config.optimizer
    if not (options.freeze or options.train_only or options.groups or options.decay_norms_and_biases):
        return
    new_layers = _new_layers(config)
    own = canonical_parameters(chunks)
    check_patterns(_gathered(name for name, _ in own), options, new_layers)
    for name, parameter in own:
        parameter.requires_grad_(names.trains(name, options.freeze, options.train_only, new_layers))
        setattr(parameter, _ATTRIBUTE, multipliers(name, parameter.dim(), options, new_layers))
    if config.memory.recompute_granularity is not None:
        for chunk in chunks:
            _begin_graph_at_embedding(unwrap(chunk))


def canonical_parameters(chunks: list[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """This rank's parameters under their names in ``models.parameter_names``."""
    return [
        (names.canonical(name, bool(unwrap(chunk).share_embeddings_and_output_weights)), parameter)
        for chunk in chunks
        for name, parameter in named_parameters(chunk)
    ]


def check_patterns(known: Sequence[str], options: OptimizerConfig, new_layers: Sequence[int] | None) -> None:
    """Raise ConfigError for a pattern that fits none of the ``known`` names, and if nothing would train."""
    given = [
        *(("optimizer.freeze", pattern) for pattern in options.freeze),
        *(("optimizer.train_only", pattern) for pattern in options.train_only),
        *((f"optimizer.groups.{n}.match", group.match) for n, group in enumerate(options.groups)),
    ]
    lost = [
        f"{key}: {pattern!r} fits no parameter; nearest names: {names.nearest_names(pattern, known)}"
        for key, pattern in given
        if not any(names.matches(name, pattern, new_layers) for name in known)
    ]
    if lost:
        raise ConfigError("; ".join(lost))
    if not any(names.trains(name, options.freeze, options.train_only, new_layers) for name in known):
        raise ConfigError(
            f"optimizer.freeze {options.freeze} and optimizer.train_only {options.train_only} leave nothing to train"
        )


def multipliers(
    name: str, dimensions: int, options: OptimizerConfig, new_layers: Sequence[int] | None
) -> Multipliers:
    """(share of the learning rate, share of the weight decay) of one parameter.

    The first group that fits counts. Without one, or where it does not say, norms and biases (one dimension)
    do not decay unless ``decay_norms_and_biases`` is set: megatron-core's own rule.
    """
    decays = dimensions > 1 or options.decay_norms_and_biases
    group = next((g for g in options.groups if names.matches(name, g.match, new_layers)), None)
    usual = 1.0 if decays else 0.0
    if group is None:
        return 1.0, usual
    return float(group.lr_mult), usual if group.wd_mult is None else float(group.wd_mult)


def group_overrides(config: RunConfig) -> dict[Any, Any] | None:
    """megatron-core's ``config_overrides`` for ``optimizer.groups``; None = its own rule.

    One entry for each pair of multipliers that there can be, the same on every rank: the engine makes a group
    of each and finds groups in checkpoints by their multipliers, so none may stand for 1 and 1.
    """
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    options = config.optimizer
    if not options.groups and not options.decay_norms_and_biases:
        return None
    usual = (1.0,) if options.decay_norms_and_biases else (1.0, 0.0)
    pairs = {(1.0, decay) for decay in usual}
    for group in options.groups:
        given = usual if group.wd_mult is None else (float(group.wd_mult),)
        pairs |= {(float(group.lr_mult), decay) for decay in given}
    result = {}
    for pair in sorted(pairs - {(1.0, 1.0)}):

        def fits(parameter: torch.Tensor, pair: Multipliers = pair) -> bool:
            return bool(getattr(parameter, _ATTRIBUTE) == pair)

        key = ParamKey(predicate=ParamPredicate(name=f"lr x {pair[0]}, weight decay x {pair[1]}", fn=fits))
        result[key] = {
            name: value for name, value in zip(("lr_mult", "wd_mult"), pair, strict=True) if value != 1.0
        }
    return result


def _new_layers(config: RunConfig) -> list[int] | None:
    """The added layers where a pattern asks for them, as rank 0 reads them; its errors are every rank's."""
    options = config.optimizer
    patterns = [*options.freeze, *options.train_only, *(group.match for group in options.groups)]
    if not names.ask_for_new_layers(patterns):
        return None
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [names.new_layers_of(config)]
        except SyneError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], BaseException):
        raise answer[0]
    found: list[int] = answer[0]
    return found


def _gathered(own: Any) -> list[str]:
    """The names of all ranks, sorted, each once."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sorted(set(own)))
    return sorted({name for rank in everyone for name in rank})


def _begin_graph_at_embedding(gpt: Any) -> None:
    """Let the decoder's input ask for a gradient where the embedding is frozen and layers are recomputed.

    A recomputed block is one autograd function of its input alone: with an input that asks for no gradient,
    neither does its output, and the parameters inside would not be trained, without a word.
    """
    embedding = getattr(gpt, "embedding", None)
    if embedding is None or any(parameter.requires_grad for parameter in embedding.parameters()):
        return

    def ask(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    embedding.register_forward_hook(ask)
