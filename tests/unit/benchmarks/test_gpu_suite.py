"""The GPU measurements, without a GPU: every case is a run that preflight and memory allow, the suite goes on where it
stopped and records what failed, and the tables do the goals' arithmetic."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks" / "gpu"))

import ours
import report
import suite
from cases import CASES, FP8, MODULES, Case, case_named, tiny
from goals import MATMUL, PEERS, goals
from process import ROOT, Options, new_record, run_case, shape_of
from record import Record, read_records

from megatron_syne.config.loader import load_config
from megatron_syne.models.config import resolve_model
from megatron_syne.planner.hardware import GIB, gpu_named
from megatron_syne.planner.memory import memory_by_stage
from megatron_syne.preflight.rules import check

HERE = Path(suite.__file__).parent
OURS = [case for case in CASES if case.kind in ("ours", "profile", "stall", "loader")]


def write_run(case: Case, folder: Path, rehearse: bool) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(ours.run_options(case, folder / "tokens", folder / "run", rehearse)))
    return path


# --- the list of cases ---


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_every_case_is_a_run_that_cuda_takes_and_that_fits(case: Case, tmp_path: Path) -> None:
    config = load_config(write_run(case, tmp_path, rehearse=False))
    model = resolve_model(config.model)
    check(config, model, 1, "cuda")
    (rank,) = memory_by_stage(config, model, 1, gpu_named("h200"))
    gpu = gpu_named("h200" if not 0 < case.needs_gib < 80 else "h100")
    assert rank.total < 0.97 * gpu.memory_bytes, f"{rank.total / GIB:.1f} GiB: {rank.components}"


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_its_rehearsal_is_a_run_that_the_cpu_takes(case: Case, tmp_path: Path) -> None:
    small = tiny(case)
    config = load_config(write_run(small, tmp_path, rehearse=True))
    check(config, resolve_model(config.model), 1, "cpu")
    assert config.train.global_batch_size == case.global_batch_size
    assert (config.memory.loss_chunk_tokens is None) == ("loss_chunk" not in " ".join(case.overrides))


def test_the_list_holds_together() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert case.kind in MODULES
        if case.baseline is not None:
            assert case.prediction and case.baseline in names, case.name
            assert replace(case_named(case.baseline), name=case.name) != case
    for name in (
        *PEERS,
        *(f"8l-{recipe}" for recipe in FP8),
        "8l-bf16",
        "8b-bf16",
        "machine",
        "held-out",
    ):
        assert name in names
    assert all(case.steps >= report.MIN_STEPS for case in CASES if case.name.startswith("8l-"))
    for module in MODULES.values():  # the folder comes first in the path of its scripts
        assert module not in sys.stdlib_module_names and module not in ("transformers", "torch", "compiled")


def test_overrides_are_in_the_run(tmp_path: Path) -> None:
    case = case_named("8b-tensorwise")
    config = load_config(write_run(case, tmp_path, rehearse=False))
    assert config.precision.fp8 == "tensorwise"
    assert config.optimizer.exp_avg_dtype == "bf16" and config.memory.recompute_granularity == "full"
    assert not config.precision.accumulate_allreduce_grads_in_fp32
    assert config.data.stages[0].tokens == (case.steps + case.warm) * 8192


def test_the_engine_takes_what_is_put_over_the_platforms_options() -> None:
    class Platform:
        def engine_options(self, config: object) -> dict[str, object]:
            return {"apply_rope_fusion": True, "persist_layer_norm": False}

    platform = Platform()
    ours.put_over(platform, {"apply_rope_fusion": False})
    assert platform.engine_options(None) == {"apply_rope_fusion": False, "persist_layer_norm": False}


def test_a_case_without_fused_weight_gradients_has_none() -> None:
    from types import SimpleNamespace

    layers = [SimpleNamespace(fuse_wgrad_accumulation=True), SimpleNamespace(weight=1)]
    ours.forbid_fused_weight_gradients([SimpleNamespace(modules=lambda: layers)])
    assert vars(layers[0]) == {"fuse_wgrad_accumulation": False} and vars(layers[1]) == {"weight": 1}


def test_random_tokens_are_the_same_each_time_and_within_the_vocabulary(tmp_path: Path) -> None:
    from megatron_syne.data.tokens.reader import IndexedReader

    case = tiny(case_named("8l-bf16"))
    first, second = (ours.token_prefix(case, tmp_path / name, True) for name in ("a", "b"))
    assert first.with_suffix(".bin").read_bytes() == second.with_suffix(".bin").read_bytes()
    reader = IndexedReader(first, require_manifest=False)
    reader.check_vocab(shape_of(case, True)["vocab_size"])
    assert reader.num_tokens > (case.steps + case.warm) * case.seq_length
    before = first.with_suffix(".bin").stat().st_mtime_ns
    assert ours.token_prefix(case, tmp_path / "a", True) == first
    assert first.with_suffix(".bin").stat().st_mtime_ns == before


def test_real_text_is_tokenised_once_and_may_be_brought_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a name with a dot in it; the second time neither text nor tokenizer is there, and nothing is started."""
    from megatron_syne.data.tokens.reader import IndexedReader

    demo = HERE.parents[1] / "examples" / "demo"
    text = tmp_path / "web.small.jsonl"
    text.write_text("".join((demo / "texts" / "en_web.valid.jsonl").read_text().splitlines(True)[:20]))
    case = case_named("8b-bf16")
    path = ours.run_yaml(case, tmp_path / "out", False, text, demo / "base_model")
    prefix = Path(load_config(path).data.sources["text"].path)
    assert prefix == tmp_path / "out" / "tokens" / "text-web.small"
    reader = IndexedReader(prefix)
    assert 10 <= reader.num_documents <= 20 and reader.num_tokens > 1000
    monkeypatch.setattr("subprocess.run", None)
    again = ours.run_yaml(case, tmp_path / "out", False, tmp_path / "gone" / text.name, tmp_path / "none")
    assert Path(load_config(again).data.sources["text"].path) == prefix
    plain = ours.run_yaml(case_named("8l-bf16"), tmp_path / "out", False, text, demo / "base_model")
    assert "random-128256" in plain.read_text()


def test_a_record_tells_its_text_and_no_folder_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), str(site), "", str(ROOT / "build" / "site")])
    )
    options = Options(tmp_path / "out", text=tmp_path / "web.jsonl", tokenizer=tmp_path / "llama")
    record = new_record(case_named("8b-bf16"), options)
    assert record.command.endswith("--text web.jsonl --tokenizer llama")
    assert "--text" not in new_record(case_named("8l-bf16"), options).command

    def measure(case: Case, options: Options) -> Record:
        error = f"{site}/torch/a.py {ROOT}/build/site/b.py {ROOT}/benchmarks/c.py {options.output}/d"
        return new_record(case, options, found={"variants": {"x": {"error": error}}, "list": [error, 1.5]})

    monkeypatch.chdir(ROOT)
    assert run_case(measure, "", ["--case", "8l-bf16", "--output", str(options.output)]) == 0
    told = "SITE/torch/a.py SITE/b.py benchmarks/c.py DIR/d"
    assert read_records(options.output)["8l-bf16"].found == {
        "variants": {"x": {"error": told}},
        "list": [told, 1.5],
    }


def test_the_committed_predictions_are_the_planners() -> None:
    """Each case of ours is on the page, with the seconds of a step that the planner says now, to its digits."""
    import predictions

    page = (ROOT / "benchmarks" / "results" / "h200" / "predictions.md").read_text()
    section = page.split("## Every case")[1].split("## The goals")[0]
    rows = [
        [cell.strip() for cell in line.split("|")] for line in section.splitlines() if line.startswith("| ")
    ]
    seconds = {row[1]: row[2] for row in rows[1:]}
    again = "give: python benchmarks/gpu/planned.py --output benchmarks/results/h200/predictions.md"
    planner = {
        case.name: f"{predictions.plan_of(case, predictions.H200).time.seconds:.4f}"
        for case in predictions.ours()
    }
    assert seconds == planner, again


# --- the suite ---


def test_a_rehearsal_measures_and_the_next_call_does_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(HERE / "suite.py"),
        "--output",
        str(tmp_path / "out"),
        "--rehearse",
        "--ahead",
    ]
    command += ["--only", "8l-bf16", "--pack", str(tmp_path / "pack.tar.gz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_records(tmp_path / "out")["8l-bf16"]
    case = tiny(case_named("8l-bf16"))
    assert len(record.step_seconds) == case.steps and len(record.losses) == case.steps + case.warm
    assert record.tokens_per_step == 128 and record.peak_allocated_bytes and record.config
    assert set(record.seconds) == {*ours.PARTS, "watching", "other"} and min(record.seconds.values()) >= 0
    assert 0 < record.found["loader_share"] < 1 and 0 < record.found["logger_share"] < 1
    assert str(tmp_path) not in (tmp_path / "out" / "8l-bf16.json").read_text().replace("--output", "")
    assert "no figure here means anything" in done.stdout
    with tarfile.open(tmp_path / "pack.tar.gz") as packed:
        assert sorted(packed.getnames()) == ["8l-bf16.json", "logs/8l-bf16.txt", "tables.md"]
    before = (tmp_path / "out" / "8l-bf16.json").stat().st_mtime_ns
    command[3:4] = [str(tmp_path / "elsewhere"), "--unpack", str(tmp_path / "pack.tar.gz")]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "8l-bf16" in read_records(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "runs").exists()
    assert (tmp_path / "out" / "8l-bf16.json").stat().st_mtime_ns == before


FAKE = """
import os, subprocess, sys, time
name = sys.argv[sys.argv.index("--case") + 1]
folder = sys.argv[sys.argv.index("--output") + 1]
print("began", name, flush=True)
if name == "8l-bf16":
    raise MemoryError("CUDA out of memory")
if name == "8l-tensorwise":  # with a child that must not outlive it
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(os.path.join(folder, "child.pid"), "w").write(str(child.pid))
    time.sleep(60)
if name == "8l-delayed":
    os.abort()
if name.startswith("4l"):
    open(os.path.join(folder, name + ".json"), "w").write('{"case": "4l-bf16", "kind": "ours", "command": "x"}')
    time.sleep(60)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> suite.Suite:
    """A suite whose cases are a script that fails in each of the ways there are."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "ours.py").write_text(FAKE)
    monkeypatch.setattr(suite, "HERE", tmp_path / "scripts")
    monkeypatch.setattr(suite, "KILLED_AFTER", 0.2)
    return suite.Suite(Options(tmp_path / "out", rehearse=True), minutes=1.0, pack=None)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_each_kind_of_failure_leaves_a_record(fake: suite.Suite, capsys: pytest.CaptureFixture[str]) -> None:
    slow = replace(case_named("8l-tensorwise"), minutes=1 / 60)
    cases = [case_named("8l-bf16"), slow, case_named("8l-delayed"), case_named("8l-blockwise")]
    short = [replace(case, minutes=min(case.minutes, 0.2)) for case in cases]
    records = {record.case: record for record in fake.run(short)}
    out = fake.options.output
    assert read_records(out).keys() == records.keys() == {case.name for case in cases}
    assert "CUDA out of memory" in (records["8l-bf16"].error or "")
    assert "limit" in (records["8l-tensorwise"].error or "") and "began" in (
        records["8l-tensorwise"].error or ""
    )
    assert (records["8l-tensorwise"].error or "").splitlines()[-1].startswith("ended after its limit")
    assert f"signal {int(signal.SIGABRT)}" in (records["8l-delayed"].error or "")
    assert "left no record" in (records["8l-blockwise"].error or "")
    child = int((out / "child.pid").read_text())
    for _ in range(50):
        if gone(child):
            break
        time.sleep(0.1)
    assert gone(child)
    assert "FAILED" in capsys.readouterr().out
    again = suite.chosen(["8l-*"], read_records(out), retry_failed=False)
    assert not {case.name for case in again} & set(records)
    retried = suite.chosen(["8l-*"], read_records(out), retry_failed=True)
    assert set(records) <= {case.name for case in retried}


@pytest.mark.parametrize("how", ["limit", "budget", "signal"])
def test_a_whole_record_counts_however_its_process_ends(fake: suite.Suite, how: str) -> None:
    """It hangs at its exit."""
    result = fake.options.output / "4l-bf16.json"

    def stop_when_written() -> None:
        while not result.exists():
            time.sleep(0.02)
        fake.stop(signal.SIGTERM, None)

    if how == "signal":
        threading.Thread(target=stop_when_written, daemon=True).start()
    if how == "budget":
        fake.minutes = 2.0 / 60
    minutes = {"limit": 2.0, "budget": 3.0, "signal": 50.0}[how] / 60
    (record,) = fake.run([replace(case_named("4l-bf16"), minutes=minutes)])
    assert record.error is None and record.command == "x" and result.exists()


def test_a_case_that_no_longer_fits_is_not_begun(
    fake: suite.Suite, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fake.run([replace(case_named("8l-bf16"), minutes=2.0)]) == []
    assert "not begun" in capsys.readouterr().out
    fake.minutes = 1 / 60  # begun, and not at its end when the budget is
    assert fake.run([replace(case_named("8l-tensorwise"), minutes=1.5 / 60)]) == []
    assert "stopped" in capsys.readouterr().out
    assert read_records(fake.options.output) == {}


def test_a_signal_ends_the_case_and_leaves_it_to_be_measured_again(fake: suite.Suite) -> None:
    first = fake.run([replace(case_named("8l-blockwise"), minutes=0.2)])
    assert len(first) == 1
    timer = threading.Timer(1.0, fake.stop, (signal.SIGTERM, None))
    timer.start()
    begun = time.monotonic()
    assert fake.run([replace(case_named("8l-tensorwise"), minutes=0.9), case_named("8l-bf16")]) == []
    timer.join()
    assert time.monotonic() - begun < 20
    assert list(read_records(fake.options.output)) == ["8l-blockwise"]


WAITS = """
import os, sys, time
name = sys.argv[sys.argv.index("--case") + 1]
folder = sys.argv[sys.argv.index("--output") + 1]
print("ready", time.monotonic(), os.getpid(), flush=True)
if "--wait" in sys.argv and not sys.stdin.readline():
    sys.exit("nobody is there")
print("begin", time.monotonic(), flush=True)
after = {"4l-bf16": "8l-tensorwise", "8l-tensorwise": "8l-delayed"}.get(name)
until = time.monotonic() + 30
while after and time.monotonic() < until:  # not before the next one is ready
    path = os.path.join(folder, "logs", after + ".txt")
    if os.path.exists(path) and "ready" in open(path).read():
        break
    time.sleep(0.02)
print("end", time.monotonic(), flush=True)
"""


def test_the_next_case_is_ready_when_one_ends_and_begins_no_sooner(fake: suite.Suite, tmp_path: Path) -> None:
    (tmp_path / "scripts" / "ours.py").write_text(WAITS)
    fake.ahead, fake.minutes = True, 3.0
    first, second = (replace(case_named(name), minutes=1.0) for name in ("4l-bf16", "8l-tensorwise"))
    too_long, fourth = (
        replace(case_named("8l-delayed"), minutes=9.0),
        replace(case_named("8l-blockwise"), minutes=0.2),
    )
    assert [record.case for record in fake.run([first, second, too_long, fourth])] == [
        "4l-bf16",
        "8l-tensorwise",
        "8l-blockwise",
    ]
    told = {}
    for path in (fake.options.output / "logs").iterdir():
        told[path.stem] = {line.split()[0]: line.split()[1:] for line in path.read_text().splitlines()}
    at = {name: {word: float(values[0]) for word, values in words.items()} for name, words in told.items()}
    assert at["8l-tensorwise"]["ready"] < at["4l-bf16"]["end"] < at["8l-tensorwise"]["begin"]
    assert set(at["8l-delayed"]) == {"ready"} and gone(int(told["8l-delayed"]["ready"][1]))
    assert at["8l-blockwise"]["begin"] > at["8l-tensorwise"]["end"]


@pytest.mark.parametrize("name", ["machine", "stall-sync", "8l-bf16", "host", "loader"])
def test_nothing_is_imported_beside_what_is_judged_by_little(
    fake: suite.Suite, tmp_path: Path, name: str
) -> None:
    case = replace(case_named(name), minutes=0.5)
    (tmp_path / "scripts" / f"{MODULES[case.kind]}.py").write_text("print('begun', flush=True)")
    fake.ahead = True
    (fake.options.output / "logs").mkdir(parents=True)
    record = fake.one(case, 0.5, [case_named("8l-tensorwise")])
    assert record is not None and "left no record" in (record.error or "") and fake.waiting is None
    assert not (fake.options.output / "logs" / "8l-tensorwise.txt").exists()


def test_unknown_patterns_and_cases_are_told() -> None:
    with pytest.raises(SystemExit, match="no such case"):
        suite.chosen(["9l-*"], {}, False)
    with pytest.raises(SystemExit, match="unknown; there are machine"):
        case_named("nothing")


def test_small_gpus_leave_out_what_cannot_fit() -> None:
    assert not suite.fits(case_named("8b-bf16"), 79.6) and suite.fits(case_named("8b-bf16"), 139.8)
    assert suite.fits(case_named("8b-on-80gib"), 79.6) and suite.fits(case_named("8b-bf16"), None)


def test_logs_are_cut_to_their_ends(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(b"first\n" + b"x" * 100_000 + f"\n{tmp_path}/last\n".encode())
    text = suite.trimmed(log, tmp_path)
    assert text.startswith("first") and text.endswith("\nDIR/last\n") and log.stat().st_size < 33_000


def test_packs_hold_what_is_small_and_take_nothing_from_outside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    (out / "runs").mkdir()
    for name, size in (
        ("a.json", 10),
        ("trace.bin", suite.PACKED + 1),
        ("logs/a.txt", 5),
        ("runs/b.json", 5),
    ):
        (out / name).write_bytes(b"x" * size)
    suite.pack(out, tmp_path / "p.tar.gz")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text("newer")
    suite.unpack(tmp_path / "p.tar.gz", tmp_path / "other")
    kept = sorted(
        path.relative_to(tmp_path / "other").as_posix() for path in (tmp_path / "other").rglob("*.*")
    )
    assert kept == ["a.json", "logs/a.txt"]
    assert (tmp_path / "other" / "a.json").read_text() == "newer"


# --- the tables ---


def made(name: str, seconds: float, tokens: int = 8192, **more: object) -> Record:
    """A record with steps of so many seconds; 1e11 FLOPs a token."""
    fields: dict[str, object] = {"step_seconds": [seconds] * 25, "peak_allocated_bytes": 2**30, **more}
    record = new_record(case_named(name), Options(Path()), **fields)
    record.tokens_per_step, record.model_flops_per_token = tokens, 1e11
    shares = {"loader_share": 0.001, "logger_share": 0.003, "steps_with_norms": None}
    record.found = {**shares, **record.found}
    record.seconds = dict.fromkeys((*ours.PARTS, "watching", "other"), 0.001)
    record.environment["device"] = "NVIDIA H200"
    return record


def example() -> dict[str, Record]:
    """8,192 tokens in 2.0 s in bf16 (409.6 TFLOP/s of 640 measured), 1.6 s in FP8; the better peer 2.2 s."""
    records = [
        made("8l-bf16", 2.0),
        made("8l-tensorwise", 1.6, peak_allocated_bytes=2**31),
        made("8l-delayed", 1.5, error="boom\nout of memory"),
        made("8l-transformers", 2.2),
        made("8l-compiled", 2.4),
        made("8b-bf16", 9.0, losses=[12.0] * 5 + [11.0] * 25 + [9.0] * 5, found={"tokens": "real text"}),
    ]
    machine = new_record(case_named("machine"), Options(Path()), found={MATMUL: 640e12, "missing": {}})
    return {record.case: record for record in [*records, machine]}


def test_goals_are_judged_by_the_figures_alone() -> None:
    found = [value for _, _, value, _ in goals(example())]
    expected = [
        409.6 / 640,
        2.0 / 1.6,  # the recipe that failed does not count
        2.2 / 2.0,  # against the better peer
        2.2 / 1.6,
        None,
        0.004,
        3.0,
    ]
    assert found == [None if value is None else pytest.approx(value) for value in expected]
    assert [met for *_, met in goals(example())] == [True, False, False, False, None, True, True]


def test_random_tokens_have_no_falling_loss_to_judge() -> None:
    records = example()
    records["8b-bf16"].found["tokens"] = "random"
    assert [(goal, value, met) for goal, _, value, met in goals(records)][-1] == (
        "8B, 32 layers: loss on real text falls over 30 steps, nats",
        None,
        None,
    )


def test_nothing_measured_is_no_figure() -> None:
    assert all(value is None and met is None for _, _, value, met in goals({}))
    text = report.tables({})
    assert "Nothing is measured yet" in text
    assert not [
        line for line in report.goals_table({}).splitlines()[2:] if "not measured | not measured" not in line
    ]


def test_tables_show_effect_beside_prediction_and_name_failures() -> None:
    text = report.tables(example())
    speed = next(line for line in text.splitlines() if line.startswith("| 8l-bf16 | 8 x 8192"))
    cells = [cell.strip() for cell in speed.strip("|").split("|")]
    assert cells[3:9] == ["2,000.0", "0.0%", "25", "4,096", "409.6", "41.4%"]  # of 989.4
    assert cells[9] == "64.0%" and cells[10] == "1.0"
    change = next(line for line in text.splitlines() if line.startswith("| 8l-tensorwise | 8l-bf16 |"))
    assert "x1.22" in change and change.endswith("| x1.250 tokens/s, +1.0 GiB |")
    assert next(line for line in text.splitlines() if line.startswith("| 8l-delayed |")).endswith(
        "| failed |"
    )
    assert "* 8l-delayed: `out of memory`" in text
    fp8 = next(line for line in text.splitlines() if line.startswith("| 8l-tensorwise | 8 x"))
    assert f"{8192 / 1.6 * 1e11 / 1978.9e12:.1%}" in fp8
    missing = text.split("## Not measured")[1]
    assert "held-out" in missing and "8l-bf16" not in missing


def test_the_tables_are_read_from_a_folder(tmp_path: Path) -> None:
    for record in example().values():
        record.write(tmp_path)
    lines: list[str] = []
    assert report.main([str(tmp_path)], lines.append) == 0
    assert lines == [report.tables(read_records(tmp_path))]
    with pytest.raises(SystemExit, match="usage"):
        report.main([os.fspath(tmp_path / "none")])
