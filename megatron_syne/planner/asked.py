"""The run that ``tools/plan.py`` is asked about: a configuration's file, or one made of ``--model`` and its options."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_syne.config.arithmetic import tokens_per_step
from megatron_syne.config.loader import config_of, config_origin, load_config
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.config.stages import stage_batch
from megatron_syne.data.mixture.ramp import batch_rows, check_ramp
from megatron_syne.errors import ConfigError, DataError
from megatron_syne.models.config import PRESETS, resolve_model
from megatron_syne.models.hf_config import model_config_from_hf
from megatron_syne.models.json_file import read_json

OPTIONS = {
    "seq-length": ("data.seq_length", "N", "tokens of a sample"),
    "global-batch-size": ("train.global_batch_size", "N", "samples of a step"),
    "micro-batch-size": ("train.micro_batch_size", "N", "samples of a forward pass"),
    "tensor-model-parallel-size": ("parallel.tensor_model_parallel_size", "N", "TP"),
    "pipeline-model-parallel-size": ("parallel.pipeline_model_parallel_size", "N", "PP"),
    "virtual-pipeline-model-parallel-size": ("parallel.virtual_pipeline_model_parallel_size", "N", "VPP"),
    "context-parallel-size": ("parallel.context_parallel_size", "N", "CP"),
    "recompute-granularity": ("memory.recompute_granularity", "WHAT", "selective or full"),
    "recompute-method": ("memory.recompute_method", "HOW", "uniform or block, with full"),
    "recompute-num-layers": ("memory.recompute_num_layers", "N", "layers, with full"),
}
"""Option -> the option of a configuration that it sets, what it takes, its meaning."""

PRECISIONS: dict[str, str] = {
    "bf16": "precision.params_dtype=bf16",
    "fp32": "precision.params_dtype=fp32",
    **{recipe: f"precision.fp8={recipe}" for recipe in ("delayed", "tensorwise", "blockwise")},
}
"""Name -> what it sets; the last three are FP8 recipes."""

GIVEN_BY_DEFAULT = (
    "run_dir=plan",
    "data.mock=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)
"""What a run given by ``--model`` has: overlapped communication of the sharded optimizer, as a run on GPUs should."""

MOST_LAYERS = 1000
"""More is a mistake in a ``config.json``: released models have up to 126; a search with many more takes minutes."""


def configuration(options: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    """The run that is planned: the file's, or one that says what ``--model`` and its options say."""
    given = {key: getattr(options, name.replace("-", "_")) for name, (key, _, _) in OPTIONS.items()}
    given = {key: value for key, value in given.items() if value is not None}
    if options.config is not None:
        names = [name for name, (key, _, _) in OPTIONS.items() if key in given]
        names += [
            name
            for name in ("recompute-modules", "precision", "tokens")
            if getattr(options, name.replace("-", "_"))
        ]
        if names:
            raise ConfigError(
                f"--{', --'.join(names)}: with --model alone; a configuration says it itself, or is told otherwise "
                f"by section.option=value"
            )
        return load_config(options.config, overrides)
    texts = [*GIVEN_BY_DEFAULT, *(f"{key}={value}" for key, value in given.items())]
    if options.precision is not None:
        if options.precision not in PRECISIONS:
            raise ConfigError(
                f"--precision: {options.precision!r} is unknown; known: {', '.join(PRECISIONS)}"
            )
        texts.append(PRECISIONS[options.precision])
    if options.recompute_modules:
        texts.append(f"memory.recompute_modules=[{', '.join(options.recompute_modules)}]")
    config = config_of([*texts, *overrides])
    config.model = _model(options.model, config.model)
    for option, key in (("seq-length", "data.seq_length"), ("global-batch-size", "train.global_batch_size")):
        if config_origin(config, key) == "default":
            raise ConfigError(f"--{option}: not given; --model says nothing of what it is trained with")
    if config_origin(config, "parallel.sequence_parallel") == "default":
        config.parallel.sequence_parallel = config.parallel.tensor_model_parallel_size > 1
    if config.train.train_iters is None and tokens_per_step(config) > 0:
        config.train.train_iters = _iterations(config, token_count(options.tokens or "1B"))
    return config


def resolved(config: RunConfig) -> ModelConfig:
    """The run's model, every field filled; DataError (of an option: ConfigError) for more layers than a model has."""
    model = resolve_model(config.model)
    if (model.num_layers or 0) > MOST_LAYERS:
        wanted = f"a plan takes at most {MOST_LAYERS:,}"
        if config_origin(config, "model.num_layers") != "default":
            raise ConfigError(f"model.num_layers = {model.num_layers:,}: {wanted}")
        raise DataError(f"config.json of the model: num_hidden_layers = {model.num_layers:,}; {wanted}")
    return model


def _iterations(config: RunConfig, tokens: int) -> int:
    """Steps that train at least so many tokens, the smaller ones of a ramp among them."""
    _, batch, ramp = stage_batch(config, 0)
    check_ramp(ramp, batch, "train.rampup_batch_size")
    samples, steps = -(-tokens // config.data.seq_length), 0
    for size, most in batch_rows(batch, ramp):
        count = -(-samples // size) if most is None else min(most, -(-samples // size))
        samples, steps = samples - count * size, steps + count
        if samples <= 0:
            break
    return steps


def _model(name: str, given: ModelConfig) -> ModelConfig:
    """The model that ``--model`` names, with the fields given by overrides on top."""
    if os.path.isdir(name):  # unlike Path's, False for a name too long to be one
        return replace(given, hf_path=os.path.abspath(name))
    if os.path.isfile(name):
        own = model_config_from_hf(read_json(Path(name)), name)
        fields = {key: value for key, value in vars(given).items() if value != getattr(ModelConfig, key)}
        return replace(own, **fields)
    if name in PRESETS:
        return replace(given, preset=name)
    raise ConfigError(
        f"--model: {_shortened(name)} is no config.json, no folder that has one, and no preset; presets: "
        f"{', '.join(PRESETS)}"
    )


def token_count(text: str) -> int:
    """``100B`` -> 100,000,000,000; raises ConfigError for anything but a number with K, M, B, T or nothing."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([KMBT]?)", text.replace("_", ""))
    unit = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    value = round(float(match[1]) * unit[match[2]]) if match else 0
    if value < 1:
        raise ConfigError(
            f"--tokens: {_shortened(text)} is no number of tokens; write 100B, 7.5B, 300M or 1000000"
        )
    return value


def _shortened(text: str) -> str:
    """As Python writes it, long ones cut."""
    return repr(text if len(text) <= 100 else f"{text[:100]}...")
