"""The model card of a release (``README.md``): the hub's metadata, and what the run tells of itself. Pure.

Nothing is made up: what no file records is shown as "not recorded". There is no date in it, so the same run
gives the same card.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_syne import __version__
from megatron_syne.config.learning_rate import Rates, rates_of
from megatron_syne.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
from megatron_syne.config.stages import stage_batch
from megatron_syne.release.licences import TERMS
from megatron_syne.release.run_facts import RunFacts

UNKNOWN = "not recorded"
_KINDS = {
    "hf": "Hugging Face folder",
    "shards": "TP/PP shards",
    "torch_dist": "torch_dist checkpoint",
    "megatron_pt": "Megatron-LM checkpoint",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class CardFacts:
    """All that a card is made of."""

    name: str
    model: ModelConfig
    parameters: int
    dtype: str
    """As in ``config.json``: ``bfloat16``."""
    licence: str | None
    licence_file: str | None
    """Name of its text in the folder."""
    base_model: str | None
    languages: Sequence[str]
    source: Mapping[str, Any]
    """``Weights.describe()`` of what was converted."""
    run: RunFacts | None
    evaluation: Mapping[str, Mapping[str, Any]]
    """Task to metric to value."""


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter."""
    terms = TERMS.get(facts.licence or "")
    banner = [f"**{terms.banner}**"] if terms is not None and terms.banner else []
    parts = [
        front_matter(facts),
        f"# {_text(facts.name)}",
        *banner,
        _summary(facts),
        "## Model",
        _table(("", ""), _architecture(facts)),
        "## Base model and licence",
        _table(("", ""), _descent(facts)),
        "## Training data",
        _data(facts.run),
        "## Training procedure",
        _table(("", ""), _procedure(facts.run)) if facts.run else f"{UNKNOWN.capitalize()}.",
        "## Evaluation",
        _evaluation(facts),
        "## Use",
        _use(facts.name),
        "## Where the weights come from",
        _provenance(facts),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: CardFacts) -> str:
    """The block that the hub reads: licence, base model, languages, tags."""
    values: dict[str, Any] = {}
    if facts.licence is not None:
        values["license"] = facts.licence
        if facts.licence == "other" and facts.licence_file:
            values |= {"license_name": "other", "license_link": facts.licence_file}
    if facts.base_model and _HUB_ID.fullmatch(facts.base_model):  # the hub refuses anything else here
        values["base_model"] = facts.base_model
    if facts.languages:
        values["language"] = list(facts.languages)
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    values["tags"] = ["megatron-core", *(["continual-pretraining"] if _continued(facts) else [])]
    return "---\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True) + "---"


def _continued(facts: CardFacts) -> bool:
    return facts.run is not None and facts.run.start is not None


def _summary(facts: CardFacts) -> str:
    name, base = _text(facts.name), _text(facts.base_model or "")
    if facts.run is None:
        return f"The weights of {name} for transformers. How they were trained is {UNKNOWN} here."
    tokens = f"{facts.run.consumed_tokens:,} tokens"
    if facts.run.start is None:
        return f"{name} was trained from random weights on {tokens}."
    return f"{name} is {base or 'a base model'} after continual pre-training on {tokens}."


def _architecture(facts: CardFacts) -> list[tuple[str, str]]:
    model = facts.model
    heads = f"{model.num_attention_heads} query, {model.num_query_groups} key/value, of {model.kv_channels}"
    rotary = f"{model.rotary_base:g}"
    if model.rope_scaling_factor is not None:
        rotary += (
            f", Llama-3.1's scaling: factor {model.rope_scaling_factor:g}, low {model.rope_low_freq_factor:g}, "
            f"high {model.rope_high_freq_factor:g}, original length {model.rope_original_max_position_embeddings}"
        )
    window = [] if model.window_size is None else [("Sliding window", f"{model.window_size} tokens")]
    tied = "tied" if model.share_embeddings_and_output_weights else "not tied"
    return [
        ("Family", str(model.model_type)),
        ("Parameters", f"{facts.parameters:,}"),
        ("Layers", str(model.num_layers)),
        ("Hidden size", str(model.hidden_size)),
        ("Feed-forward size", str(model.ffn_hidden_size)),
        ("Attention heads", heads),
        ("Vocabulary", f"{model.vocab_size}, embedding and output layer {tied}"),
        ("Longest sequence", f"{model.max_position_embeddings} positions"),
        ("Rotary base", rotary),
        *window,
        ("Format of the weights", facts.dtype),
    ]


def _descent(facts: CardFacts) -> list[tuple[str, str]]:
    terms = TERMS.get(facts.licence or "")
    licence = terms.title if terms else facts.licence or UNKNOWN
    if facts.licence_file:
        licence += f" (text: [{facts.licence_file}]({facts.licence_file}))"
    none = "none" if facts.run is not None and facts.run.start is None else UNKNOWN
    languages = ", ".join(facts.languages) or UNKNOWN
    return [("Base model", facts.base_model or none), ("Licence", licence), ("Languages", languages)]


def _data(run: RunFacts | None) -> str:
    if run is None:
        return f"{UNKNOWN.capitalize()}."
    if run.config.data.mock:
        return "Reproducible random tokens, no text."
    rows = [
        (
            stage.name if index == 0 else "",
            part.source,
            f"{100 * part.share:.3g} %",
            f"{part.tokens:,}",
        )
        for stage in run.stages
        for index, part in enumerate(stage.shares)
    ]
    stages = "\n".join(
        f"{number}. {_text(stage.name)}: {stage.trained_tokens:,} of {stage.planned_tokens:,} planned tokens"
        for number, stage in enumerate(run.stages, 1)
    )
    table = _table(("Stage", "Source", "Share", "Tokens"), rows)
    return (
        f"Stages, in the order they were trained:\n\n{stages}\n\n{table}\n\n"
        f"Tokens and shares as counted by the run. What the sources hold beyond their names: {UNKNOWN}."
    )


def _procedure(run: RunFacts) -> list[tuple[str, str]]:
    config, adam = run.config, run.config.optimizer
    planned = f" of {run.planned_steps:,} planned"
    clip = f", gradient norm clipped to {adam.clip_grad:g}" if adam.clip_grad else ""
    return [
        ("Tokens", f"{run.consumed_tokens:,}"),
        ("Optimizer steps", f"{run.step:,}{planned}"),
        ("Sequence length", _by_stage(f"{length:,}" for _, length in _batches(config))),
        (
            "Global batch",
            _by_stage(f"{size:,} sequences = {size * length:,} tokens" for size, length in _batches(config)),
        ),
        (
            "Optimizer",
            f"AdamW, beta {adam.adam_beta1:g} and {adam.adam_beta2:g}, epsilon {adam.adam_eps:g}, "
            f"weight decay {adam.weight_decay:g}{clip}",
        ),
        ("Learning rate", _schedule(config)),
        ("Precision", _precision(config.precision)),
        ("Layout", _layout(run.parallel)),
        ("Seed", str(config.train.seed)),
        ("Hardware", UNKNOWN),
    ]


def _batches(config: RunConfig) -> list[tuple[int, int]]:
    """(global batch, sequence length) of each stage."""
    if config.data.mock or not config.data.stages:
        return [(config.train.global_batch_size, config.data.seq_length)]
    lengths = (stage.seq_length or config.data.seq_length for stage in config.data.stages)
    return [(stage_batch(config, n).global_batch_size, length) for n, length in enumerate(lengths)]


def _by_stage(values: Iterable[str]) -> str:
    """The values of the stages in their order; one alone where all are the same."""
    listed = list(values)
    return listed[0] if len(set(listed)) == 1 else "; ".join(listed) + " (by stage)"


def _schedule(config: RunConfig) -> str:
    """In words; begun anew in each stage where ``schedule.span`` says so."""
    end = config.schedule.lr_decay_iters
    if config.schedule.span == "run":
        return _shape(rates_of(config), "the last step planned" if end is None else f"step {end:,}")
    stages = (stage.name for stage in config.data.stages)
    return "; ".join(f"{name}: {_shape(rates_of(config, name), 'the end of the stage')}" for name in stages)


def _shape(schedule: Rates, end: str) -> str:
    peak, bottom = f"{schedule.lr:g}", f"{schedule.min_lr:g}"
    warmup = ""
    if schedule.lr_warmup_tokens is not None:
        warmup = f"{schedule.lr_warmup_tokens:,} tokens"
    elif schedule.lr_warmup_iters:
        warmup = f"{schedule.lr_warmup_iters:,} steps"
    rise = f"from {schedule.lr_warmup_init:g} to {peak} over the first {warmup}, then " if warmup else ""
    if schedule.lr_decay_style == "constant":
        return f"{rise}constant at {peak}"
    if schedule.lr_decay_style == "WSD":
        if schedule.lr_wsd_decay_tokens:
            decay = f"{schedule.lr_wsd_decay_tokens:,} tokens"
        elif schedule.lr_wsd_decay_iters:
            decay = f"{schedule.lr_wsd_decay_iters:,} steps"
        else:
            return f"{rise}constant at {peak} (WSD without decay)"
        return (
            f"{rise}constant at {peak}, then {schedule.lr_wsd_decay_style} decay to {bottom} over the "
            f"{decay} before {end} (WSD)"
        )
    return f"{rise}{schedule.lr_decay_style} decay from {peak} to {bottom} at {end}"


def _precision(precision: PrecisionConfig) -> str:
    text = "bf16 with fp32 master weights" if precision.params_dtype == "bf16" else "fp32"
    if precision.accumulate_allreduce_grads_in_fp32 and precision.params_dtype == "bf16":
        text += ", gradients accumulated in fp32"
    if precision.fp8 is not None:
        text += f"; matrix products in FP8 ({precision.fp8} scaling, {precision.fp8_format})"
    return text


def _layout(parallel: ParallelConfig) -> str:
    virtual = parallel.virtual_pipeline_model_parallel_size
    replicas = parallel.data_parallel_size
    text = (
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}"
        + (f" (VPP {virtual})" if virtual else "")
        + f" x CP {parallel.context_parallel_size} x DP {UNKNOWN if replicas is None else replicas}"
    )
    also = [
        name
        for name, on in (
            ("sequence parallelism", parallel.sequence_parallel),
            ("distributed optimizer", parallel.use_distributed_optimizer),
        )
        if on
    ]
    return ", ".join([text, *also])


def _evaluation(facts: CardFacts) -> str:
    parts = []
    if facts.run is not None and facts.run.losses:
        rows = [
            (source, f"{loss:.4f}", f"{math.exp(min(loss, 50.0)):.2f}")
            for source, loss in facts.run.losses.items()
        ]
        parts.append(
            f"Held-out text of the run's validation sources, at step {facts.run.evaluation_step:,}, by the "
            f"trainer itself:\n\n" + _table(("Source", "Loss", "Perplexity"), rows)
        )
    if facts.evaluation:
        scores = [
            (task if index == 0 else "", metric, _number(value))
            for task, metrics in facts.evaluation.items()
            for index, (metric, value) in enumerate(metrics.items())
        ]
        parts.append("Tasks, as given to the release:\n\n" + _table(("Task", "Metric", "Value"), scores))
    return "\n\n".join(parts) or f"{UNKNOWN.capitalize()}."


def _use(name: str) -> str:
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'folder = "{name}"  # this folder, or its id on the hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n```"
    )


def _provenance(facts: CardFacts) -> str:
    run = facts.run
    lines = [*_chain("converted from", facts.source)]
    if run is not None:
        lines[0] += f", step {run.step:,} of the run"
        if run.start is None:
            lines.append("- the run started from: random weights")
        else:
            lines.append(f"- the run started from: {_code(run.start)}")
            behind = None if run.origin is None else run.origin.get("source")
            lines += _chain("which was made from", behind) or [f"- which was made from: {UNKNOWN}"]
    lines.append(f"- made by megatron_syne {__version__}")
    return (
        "\n".join(lines)
        + "\n\n`certificate.json` holds the hash of every tensor and of every file that was read "
        "for it. To check this folder:\n\n"
        "```\nsha256sum -c SHA256SUMS\npython tools/convert_checkpoint.py verify .    # of megatron_syne\n```"
    )


def _chain(verb: str, source: Any) -> list[str]:
    """What a certificate's ``source`` says, down to the first files, with their SHA-256."""
    lines = []
    while isinstance(source, Mapping):
        kind, folder, hub = source.get("kind"), source.get("folder"), source.get("hub")
        said = " ".join(
            [_KINDS.get(str(kind), str(kind or UNKNOWN)), *([_code(str(folder))] if folder else [])]
        )
        if isinstance(hub, Mapping):
            said += f" ({_text(str(hub.get('id')))} at revision {_code(str(hub.get('revision')))} of the hub)"
        lines.append(f"- {verb}: {said}")
        files, verb = source.get("files"), "which was made from"
        source = source.get("certificate")
        if source is None and isinstance(files, Mapping):
            lines += [
                f"    - {_code(str(name))} SHA-256 {_code(str(file['sha256']))}"
                for name, file in files.items()
                if isinstance(file, Mapping) and "sha256" in file
            ]
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(text: str) -> str:
    """Text from a file that stays inside its table cell or line, and is no HTML."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _code(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
