"""Every rule refuses what it names, with the value, the file and the nearest legal values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight import rules
from megatron_syne.preflight.launch_rules import check_launch, time_limit_seconds

MODEL = (
    "model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 8, num_query_groups: 4,"
    " kv_channels: 8, vocab_size: 512, max_position_embeddings: 128, layernorm_epsilon: 1e-5,"
    " rotary_base: 500000, share_embeddings_and_output_weights: false}\n"
)
MOCK = "run_dir: out\n" + MODEL + "data: {seq_length: 64, mock: true}\ntrain: {train_iters: 20}\n"
REAL = (
    "run_dir: out\n"
    + MODEL
    + "data:\n  seq_length: 64\n  sources: {en: {path: en}, zh: {path: zh}}\n  validation: {en: {path: en_valid}}\n"
    "  stages: [{name: a, tokens: 1000, mixture: {en: 0.8, zh: 0.2}}, {name: b, tokens: 512, mixture: {en: 1}}]\n"
)

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
INTERLEAVED = [f"{PP}=2", f"{VPP}=2"]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    monkeypatch.chdir(tmp_path)

    def _load(text: str, *overrides: str) -> RunConfig:
        (tmp_path / "run.yaml").write_text(text)
        return load_config("run.yaml", overrides)

    return _load


def check(config: RunConfig, world_size: int | None = None, platform: Any = "cpu") -> None:
    rules.check(config, resolve_model(config.model), world_size, platform)


def refusal(config: RunConfig, world_size: int | None = None, platform: Any = "cpu") -> str:
    with pytest.raises(ConfigError) as caught:
        check(config, world_size, platform)
    assert caught.value.exit_code == 64
    return str(caught.value)


# --- what is accepted: the layouts that were measured to train rightly -------------------------------------


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, []),
        (2, [f"{TP}=2", "parallel.sequence_parallel=true"]),
        (4, [f"{PP}=4"]),
        (2, INTERLEAVED),
        (4, [f"{TP}=2", *INTERLEAVED, "parallel.sequence_parallel=true"]),
        (4, [*INTERLEAVED, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
        (4, [f"{TP}=4"]),
        (4, ["parallel.context_parallel_size=4"]),
        (2, [f"{PP}=2", "parallel.deallocate_pipeline_outputs=true"]),
        (4, [f"{PP}=4", f"{VPP}=2", "parallel.overlap_p2p_comm=false", "model.num_layers=8"]),
    ],
)
@pytest.mark.parametrize("text", [MOCK, REAL])
def test_layouts_that_train_rightly_are_accepted(load, text, world, overrides, platform):
    check(load(text, *overrides), world, platform)


# --- one rule after the other ------------------------------------------------------------------------------

# overrides, then what the message must hold
BROKEN: dict[str, tuple[list[str], list[str]]] = {
    "TP and heads": (
        [f"{TP}=3", "model.num_attention_heads=6", "model.num_query_groups=2", "model.ffn_hidden_size=48"],
        [f"{TP} = 3 (command line) does not divide model.num_query_groups = 2", "nearest legal: 2"],
    ),
    "TP above the KV heads": (
        [f"{TP}=6", "model.num_attention_heads=12", "model.kv_channels=8"],
        [
            f"{TP} = 6 (command line) does not divide model.num_query_groups = 4",
            "no multiple",
            "nearest legal: 4",
        ],
    ),
    "TP and the rows of QKV": (
        [f"{TP}=6", "model.num_attention_heads=6", "model.num_query_groups=2", "model.kv_channels=8"],
        ["does not divide model.num_query_groups = 2", "nor the 80 rows", "nearest legal: 2"],
    ),
    "TP and FFN": (
        [f"{TP}=4", "model.ffn_hidden_size=190"],
        [f"{TP} = 4 (command line) does not divide model.ffn_hidden_size = 190", "nearest legal: 2"],
    ),
    "SP without TP": (
        ["parallel.sequence_parallel=true"],
        ["parallel.sequence_parallel = true (command line)", f"needs {TP} > 1"],
    ),
    "SP and length": (
        [f"{TP}=4", "parallel.sequence_parallel=true", "data.seq_length=66"],
        ["data.seq_length = 66 (command line) is not a multiple", "nearest legal: 64 or 68"],
    ),
    "PP above layers": (
        [f"{PP}=8"],
        [
            "8 stages for 4 layers; use at most 4",
            f"{PP} = 8 (command line)",
            "model.num_layers = 4 (run.yaml:2)",
        ],
    ),
    "uneven PP": ([f"{PP}=3"], ["4 layers do not divide evenly over 3", f"{PP} = 3 (command line)"]),
    "chunks": (
        [f"{PP}=2", f"{VPP}=3"],
        ["stage 0 has 2 layers, which 3 chunks do not divide", f"{VPP} = 3 (command line)"],
    ),
    "VPP without PP": ([f"{VPP}=2"], [f"{VPP} = 2 (command line) needs {PP} > 1"]),
    "VPP of 1": ([f"{PP}=2", f"{VPP}=1"], [f"{VPP} = 1 (command line)", "set it to null"]),
    "batch": (
        ["train.micro_batch_size=3"],
        [
            "train.global_batch_size = 8 (default) is not a multiple of micro_batch_size 3 x DP 1 = 3",
            "6 or 9",
        ],
    ),
    "batch below one micro-batch": (["train.micro_batch_size=16"], ["= 16; nearest legal: 16"]),
    "interleaved batch": (
        [*INTERLEAVED, "train.global_batch_size=7"],
        ["train.global_batch_size = 7 (command line)", "x PP 2", "nearest legal: 6 or 8"],
    ),
    "trap 1": (
        [*INTERLEAVED, "parallel.deallocate_pipeline_outputs=true"],
        ["parallel.deallocate_pipeline_outputs = true (command line)", "gloo", "set it to false or null"],
    ),
    "trap 2": (
        [*INTERLEAVED, "parallel.overlap_p2p_comm=false"],
        ["parallel.overlap_p2p_comm = false (command line)", "swapped", "set it to true or null"],
    ),
    "overlap in 1F1B": (
        [f"{PP}=2", "parallel.overlap_p2p_comm=true"],
        ["parallel.overlap_p2p_comm = true (command line)", f"needs {VPP}"],
    ),
    "param gather without distributed optimizer": (
        [
            "parallel.overlap_param_gather=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.use_distributed_optimizer=false",
        ],
        [
            "parallel.overlap_param_gather = true (command line) needs parallel.use_distributed_optimizer: true"
        ],
    ),
    "param gather without overlapped reduction": (
        ["parallel.overlap_param_gather=true"],
        ["parallel.overlap_param_gather = true (command line) needs parallel.overlap_grad_reduce: true"],
    ),
    "fp8 weights without fp8": (
        ["precision.fp8_param_gather=true"],
        ["precision.fp8_param_gather = true (command line) needs precision.fp8"],
    ),
    "evaluation without data": (
        ["train.eval_interval=5"],
        ["train.eval_interval = 5 (command line) without data.validation"],
    ),
    "min_lr": (
        ["optimizer.min_lr=1e-3"],
        ["optimizer.min_lr = 0.001 (command line) is greater than optimizer.lr = 1e-05 (default)"],
    ),
    "warm-up start": (
        ["schedule.lr_warmup_init=1"],
        ["schedule.lr_warmup_init = 1.0 (command line) is greater than optimizer.lr"],
    ),
    "both warm-ups": (
        ["schedule.lr_warmup_iters=1", "schedule.lr_warmup_tokens=1"],
        ["schedule.lr_warmup_iters = 1", "schedule.lr_warmup_tokens = 1", "give one of them"],
    ),
    "warm-up in iterations too long": (
        ["schedule.lr_warmup_iters=20"],
        ["schedule.lr_warmup_iters = 20 (command line)", "20 iterations", "at most 19"],
    ),
    "warm-up in tokens too long": (
        ["schedule.lr_warmup_tokens=999999"],
        ["schedule.lr_warmup_tokens = 999999 (command line)", "20 iterations", "at most 10176 tokens"],
    ),
    "warm-up and given decay end": (
        ["schedule.lr_warmup_iters=10", "schedule.lr_decay_iters=10", "schedule.lr_decay_style=cosine"],
        ["schedule.lr_warmup_iters = 10", "does not end before schedule.lr_decay_iters", "at most 9"],
    ),
    "WSD decay too long": (
        ["schedule.lr_warmup_iters=10", "schedule.lr_wsd_decay_iters=11"],
        ["schedule.lr_wsd_decay_iters = 11 (command line) does not fit", "at most 10"],
    ),
    "WSD drop": (
        ["schedule.lr_decay_iters=10"],
        ["schedule.lr_decay_iters = 10 (command line) is below the 20 iterations", "at once"],
    ),
    "sequence longer than the model": (
        ["data.seq_length=256"],
        [
            "data.seq_length = 256 (command line) is greater than model.max_position_embeddings = 128 (run.yaml:2)"
        ],
    ),
    "unknown signal": (
        ["resilience.exit_signals=[SIGTERM, SIGFOO]"],
        ["resilience.exit_signals.1 = 'SIGFOO'", "SIGUSR1"],
    ),
    "signal that cannot be caught": (
        ["resilience.exit_signals=[SIGKILL]"],
        ["resilience.exit_signals.0 = 'SIGKILL'"],
    ),
    "start inside the run": (
        ["checkpoint.initialize_from=out/checkpoints/step_1"],
        ["run_dir = ", "checkpoint.initialize_from = ", "lie inside each other"],
    ),
    "run inside the start": (["run_dir=hf/out", "checkpoint.initialize_from=hf"], ["lie inside each other"]),
    "run over the start": (["checkpoint.initialize_from=out"], ["lie inside each other"]),
    "mock without length": (["train.train_iters=null"], ["train.train_iters: not given", "data.mock = true"]),
    "not mock, no stages": (["data.mock=false"], ["data.stages: not given", "data.mock: true"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_rule_refuses_with_key_place_and_remedy(load, case):
    overrides, parts = BROKEN[case]
    text = refusal(load(MOCK, *overrides))
    for part in parts:
        assert part in text, text
    assert "problems" not in text, text  # one mistake, one message


@pytest.mark.parametrize(
    ("key", "least"),
    [
        *((key, 1) for key in rules.AT_LEAST_ONE if not key.startswith("model.")),
        *((key, 0) for key in rules.AT_LEAST_ZERO),
    ],
)
def test_sizes_below_their_least_are_refused(load, key, least):
    text = refusal(load(MOCK, f"{key}={least - 1}"))
    assert text.startswith(f"{key} = {least - 1}") and text.endswith(
        f"(command line) must be at least {least}"
    )


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("optimizer.lr=0", "greater than 0"),
        ("optimizer.adam_eps=0", "greater than 0"),
        ("optimizer.adam_beta2=1", "at least 0 and below 1"),
    ],
)
def test_optimizer_numbers_outside_their_range_are_refused(load, override, rule):
    assert rule in refusal(load(MOCK, override))


def test_world_size_must_fit_and_names_the_nearest(load):
    text = refusal(load(MOCK, f"{TP}=2", f"{PP}=2"), world_size=6)
    assert "world size 6 is not a multiple" in text and "start 4 or 8 processes" in text
    assert f"{TP} = 2 (command line)" in text


def test_batch_rule_uses_the_world_size(load):
    check(load(MOCK), world_size=8)
    assert "x DP 16 = 16; nearest legal: 16" in refusal(load(MOCK), world_size=16)


def test_fp8_on_cuda(load):
    wide = ["model.num_query_groups=8", "precision.fp8=delayed"]
    check(load(MOCK, *wide), 1, "cuda")
    assert "FP8 needs bf16" in refusal(load(MOCK, *wide, "precision.params_dtype=fp32"), 1, "cuda")
    text = refusal(load(MOCK, *wide, "model.ffn_hidden_size=200", f"{TP}=2"), 2, "cuda")
    assert "ffn_hidden_size / TP = 100 must be a multiple of 16; nearest legal: 96 or 112" in text
    assert "seq_length x micro_batch_size = 40" in refusal(load(MOCK, *wide, "data.seq_length=40"), 1, "cuda")
    assert "does not support it with delayed" in refusal(
        load(MOCK, *wide, "precision.first_last_layers_bf16=true"), 1, "cuda"
    )


def test_early_deallocation_with_interleaving_is_right_on_nccl(load):
    check(load(MOCK, *INTERLEAVED, "parallel.deallocate_pipeline_outputs=true"), 2, "cuda")


def test_length_of_stages_and_train_iters_must_agree(load):
    # 1000 tokens = 2 steps of 8 x 64, 512 tokens = 1 step
    check(load(REAL, "train.train_iters=3"))
    text = refusal(load(REAL, "train.train_iters=5"))
    assert "train.train_iters = 5 (command line) does not agree" in text
    assert "2 + 1 = 3 iterations of 512 tokens; set train_iters to 3 or null" in text


def test_mock_data_ignores_stages(load):
    check(load(REAL, "data.mock=true", "train.train_iters=50"))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("data.sources.zh=null", "mixture.zh: no source of this name in data.sources"),
        ("data.stages.0.mixture.zh=0.3", "shares must sum to 1"),
        ("data.stages.1.name=a", "name"),
    ],
)
def test_bad_mixture_is_refused_with_its_file(load, override, part):
    text = refusal(load(REAL, override))
    assert part in text and text.endswith("(run.yaml:7)"), text


GROUP = "{topics: {share: 1, of: {en: 0.8, zh: 0.2}}}"
REWEIGHTED = [
    f"data.stages.0.mixture={GROUP}",
    "data.stages.0.mixture.en=null",
    "data.stages.0.mixture.zh=null",
    "data.validation.zh={path: zh_valid}",
    "train.eval_interval=5",
    "data.reweighting=[{group: topics, interval: 10}]",
]
# overrides over REAL, then what the one message must hold
BROKEN_DATA: dict[str, tuple[list[str], list[str]]] = {
    "max_epochs": (
        ["data.sources.en.max_epochs=0"],
        ["data.sources.en.max_epochs = 0.0 (command line) must be"],
    ),
    "first_tokens": (
        ["data.sources.en.first_tokens=0"],
        ["first_tokens = 0 (command line) must be at least 1"],
    ),
    "fraction": (
        ["data.sources.en.top_fraction=1.5", "data.sources.en.top_by=score"],
        ["data.sources.en.top_fraction = 1.5 (command line) must be above 0 and at most 1"],
    ),
    "top without by": (
        ["data.sources.en.top_fraction=0.5"],
        ["top_fraction = 0.5", "needs top_by beside it"],
    ),
    "by without top": (["data.sources.en.top_by=score"], ["top_by = score", "needs top_fraction beside it"]),
    "lowest of what": (["data.sources.en.top_is=lowest"], ["top_is = lowest (command line) needs top_by"]),
    "order_by shuffled": (
        ["data.sources.zh.order_by=perplexity"],
        ["data.sources.zh.order_by = perplexity (command line) needs order: ordered"],
    ),
    "validation too": (
        ["data.validation.en.order_by=perplexity"],
        ["data.validation.en.order_by = perplexity (command line) needs order: ordered"],
    ),
    "positions": (
        ["data.reset_position_ids=true"],
        ["reset_position_ids = true", "reset_attention_mask: true"],
    ),
    "stage length": (["data.stages.1.seq_length=0"], ["data.stages.1.seq_length = 0 (stage 'b') must be"]),
    "stage longer than the model": (
        ["data.stages.1.seq_length=256"],
        ["data.stages.1.seq_length = 256 (command line) is greater than model.max_position_embeddings = 128"],
    ),
    "stage length and SP": (
        [f"{TP}=4", "parallel.sequence_parallel=true", "data.stages.1.seq_length=66"],
        ["data.stages.1.seq_length = 66 (command line) is not a multiple", "nearest legal: 64 or 68"],
    ),
    "group nowhere": (
        [*REWEIGHTED, "data.reweighting=[{group: topic, interval: 10}]"],
        ["data.reweighting.0.group = topic (command line): no stage has a group"],
    ),
    "group twice": (
        [*REWEIGHTED, "data.reweighting=[{group: topics, interval: 10}, {group: topics, interval: 10}]"],
        ["data.reweighting.1.group = topics (command line): data.reweighting.0 has it"],
    ),
    "group of groups": (
        [*REWEIGHTED, "data.stages.0.mixture.topics.of={zh: null, x: {share: 0.2, of: {zh: 1}}}"],
        ["data.reweighting.0.group = topics", "x: a group that is re-weighted holds sources alone"],
    ),
    "member elsewhere": (
        [*REWEIGHTED, "data.stages.0.mixture={topics: {share: 0.9}, zh: 0.1}"],
        ["data.reweighting.0.group = topics", "zh stands at another place of stage a too"],
    ),
    "no validation": (
        [*REWEIGHTED, "data.validation.zh=null"],
        ["data.reweighting.0.group = topics", "no validation source for zh"],
    ),
    "unknown weight": (
        [*REWEIGHTED, "data.reweighting=[{group: topics, interval: 10, weights: {xy: 2}}]"],
        ["data.reweighting.0.weights = xy (command line): not in the group topics"],
    ),
    "interval": (
        [*REWEIGHTED, "data.reweighting=[{group: topics, interval: 12}]"],
        [
            "data.reweighting.0.interval = 12 (command line) is not a multiple of train.eval_interval = 5",
            "10 or 15",
        ],
    ),
    "interval of 0": (
        [*REWEIGHTED, "data.reweighting=[{group: topics, interval: 0}]"],
        ["must be at least 1"],
    ),
    "never evaluated": (
        [*REWEIGHTED, "train.eval_interval=null"],
        ["data.reweighting.0.interval = 10 (command line) needs train.eval_interval"],
    ),
    "alpha": (
        [*REWEIGHTED, "data.reweighting=[{group: topics, interval: 10, alpha: 0.6, weights: {en: 2}}]"],
        [
            "data.reweighting.0.alpha = 0.6 (command line) x the largest weight 2 must be below 1",
            "at most 0.499",
        ],
    ),
    "alpha of 0": (
        [*REWEIGHTED, "data.reweighting=[{group: topics, interval: 10, alpha: 0}]"],
        ["data.reweighting.0.alpha = 0.0 (command line) must be greater than 0"],
    ),
    "negative weight": (
        [*REWEIGHTED, "data.reweighting=[{group: topics, interval: 10, weights: {en: -1}}]"],
        ["data.reweighting.0.weights.en = -1.0 (command line) must be at least 0"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_DATA)
def test_data_rule_refuses_with_key_place_and_remedy(load, case):
    overrides, parts = BROKEN_DATA[case]
    text = refusal(load(REAL, *overrides))
    for part in parts:
        assert part in text, text
    assert "problems" not in text, text


def test_data_options_that_go_together_are_accepted(load):
    check(load(REAL, *REWEIGHTED))
    subset = "data.sources.en={top_fraction: 0.3, top_by: score, top_is: lowest, max_epochs: .inf}"
    check(load(REAL, subset, "data.sources.zh={order: ordered, order_by: perplexity}"))
    check(
        load(REAL, "data.reset_attention_mask=true", "data.reset_position_ids=true", "data.packing=best_fit")
    )
    check(load(MOCK, "data.reweighting=[{group: x, interval: 1}]"))


def test_documents_told_apart_on_cuda_come_one_to_a_micro_batch(load):
    packed = ["data.reset_attention_mask=true", "train.micro_batch_size=2"]
    check(load(REAL, *packed), 1, "cpu")
    assert "set micro_batch_size to 1" in refusal(load(REAL, *packed), 1, "cuda")


def test_documents_in_windows_are_refused_on_the_cpu(load):
    both = ["data.reset_attention_mask=true", "model.model_type=mistral", "model.window_size=16"]
    check(load(REAL, *both), 1, "cuda")
    assert "give one of them up" in refusal(load(REAL, *both), 1, "cpu")


def test_several_problems_are_numbered_in_one_error(load):
    text = refusal(load(MOCK, "train.eval_interval=5", f"{VPP}=2", "precision.fp8_param_gather=true"))
    lines = text.splitlines()
    assert lines[0] == "this run cannot start: 3 problems"
    assert [line.split()[0] for line in lines[1:]] == ["1.", "2.", "3."]


def test_every_rule_is_broken_by_some_case(load, tmp_path):
    """A rule that no case above reaches would be untested."""
    reached = set()
    cases = [(MOCK, overrides) for overrides, _ in BROKEN.values()]
    cases += [
        (REAL, ["data.stages.0.mixture.zh=0.3"]),
        (MOCK, ["precision.fp8=delayed", "data.seq_length=40"]),
        *((REAL, overrides) for overrides, _ in BROKEN_DATA.values()),
    ]
    (tmp_path / "en.json").write_text('{"counts": {"tokens": 100}}')
    for text, overrides in cases:
        config = load(text, *overrides)
        facts = rules.Facts(config, resolve_model(config.model), 3, "cpu")
        reached |= {rule.__name__ for rule in rules.RULES if list(rule(facts))}
    elsewhere = {rule.__name__ for rule in rules.CONTEXT_RULES}  # test_context_rules.py
    elsewhere |= {rule.__name__ for rule in rules.STAGE_RULES}  # test_stage_rules.py
    elsewhere |= {rule.__name__ for rule in rules.FP8_RULES}  # test_fp8_rules.py
    elsewhere |= {rule.__name__ for rule in rules.MEMORY_RULES}  # test_memory_rules.py
    elsewhere |= {rule.__name__ for rule in rules.TRAINABLE_RULES}  # test_trainable_rules.py
    elsewhere |= {rule.__name__ for rule in rules.HARNESS_RULES}  # test_harness_rules.py
    elsewhere |= {rule.__name__ for rule in rules.MONITOR_RULES}  # test_monitor_rules.py
    elsewhere |= {rule.__name__ for rule in rules.DETERMINISM_RULES}  # test_determinism_rules.py
    assert {rule.__name__ for rule in rules.RULES} - reached - elsewhere == set()


# --- launching -----------------------------------------------------------------------------------------------


def launch_refusal(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_launch(config)
    return str(caught.value)


def test_launch_accepts_a_matching_request(load):
    check_launch(load(MOCK))
    check_launch(
        load(MOCK, f"{TP}=2", "launch.nodes=2", "launch.ntasks_per_node=2", "launch.gpus_per_node=0")
    )


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            [f"{TP}=4", f"{PP}=4", "launch.nodes=1"],
            ["launch.nodes = 1 (command line) x launch.ntasks_per_node = 8 (default)", "start 16 processes"],
        ),
        (["parallel.data_parallel_size=4"], ["world size 8 is not", "= 4; start 4 processes"]),
        (["launch.gpus_per_node=4"], ["launch.gpus_per_node = 4 (command line)", "one process per GPU"]),
        (["platform=cuda", "launch.gpus_per_node=0"], ["launch.gpus_per_node = 0", "platform = cuda"]),
        (["launch.nodes=0"], ["launch.nodes = 0 (command line) must be at least 1"]),
        (["launch.time=1d"], ["launch.time: '1d' is not a time limit", "24:00:00", "(command line)"]),
        (["launch.time=00:05:00"], ["launch.signal_lead_seconds = 300 (default) is not below", "= 300 s"]),
        (["launch.env={A B: c}"], ["launch.env.A B: not a name"]),
        (['launch.env={A: "b\\nc"}'], ["launch.env.A: the value has a line break"]),
    ],
)
def test_launch_rules_refuse(load, overrides, parts):
    text = launch_refusal(load(MOCK, *overrides))
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("1-02:03", 93780),
        ("1-02:03:04", 93784),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_slurm_does(text, seconds):
    assert time_limit_seconds(text) == seconds
