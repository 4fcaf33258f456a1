"""YAML files, bases and overrides become one typed configuration; every mistake is named with its place."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_syne.config.loader import config_origin, load_config, save_resolved, to_yaml
from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import CannotCreate, ConfigError, MissingInput, SecurityRefusal


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a YAML file into a fresh working directory and return its path."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def message_of(path: Path, *overrides: str, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        load_config(path, list(overrides))
    assert type(caught.value) is kind
    return str(caught.value)


def test_defaults_and_given_values(write):
    config = load_config(write("run_dir: out\ntrain: {micro_batch_size: 2}\n"))
    assert config.train.micro_batch_size == 2
    assert config.train.global_batch_size == RunConfig().train.global_batch_size


def test_yaml_1_1_surprises_are_read_as_meant(write):
    config = load_config(
        write(
            "run_dir: out\noptimizer: {lr: 1e-5, min_lr: 0}\nlaunch: {time: 24:00:00}\n"
            "data: {sources: {no: {path: x}}, stages: [{name: on, tokens: 92_500_000_000, mixture: {no: 1}}]}\n"
        )
    )
    assert config.optimizer.lr == 1e-5
    assert isinstance(config.optimizer.min_lr, float)
    assert config.launch.time == "24:00:00"
    assert list(config.data.sources) == ["no"]
    assert config.data.stages[0].name == "on"
    assert config.data.stages[0].tokens == 92_500_000_000
    assert config.data.stages[0].mixture == {"no": 1}


# --- bases -------------------------------------------------------------------------------------------


def test_base_merges_mappings_and_replaces_lists(write):
    write(
        "data:\n  seq_length: 64\n  sources: {en: {path: en}, zh: {path: zh}}\n"
        "resilience: {exit_signals: [SIGTERM, SIGUSR1]}\nparallel: {data_parallel_size: 4}\n",
        "bases/base.yaml",
    )
    config = load_config(
        write(
            "base: bases/base.yaml\nrun_dir: out\n"
            "data: {sources: {zh: null, math: {path: math}}}\n"
            "resilience: {exit_signals: [SIGINT]}\nparallel: {data_parallel_size: null}\n"
        )
    )
    assert config.data.seq_length == 64
    assert set(config.data.sources) == {"en", "math"}  # merged by key; null takes one out
    assert config.resilience.exit_signals == ["SIGINT"]
    assert config.parallel.data_parallel_size is None  # null resets


def test_later_bases_lie_over_earlier_ones_and_may_have_bases(write):
    write("train: {seed: 1, eval_iters: 1}\n", "grand.yaml")
    write("base: grand.yaml\ntrain: {eval_iters: 2, micro_batch_size: 2}\n", "a.yaml")
    write("train: {micro_batch_size: 3}\n", "b.yaml")
    train = load_config(write("base: [a.yaml, b.yaml]\nrun_dir: out\n")).train
    assert (train.seed, train.eval_iters, train.micro_batch_size) == (1, 2, 3)


def test_base_cycle_is_refused_with_the_chain(write):
    write("base: run.yaml\n", "other.yaml")
    text = message_of(write("base: other.yaml\nrun_dir: out\n"))
    assert "run.yaml -> other.yaml -> run.yaml" in text


def test_the_same_base_twice_is_no_cycle(write):
    write("train: {seed: 7}\n", "common.yaml")
    write("base: common.yaml\n", "a.yaml")
    write("base: common.yaml\n", "b.yaml")
    assert load_config(write("base: [a.yaml, b.yaml]\nrun_dir: out\n")).train.seed == 7


def test_base_must_be_a_name_and_exist(write):
    assert "run.yaml:2" in message_of(write("run_dir: out\nbase: 3\n"))
    assert "absent.yaml" in message_of(write("base: absent.yaml\n"), kind=MissingInput)
    assert "in a file only" in message_of(write("run_dir: out\n"), "base=x.yaml")


# --- overrides ---------------------------------------------------------------------------------------


def test_overrides_lie_above_files(write):
    path = write(
        "run_dir: out\ntrain: {exit_interval: 5}\n"
        "data: {stages: [{name: a, tokens: 1, mixture: {en: 1.0}}, {name: b, tokens: 2}]}\n"
    )
    config = load_config(
        path,
        [
            "parallel.tensor_model_parallel_size=2",
            "train.exit_interval=null",
            "data.sources.en.path=corpus/en",
            "data.stages.1.tokens=100",
            "data.stages.0.mixture.en=0.5",
            "launch.env={A: b=c}",
            "optimizer.lr=3e-4",
        ],
    )
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.train.exit_interval is None
    assert config.data.sources["en"].path == str(Path.cwd() / "corpus/en")
    assert [stage.tokens for stage in config.data.stages] == [1, 100]
    assert config.data.stages[0].mixture == {"en": 0.5}
    assert config.launch.env == {"A": "b=c"}
    assert config.optimizer.lr == 3e-4


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.seed", "section.key=value"),
        ("train..seed=1", "section.key=value"),
        ("=1", "section.key=value"),
        ("data.stages.2.tokens=1", "'2' is no entry of a list that has 0 to 0"),
        ("data.stages.-1.tokens=1", "'-1' is no entry"),
        ("data.stages.first.tokens=1", "'first' is no entry"),
        ("run_dir.x=1", "'x' cannot be set inside 'out' (text) (run.yaml:1)"),
        ("train.seed=[1", "not valid YAML"),
        ("train.seed={a: 1, a: 2}", "duplicate key 'a'"),
        ("train.seed=*x", "command line"),
    ],
)
def test_malformed_override_is_named(write, override, part):
    path = write("run_dir: out\ndata: {stages: [{name: a, tokens: 1}]}\n")
    text = message_of(path, override)
    assert part in text
    assert "command line" in text or override in text


# --- unknown, wrong, missing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "key", "nearest"),
    [
        ("train: {micro_batchsize: 1}", "train.micro_batchsize", "train.micro_batch_size"),
        ("train: {lr: 1.0}", "train.lr", "optimizer.lr"),
        ("train: {learning_rate: 1.0}", "train.learning_rate", "optimizer.lr"),
        ("lr: 1.0", "lr", "optimizer.lr"),
        ("optimiser: {lr: 1.0}", "optimiser", "optimizer"),
        ("parallel: {tp: 2}", "parallel.tp", "parallel.tensor_model_parallel_size"),
        ("parallel: {sequence-parallel: true}", "parallel.sequence-parallel", "parallel.sequence_parallel"),
        ("data: {sources: {en: {pth: x, path: x}}}", "data.sources.en.pth", "data.sources.en.path"),
        (
            "data: {stages: [{name: a, tokens: 1, mixtures: {}}]}",
            "data.stages.0.mixtures",
            "data.stages.0.mixture",
        ),
    ],
)
def test_unknown_key_names_key_line_and_nearest(write, line, key, nearest):
    text = message_of(write(f"run_dir: out\n\n{line}\n"))
    assert text == f"{key}: unknown key (run.yaml:3); did you mean {nearest}?"


def test_unknown_key_without_a_near_one_lists_the_section(write):
    text = message_of(write("run_dir: out\nmonitor: {zzzzzz: 1}\n"))
    assert "monitor has log_interval, tensorboard, progress" in text


def test_unknown_key_in_a_base_names_the_base(write):
    write("\ntrain:\n  sed: 1\n", "base.yaml")
    assert message_of(write("base: base.yaml\nrun_dir: out\n")) == (
        "train.sed: unknown key (base.yaml:3); did you mean train.seed?"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train: {seed: true}", "train.seed: expected an integer, found true (true/false) (run.yaml:2)"),
        ("train: {seed: 1.5}", "train.seed: expected an integer, found 1.5 (number) (run.yaml:2)"),
        (
            "train: {seed: 1e3}",
            "train.seed: expected an integer, found 1000.0 (number) (run.yaml:2); write 1_000",
        ),
        ("train: {seed: '1'}", "train.seed: expected an integer, found '1' (text) (run.yaml:2)"),
        ("train: {seed: 010}", "train.seed: expected an integer, found '010' (text) (run.yaml:2)"),
        (
            "optimizer: {lr: small}",
            "optimizer.lr: expected a finite number, found 'small' (text) (run.yaml:2)",
        ),
        (
            "optimizer: {lr: false}",
            "optimizer.lr: expected a finite number, found false (true/false) (run.yaml:2)",
        ),
        ("optimizer: {lr: .inf}", "optimizer.lr: expected a finite number, found inf (number) (run.yaml:2)"),
        ("optimizer: {lr: 1e999}", "optimizer.lr: expected a finite number, found inf (number) (run.yaml:2)"),
        ("data: {mock: yes}", "data.mock: expected true or false, found 'yes' (text) (run.yaml:2)"),
        ("data: {mock: 1}", "data.mock: expected true or false, found 1 (integer) (run.yaml:2)"),
        ("data: {stages: {}}", "data.stages: expected a list, found an empty mapping (run.yaml:2)"),
        (
            "data: {stages: [3]}",
            "data.stages.0: expected a mapping with keys such as name, tokens, mixture, found 3",
        ),
        ("data: {sources: [a]}", "data.sources: expected a mapping, found a list of 1 (run.yaml:2)"),
        ("train: 3", "train: expected a mapping with keys such as micro_batch_size"),
        (
            "launch: {job_name: 12}",
            "launch.job_name: expected text, found 12 (integer) (run.yaml:2); put it in quotes",
        ),
        ("launch: {setup_lines: [a, null]}", "launch.setup_lines.1: expected text, found null"),
        ("launch: {env: {A: 1}}", "launch.env.A: expected text, found 1 (integer)"),
        (
            "schedule: {lr_decay_style: wsd}",
            "schedule.lr_decay_style: expected one of constant, linear, cosine, inverse-square-root, WSD, "
            "found 'wsd' (text) (run.yaml:2); did you mean WSD?",
        ),
        (
            "precision: {fp8: 8}",
            "precision.fp8: expected one of delayed, tensorwise, blockwise, found 8 (integer)",
        ),
    ],
)
def test_wrong_type_names_key_place_expected_and_found(write, line, expected):
    assert message_of(write(f"run_dir: out\n{line}\n")).startswith(expected)


def test_missing_required_fields_are_named_with_the_file(write):
    text = message_of(write("data: {sources: {en: {}}, stages: [{tokens: 3}]}\n"))
    assert "4 problems" not in text and "3 problems" in text
    assert "data.sources.en.path: missing (file run.yaml:1)" in text
    assert "data.stages.0.name: missing (file run.yaml:1)" in text
    assert "run_dir: missing (file run.yaml:1); required: write 'run_dir: ...' there" in text


def test_null_for_a_required_field_is_missing(write):
    assert message_of(write("run_dir: out\n"), "run_dir=").startswith("run_dir: missing (file run.yaml:1)")


def test_all_problems_are_reported_together(write):
    text = message_of(write("run_dir: out\ntrain: {seed: x, lr: 1}\n"), "parallel.tp=2")
    assert text.splitlines()[0] == "configuration run.yaml: 3 problems"
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        "1. train.seed",
        "2. train.lr",
        "3. parallel.tp",
    ]


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch CANARY']",
        "!!python/name:os.system ''",
        "!!python/object/new:os.system ['touch CANARY']",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch CANARY']",
        "!!python/tuple [1]",
    ],
)
def test_python_tags_are_a_security_refusal(write, value):
    path = write(f"run_dir: out\ntrain:\n  seed: {value}\n")
    text = message_of(path, kind=SecurityRefusal)
    assert "run.yaml:3" in text and "would run code" in text
    message_of(write("run_dir: out\n"), f"train.seed={value}", kind=SecurityRefusal)
    assert not (path.parent / "CANARY").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("run_dir: out\ntrain: {seed: 1}\ntrain: {seed: 2}\n", "run.yaml:3: duplicate key 'train'"),
        (
            "run_dir: out\ntrain:\n  seed: 1\n  seed: 2\n",
            "run.yaml:4: duplicate key 'seed'; it stands already",
        ),
        ("run_dir: !mine out\n", "run.yaml:1: the tag !mine is not accepted"),
        ("run_dir: !!str out\n", "run.yaml:1: the tag !!str is not accepted"),
        ("a: &x 1\nb: *x\n", "run.yaml:1: anchors and aliases"),
        ("run_dir: out\n<<: {train: {seed: 1}}\n", "run.yaml:2: merge keys (<<) are not accepted"),
        ("[1, 2]\n", "run.yaml:1: expected a mapping"),
        ("just text\n", "run.yaml:1: expected a mapping"),
        ("run_dir: [out\n", "not valid YAML"),
        ("run_dir: out\n---\nrun_dir: b\n", "not valid YAML"),
        ("run_dir: \t- x\n\tb: 1\n", "not valid YAML"),
        ("run_dir: out\n? [a]\n: 1\n", "run.yaml:2: a key must be text"),
        ("run_dir: \x07\n", "not valid YAML"),
        ("a: " + "[" * 5000 + "\n", "nested deeper than"),
        ("# " + "x" * 2_000_000 + "\n", "a configuration has at most"),
    ],
)
def test_files_that_are_no_plain_configuration_are_refused(write, text, part):
    assert part in message_of(write(text))


def test_unreadable_files_are_named(write, tmp_path):
    assert "absent.yaml does not exist" in message_of(tmp_path / "absent.yaml", kind=MissingInput)
    assert "not a regular file" in message_of(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9\n")
    assert "latin.yaml: not UTF-8 text: byte 12" in message_of(tmp_path / "latin.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "not a regular file" in message_of(tmp_path / "pipe.yaml")  # and does not wait for a writer


def test_empty_file_misses_only_what_is_required(write):
    assert message_of(write("")).startswith("run_dir: missing")


# --- paths -------------------------------------------------------------------------------------------


def test_relative_paths_belong_to_the_file_they_stand_in(write, tmp_path):
    write("run_dir: ../runs/a\nmodel: {hf_path: ./hf}\ndata: {sources: {en: {path: en}}}\n", "conf/base.yaml")
    config = load_config(
        write("base: conf/base.yaml\ncheckpoint: {initialize_from: start}\n"),
        ["data.tokenizer_path=tok/../t"],
    )
    assert config.run_dir == str(tmp_path / "runs/a")
    assert config.model.hf_path == str(tmp_path / "conf/hf")
    assert config.data.sources["en"].path == str(tmp_path / "conf/en")
    assert config.checkpoint.initialize_from == str(tmp_path / "start")
    assert config.data.tokenizer_path == str(tmp_path / "t")


def test_absolute_paths_stay(write):
    assert load_config(write("run_dir: /somewhere/out\n")).run_dir == "/somewhere/out"


@pytest.mark.parametrize("value", ["~/out", "$HOME/out", "a/${X}", "''", '"a\\nb"'])
def test_nothing_is_expanded_in_paths(write, value):
    assert message_of(write(f"run_dir: {value}\n")).startswith("run_dir: expected a path")


def test_shell_lines_may_name_variables(write):
    config = load_config(write("run_dir: out\nlaunch: {setup_lines: ['source $HOME/env']}\n"))
    assert config.launch.setup_lines == ["source $HOME/env"]


# --- origins and the resolved copy ---------------------------------------------------------------------


def test_config_origin_names_where_a_value_came_from(write):
    write("\n\nmodel: {num_layers: 2}\n", "base.yaml")
    config = load_config(
        write("base: base.yaml\nrun_dir: out\ndata:\n  stages:\n  - name: a\n    tokens: 5\n"),
        ["train.seed=3"],
    )
    assert config_origin(config, "model.num_layers") == "base.yaml:3"
    assert config_origin(config, "data.stages.0.tokens") == "run.yaml:6"
    assert config_origin(config, "train.seed") == "command line"
    assert config_origin(config, "train.eval_iters") == "default"
    assert config_origin(RunConfig(run_dir="x"), "train.seed") == "default"


def test_resolved_copy_round_trips(write, tmp_path):
    config = load_config(
        write(
            "run_dir: out\noptimizer: {lr: 1e-5, adam_eps: 1e-8}\nlaunch:\n  time: 1-00:00:00\n"
            "  setup_lines: ['1e5', 'yes', 'a: b', ' x ', '010', '', '<<', 'é', \"two\\nlines\", '12:30:00']\n"
            "data:\n  sources: {en: {path: x}, 'no': {path: y}, '1': {path: z}}\n"
            "  stages: [{name: a, tokens: 3, mixture: {zh: {share: 0.2, of: {en: 1}}, 'no': 8e-1}}]\n"
        )
    )
    save_resolved(config, tmp_path / "resolved.yaml")
    again = load_config(tmp_path / "resolved.yaml")
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []
    # and a usual YAML 1.1 reader agrees
    assert yaml.safe_load(to_yaml(config)) == dataclasses.asdict(config)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20),
    number=st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_text_and_number_round_trips(tmp_path, text, number):
    config = RunConfig(run_dir=str(tmp_path))
    config.launch.job_name, config.optimizer.lr = text, number
    config.launch.env = {text: text}
    path = tmp_path / "resolved.yaml"
    save_resolved(config, path)
    assert load_config(path) == config


def test_save_leaves_the_old_file_when_the_new_one_fails(tmp_path):
    path = tmp_path / "resolved.yaml"
    path.write_text("old")
    config = RunConfig(run_dir="x")
    config.launch.env = {"A": object()}  # type: ignore[dict-item]
    with pytest.raises(yaml.YAMLError):
        save_resolved(config, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_save_into_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(CannotCreate, match=r"resolved.yaml: cannot be written"):
        save_resolved(RunConfig(run_dir="x"), tmp_path / "absent" / "resolved.yaml")


def test_config_and_preflight_do_not_import_torch():
    code = (
        "import sys, pkgutil, importlib, megatron_syne.config, megatron_syne.preflight\n"
        "for room in (megatron_syne.config, megatron_syne.preflight):\n"
        "    for module in pkgutil.iter_modules(room.__path__, room.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_infinite_number_is_for_epochs_alone(write, tmp_path):
    config = load_config(
        write("run_dir: x\ndata: {sources: {en: {path: en, max_epochs: .inf}, zh: {path: zh}}}\n")
    )
    assert config.data.sources["en"].max_epochs == float("inf") and config.data.sources["zh"].max_epochs == 1
    save_resolved(config, tmp_path / "resolved.yaml")
    assert "max_epochs: .inf\n" in (tmp_path / "resolved.yaml").read_text()
    assert load_config(tmp_path / "resolved.yaml") == config
    file = write("run_dir: x\ndata: {sources: {en: {path: en}}}\n")
    assert load_config(file, ["data.sources.en.max_epochs=.inf"]).data.sources["en"].max_epochs == float(
        "inf"
    )
    assert "expected a finite number" in message_of(file, "data.sources.en.top_fraction=.inf")
    assert "expected a finite number, found '-.inf'" in message_of(file, "data.sources.en.max_epochs=-.inf")
