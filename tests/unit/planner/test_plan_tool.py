"""``tools/plan.py``: what it says is consistent, what it refuses it refuses as the trainer does, and it is light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_syne.config.loader import load_config, to_yaml
from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import ConfigError, DataError, run_cli
from megatron_syne.models.config import resolve_model
from megatron_syne.planner import cli
from megatron_syne.planner.asked import token_count
from megatron_syne.planner.hardware import GIB, gpu_named
from megatron_syne.planner.report import text_of
from megatron_syne.preflight.rules import check

ROOT = Path(__file__).resolve().parents[3]
SYNE = str(ROOT / "examples/llama3_8b/syne.yaml")
INF = str(ROOT / "examples/inf_34b/inf_34b.yaml")
LLAMA = ["--model", "llama3_8b", "--seq-length", "8192", "--global-batch-size", "128"]
LAYOUT = ["--tensor-model-parallel-size", "2", "--context-parallel-size", "2"]


HF_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "initializer_range": 0.02,
}


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


def facts(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    assert cli.main([*argv, "--json"]) == code
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        cli.main(list(argv))
    return str(caught.value)


def test_the_tool_needs_neither_torch_nor_pictures() -> None:
    code = (
        "import sys, runpy; sys.argv = ['plan.py', *sys.argv[1:]]\n"
        "for name in ('torch', 'megatron', 'transformers', 'matplotlib', 'plotly'): sys.modules[name] = None\n"
        "runpy.run_path('tools/plan.py', run_name='__main__')\n"
    )
    argv = [sys.executable, "-c", code, *LLAMA, "--gpus", "16", "--search", "--tokens", "100B"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("Memory of a rank", "Why the first is the first", "MFU =", "GPU-hours", "median error"):
        assert words in done.stdout


def test_the_figures_agree_with_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    plan = facts(capsys, *LLAMA, *LAYOUT, "--gpus", "16", "--tokens", "100B")
    gpu = gpu_named("h100")
    assert plan["layout"]["data_parallel_size"] == 4
    assert plan["layout"]["sequence_parallel"] is True
    for stage in plan["memory"]:
        assert stage["total"] == sum(stage["components"].values())
    assert plan["peak_bytes"] == max(stage["total"] for stage in plan["memory"])
    assert plan["fits"] == (plan["peak_bytes"] <= gpu.memory_bytes)
    (step,) = plan["stages"]
    assert step["num_microbatches"] == 128 // 4
    assert step["iterations"] == -(-100 * 10**9 // (128 * 8192))
    assert step["step_seconds"] == pytest.approx(sum(step["parts"].values()))
    pace = step["tokens_per_second_per_gpu"]
    assert pace == pytest.approx(128 * 8192 / step["step_seconds"] / 16)
    assert step["mfu"] == pytest.approx(pace * step["model_flops_per_token"] / gpu.bf16_flops)
    assert step["hours"] == pytest.approx(step["tokens"] / pace / 16 / 3600)
    assert step["gpu_hours"] == pytest.approx(step["hours"] * 16)
    assert plan["run"]["hours"] == pytest.approx(step["hours"] + plan["run"]["checkpoint_hours"])
    chosen = [row for row in plan["recompute"] if row["chosen"]]
    assert [row["total"] for row in chosen] == [plan["peak_bytes"]]
    assert len(plan["recompute"]) == 7


def test_recompute_is_told_also_where_it_is_none_of_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "4"]
    plan = facts(capsys, *LLAMA, *LAYOUT, *more, "--gpus", "16")
    assert plan["layout"]["recompute"] == "all layers, 4 at a time"
    assert [row["total"] for row in plan["recompute"] if row["chosen"]] == [plan["peak_bytes"]]


def test_each_stage_has_its_own_budget(capsys: pytest.CaptureFixture[str]) -> None:
    plan = facts(capsys, "--config", INF)
    general, long, last = plan["stages"]
    assert (plan["gpus"], plan["memory_of"]) == (256, "long_context")
    assert (general["seq_length"], long["seq_length"]) == (4096, 32768)
    assert (general["global_batch_size"], long["global_batch_size"]) == (2048, 256)
    assert [round(each["tokens"] / 1e9) for each in plan["stages"]] == [2000, 1000, 500]
    assert long["tokens_per_second_per_gpu"] < general["tokens_per_second_per_gpu"]
    assert general["parts"] == last["parts"]
    run = plan["run"]
    assert run["hours"] == pytest.approx(
        sum(each["hours"] for each in plan["stages"]) + run["checkpoint_hours"]
    )
    assert run["checkpoints"] == -(-run["iterations"] // 500)


def test_the_worlds_size_is_the_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    assert facts(capsys, "--config", SYNE)["gpus"] == 64
    by_launch = ["parallel.data_parallel_size=null", "launch.nodes=4", "launch.ntasks_per_node=8"]
    assert facts(capsys, "--config", SYNE, *by_launch)["gpus"] == 32
    assert facts(capsys, "--config", SYNE, "--gpus", "128", "parallel.data_parallel_size=null")["gpus"] == 128


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor_model_parallel_size=3"],
        ["train.global_batch_size=100"],
        ["memory.recompute_granularity=full"],
        ["precision.fp8=delayed", "precision.first_last_layers_bf16=true"],
    ],
)
def test_what_cannot_run_is_refused_with_the_trainers_words(overrides: list[str]) -> None:
    config = load_config(SYNE, overrides)
    with pytest.raises(ConfigError) as trainers:
        check(config, resolve_model(config.model), 64, "cuda")
    assert refused("--config", SYNE, "--gpus", "64", *overrides) == str(trainers.value)


def test_the_models_three_ways_in_are_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_8B))
    rest = ["--seq-length", "8192", "--global-batch-size", "128", "--gpus", "8", *LAYOUT]
    plans = [
        facts(capsys, "--model", name, *rest)
        for name in ("llama3_8b", str(folder), str(folder / "config.json"))
    ]
    for plan in plans:
        plan["model"].pop("name")
    assert plans[0] == plans[1] == plans[2]
    smaller = facts(capsys, "--model", str(folder / "config.json"), *rest, "model.num_layers=16")
    assert smaller["model"]["parameters"] < plans[0]["model"]["parameters"]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_precision_names_fp8s_recipes(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    bf16 = facts(capsys, *LLAMA, *LAYOUT, "--gpus", "16")
    fp8 = facts(capsys, *LLAMA, *LAYOUT, "--gpus", "16", "--precision", recipe)
    assert fp8["precision"] == recipe
    assert fp8["stages"][0]["tokens_per_second_per_gpu"] > bf16["stages"][0]["tokens_per_second_per_gpu"]


def test_several_counts_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    told = facts(capsys, *LLAMA, *LAYOUT, "--gpus", "8", "16", "12", "--tokens", "100B")
    eight, sixteen, twelve = told["counts"]
    assert "is not a multiple of tensor 2 x pipeline 1 x context 2" not in str(eight)
    assert eight["hours"] > sixteen["hours"] > 0
    assert "train.global_batch_size = 128" in twelve["refused"]
    text = said(capsys, *LLAMA, *LAYOUT, "--gpus", "8", "16", "12", "train.seed=3")
    assert "12 GPUs: train.global_batch_size = 128 (command line) is not a multiple of" in text
    assert text.count(" yes ") == 2


RAMP = "train.rampup_batch_size=[32,32,500000]"


def test_a_ramp_trains_the_budget_and_costs_the_same_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*LLAMA, *LAYOUT, "--tokens", "10B", RAMP, "checkpoint.save_interval=100"]
    plan = facts(capsys, *argv, "--gpus", "16")
    assert 0 <= plan["run"]["tokens"] - 10**10 < 128 * 8192
    plain = facts(capsys, *[text for text in argv if text != RAMP], "--gpus", "16")
    assert plan["run"]["iterations"] > plain["run"]["iterations"]
    told = facts(capsys, *argv, "--gpus", "16", "32")["counts"][0]
    assert plan["run"]["checkpoint_hours"] > 0.01
    for name in ("hours", "gpu_hours", "checkpoint_hours"):
        assert told[name] == plan["run"][name]


def test_several_counts_all_refused_are_an_error() -> None:
    for more in ([], ["--search"]):
        text = refused(*LLAMA, "--gpus", "7", "9", *more)
        assert "7 GPUs: " in text and "\n9 GPUs: " in text
        assert "nearest legal: 126 or 133" in text


@pytest.mark.parametrize(
    ("gpu", "recipe"), [("a100-80gb", "tensorwise"), ("a100-40gb", "delayed"), ("l40s", "blockwise")]
)
def test_fp8_that_a_gpu_has_not(gpu: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*LLAMA, *LAYOUT, "--gpu", gpu, "--gpus", "64", f"precision.fp8={recipe}"]
    for more in ([], ["--search"], ["--gpus", "32", "64"]):
        text = refused(*argv, *more)
        assert f"precision.fp8 = {recipe}: --gpu {gpu}" in text
        assert text.partition("these have: ")[2].startswith("h100, ")
        assert "a100" not in text.partition("these have: ")[2]
    taken = [["precision.fp8_emulation=true"], *([["precision.fp8=tensorwise"]] if gpu == "l40s" else [])]
    for more in taken:
        assert cli.main([*argv, *more, "--json"]) in (0, cli.EXIT_DOES_NOT_FIT)
        assert json.loads(capsys.readouterr().out)["stages"][0]["step_seconds"] > 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*LLAMA, *LAYOUT, "--gpus", "16"], []),
        (["--config", INF, "--gpus", "256"], ["sequences of 32,768 tokens and more (off by up to "]),
        ([*LLAMA, *LAYOUT, "--gpus", "16", "--gpu", "h200"], ["h200 (off by "]),
        ([*LLAMA, *LAYOUT, "--gpus", "64", "--gpu", "a100-80gb"], ["a100-80gb (never measured against)"]),
        (
            ["--model", "llama3_1_405b", *LLAMA[2:], "--gpus", "1024", "--tensor-model-parallel-size", "8"],
            ["more than 80 billion parameters (off by up to "],
        ),
    ],
)
def test_a_plan_outside_of_what_was_measured_says_so(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main([*argv, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert len(told["accuracy"]["outside"]) == len(words)
    for said_, expected in zip(told["accuracy"]["outside"], words, strict=True):
        assert said_.startswith(expected)
    assert ("This plan lies outside of those rows" in text_of(told)) == bool(words)
    if words and "--gpus" in argv:
        cli.main([*argv[: argv.index("--gpus") + 1], "512", *argv[argv.index("--gpus") + 1 :]])
        assert "lies outside" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--precision", "tensorwise", "--tokens", "7B", RAMP],
        [
            "model.num_layers=16",
            "precision.fp8=blockwise",
            "precision.fp8_guard.interval=7",
            "optimizer.use_precision_aware_optimizer=true",
            "optimizer.exp_avg_dtype=bf16",
            "parallel.overlap_grad_reduce=false",
            "parallel.overlap_param_gather=false",
            "checkpoint.save_interval=100",
            "optimizer.lr=1.0e-05",
        ],
    ],
)
def test_the_yaml_that_a_search_prints_is_the_run_it_predicts(
    more: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = [*LLAMA, "--gpus", "16", *more]
    planned = facts(capsys, *argv, "--search")
    text = said(capsys, *argv, "--search").partition("The first as a YAML file")[2]
    path = tmp_path / "run.yaml"
    path.write_text(text.partition("\n")[2].partition("\n\n")[0])
    again = facts(capsys, "--config", str(path), "--gpus", "16")
    assert planned.pop("search")["candidates"]
    assert again == planned


def test_the_yaml_of_a_model_in_a_folder_finds_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(HF_8B))
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "hf/config.json"):
        text = said(capsys, "--model", name, *LLAMA[2:], "--gpus", "16", "--search")
        path = tmp_path / "elsewhere" / "run.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.partition("The first as a YAML")[2].partition("\n")[2].partition("\n\n")[0])
        again = said(capsys, "--config", str(path), "--gpus", "16")
        assert text.partition("Memory of a rank")[2] == again.partition("Memory of a rank")[2]


@pytest.mark.parametrize("way", ["folder", "file", "config", "override"])
def test_more_layers_than_any_model_has(way: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_8B | {"num_hidden_layers": 1001}))
    config = RunConfig(run_dir="run")
    config.model.hf_path, config.data.mock, config.train.train_iters = str(tmp_path), True, 5
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    argv = {
        "folder": ["--model", str(tmp_path), *LLAMA[2:]],
        "file": ["--model", str(tmp_path / "config.json"), *LLAMA[2:]],
        "config": ["--config", str(tmp_path / "run.yaml")],
        "override": [*LLAMA, "model.num_layers=1001"],
    }[way]
    wanted = ConfigError if way == "override" else DataError
    field = "model.num_layers" if way == "override" else "num_hidden_layers"
    with pytest.raises(wanted, match=f"{field} = 1,001.*at most 1,000"):
        cli.main([*argv, "--gpus", "8"])


def test_search_tells_of_the_configurations_own_layout(capsys: pytest.CaptureFixture[str]) -> None:
    plan = facts(capsys, "--config", SYNE, "--search", "--top", "3")
    told = plan["search"]
    assert len(told["candidates"]) == 3
    assert told["own"]["layout"].startswith("TP 2 x PP 2 x CP 1 x DP 16")
    assert told["own"]["run_seconds"] >= told["candidates"][0]["run_seconds"]
    assert told["reasons"]
    assert 0 < told["close"] < told["fit"]
    text = text_of(plan)
    assert "Write into the YAML:" in text
    written = text.partition("Write into the YAML:\n")[2].partition("\n\n")[0]
    for section, options in yaml.safe_load(written).items():
        for name, value in options.items():
            assert told["candidates"][0]["overrides"][f"{section}.{name}"] == value


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*LLAMA, "--gpus", "1", "--search"]) == cli.EXIT_DOES_NOT_FIT
    text = capsys.readouterr().out
    assert "0 fit; the nearest misses" in text
    assert "What would make it fit" in text
    assert "DOES NOT FIT" in text
    assert "The first in detail" not in text


def test_cpu_platform_has_bytes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    plan = facts(capsys, "--config", SYNE, "platform=cpu", "model.num_layers=2")
    assert plan["gpu"] is None
    assert plan["peak_bytes"] > 0
    assert "stages" not in plan
    assert "no speed is predicted" in said(capsys, "--config", SYNE, "platform=cpu", "model.num_layers=2")


def test_pictures_are_drawn_only_when_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def draw_plan(folder: Path, *rest: Any) -> list[Path]:
        calls.append((folder, *rest))
        return [folder / "memory.png"]

    stand_in = type(sys)("megatron_syne.planner.drawings")
    stand_in.draw_plan = draw_plan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron_syne.planner.drawings", stand_in)
    said(capsys, *LLAMA, *LAYOUT, "--gpus", "16")
    assert not calls
    assert f"picture: {tmp_path / 'memory.png'}" in said(
        capsys, *LLAMA, *LAYOUT, "--gpus", "16", "--plot", str(tmp_path)
    )
    said(capsys, *LLAMA, "--gpus", "16", "--search", "--plot", str(tmp_path))
    (_, plain, _, world, gpu, none), (*_, candidates) = calls
    assert (plain.parallel.tensor_model_parallel_size, world, gpu.name, none) == (2, 16, "h100", None)
    assert candidates[0].fits(gpu)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "llama9", "--gpus", "8"], "presets: inf_34b"),
        ([*LLAMA, "--gpus", "8", "--gpu", "z9"], "known: h100"),
        ([*LLAMA, "--gpus", "8", "--precision", "fp4"], "known: bf16, fp32, delayed"),
        ([*LLAMA, "--gpus", "0"], "from 1 to 1,000,000"),
        ([*LLAMA, "--gpus", "99999999"], "from 1 to 1,000,000"),
        (LLAMA, "--gpus: not given"),
        ([*LLAMA, "--gpus", "8", "--tokens", "many"], "write 100B"),
        ([*LLAMA, "--gpus", "12", *LAYOUT], "nearest legal"),
        ([*LLAMA, "--gpus", "6", *LAYOUT], "is not a multiple of tensor 2 x pipeline 1 x context 2 = 4"),
        ([*LLAMA, "--gpus", "8", "--micro-batch-size", "x"], "train.micro_batch_size: expected an integer"),
        ([*LLAMA, "--gpus", "8", "paralel.tp=2"], "unknown key"),
        (["--model", "llama3_8b", "--gpus", "8", "--seq-length", "8192"], "--global-batch-size: not given"),
        (["--config", SYNE, "--tokens", "3B", "--seq-length", "4"], "--seq-length, --tokens: with --model"),
        (
            ["--config", SYNE, "--gpus", "32"],
            "world size 32 is not tensor 2 x pipeline 2 x context 1 x data 16",
        ),
    ],
)
def test_bad_input_is_named(argv: list[str], words: str) -> None:
    assert words in refused(*argv)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--model", "llama9", "--gpus", "8"], 64),
        (["--config", "no_such.yaml"], 66),
        (["--config", SYNE, "--model", "llama3_8b"], 64),
        ([], 64),
        (["--config", SYNE, "--top", "0"], 64),
        (["--config", SYNE, "--search", "platform=cpu"], 64),
        (["--config", SYNE, "--gpus", "64", "128", "platform=cpu"], 64),
        ([*LLAMA, "--gpus", "8", "16", "--plot", "pictures"], 64),
        ([*LLAMA, "--gpus", "7", "9", "--json"], 64),
        ([*LLAMA, "--gpus", "8", "--tokens", "9" * 400], 64),
        (["--model", "a" * 300, "--gpus", "8", *LLAMA[2:]], 64),
        (["--config", "a" * 300], 66),
    ],
)
def test_exit_codes(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        given = run_cli(lambda: cli.main(argv))
    except SystemExit as exit_:
        given = int(exit_.code or 0)
    assert given == code
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("100B", 10**11),
        ("7.5B", 7_500_000_000),
        ("1_000", 1000),
        ("3T", 3 * 10**12),
        ("12", 12),
        ("2K", 2000),
    ],
)
def test_token_counts(text: str, count: int) -> None:
    assert token_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "1e9", "-5B", "0", "0.1", "100 B", "100b", "1BB", "nan", "inf"])
def test_what_is_no_count_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError, match="--tokens"):
        token_count(text)


def test_a_written_plan_is_the_same_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """``--model`` with its options, and the YAML file of the same run."""
    options = facts(capsys, *LLAMA, *LAYOUT, "--gpus", "16", "--tokens", "5B")
    config = RunConfig(run_dir="run")
    config.model.preset = "llama3_8b"
    config.data.mock, config.data.seq_length = True, 8192
    config.train.global_batch_size, config.train.train_iters = 128, -(-5 * 10**9 // (128 * 8192))
    config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size = 2, 2
    config.parallel.sequence_parallel = True
    config.parallel.overlap_grad_reduce = config.parallel.overlap_param_gather = True
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert facts(capsys, "--config", str(tmp_path / "run.yaml"), "--gpus", "16") == options
    assert options["gpu"]["memory_bytes"] <= 80 * GIB
