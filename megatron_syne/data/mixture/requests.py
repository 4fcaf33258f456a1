"""What a configuration asks of the plan: its stages with shares, lengths and batches. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_syne.config.schema import RunConfig
from megatron_syne.config.stages import stage_batch
from megatron_syne.data.mixture.plan import Segment, StageRequest
from megatron_syne.data.mixture.ramp import batch_rows, check_ramp
from megatron_syne.data.mixture.shares import flatten_shares
from megatron_syne.errors import ConfigError


def stage_requests(config: RunConfig, past: Sequence[Segment]) -> tuple[StageRequest, ...]:
    """What the configuration asks for; ``past``: what of it stands (a mock run's length is in iterations)."""
    data, batch = config.data, config.train.global_batch_size
    if data.seq_length < 1 or batch < 1:
        raise ConfigError(
            f"data.seq_length ({data.seq_length}) and train.global_batch_size ({batch}) must be at least 1"
        )
    if data.mock:
        return (mock_request(config, past),)
    if not data.stages:
        raise ConfigError("data.stages: no stage; give at least one with name, tokens and mixture")
    requests: list[StageRequest] = []
    for number, stage in enumerate(data.stages):
        where = f"data.stages[{number}] ({stage.name or 'no name'})"
        if not stage.name:
            raise ConfigError(f"{where}.name: must not be empty")
        names = [request.name for request in requests]
        if stage.name in names:
            raise ConfigError(f"{where}.name: stage {names.index(stage.name)} has this name already")
        seq_length = data.seq_length if stage.seq_length is None else stage.seq_length
        micro, batch, ramp = stage_batch(config, number)
        for field, value in (
            ("tokens", stage.tokens),
            ("seq_length", seq_length),
            ("micro_batch_size", micro),
            ("global_batch_size", batch),
        ):
            if value < 1:
                raise ConfigError(f"{where}.{field}: must be at least 1, found {value}")
        check_ramp(ramp, batch, f"{where}.rampup_batch_size")
        shares = flatten_shares(stage.mixture, data.sources, f"{where}.mixture")
        requests.append(
            StageRequest(stage.name, stage.tokens, seq_length, tuple(shares.items()), batch, ramp)
        )
    return tuple(requests)


def mock_request(config: RunConfig, past: Sequence[Segment]) -> StageRequest:
    """The one stage of a run of random tokens, whose length is given in iterations."""
    if config.train.train_iters is None:
        raise ConfigError("train.train_iters: not given; data.mock has no token budget, so give it")
    _, batch, ramp = stage_batch(config, 0)
    check_ramp(ramp, batch, "train.rampup_batch_size")
    left = config.train.train_iters - sum(segment.iterations for segment in past)
    samples = sum(segment.samples for segment in past)
    tokens = sum(segment.tokens for segment in past)
    if left < 0:
        tokens += left * batch * config.data.seq_length
    for size, most in batch_rows(batch, ramp, samples) if left > 0 else ():
        iterations = left if most is None else min(left, most)
        tokens += size * iterations * config.data.seq_length
        left -= iterations
        if not left:
            break
    return StageRequest("mock", tokens, config.data.seq_length, (("mock", 1.0),), batch, ramp)
