"""lm-evaluation-harness for real, offline, beside a short training; its numbers against our own computation."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from .conftest import DEMO, REPOSITORY, Bench
from .ranks import logs_of, start_ranks, wait_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("lm_eval") is None or find_spec("accelerate") is None,
        reason="lm-evaluation-harness is not installed (extra eval)",
    ),
]

CHOICES = [
    ("The sun rises in the", [" east", " box", " seventy"], 0),
    ("Two and two make", [" green", " four"], 1),
    ("The water of the river was", [" cold", " seven", " quickly and"], 0),
    ("She said that", [" zq", " he", " of"], 1),
    ("In the house there were", [" many people", " is"], 0),
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In the morning the sun rises over the hills.",
    "太阳从东方升起。",
]
CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
TEXT_TASK = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""
REMOTE = CHOICE_TASK.replace("dataset_path: json", "dataset_path: nobody/nothing").replace(
    "dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}\n", ""
)
BY_URL = CHOICE_TASK.replace("{folder}/choices.jsonl", "http://127.0.0.1:9/choices.jsonl")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with their data, one of a data set elsewhere, one of a URL."""
    folder = tmp_path_factory.mktemp("tasks")
    named = [{"question": q, "choices": c, "answer": a} for q, c, a in CHOICES]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    texts = {"tiny_choice": CHOICE_TASK, "text": TEXT_TASK, "remote": REMOTE, "url": BY_URL}
    for name, text in texts.items():
        unique = text.replace("task: tiny_choice", f"task: {name}")
        (folder / f"{name}.yaml").write_text(unique.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def run(bench: Bench, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on two ranks, a checkpoint every 5 of which the newest alone is kept, evaluated every 10."""
    folder = tmp_path_factory.mktemp("harness")
    ranks = start_ranks(
        2,
        [
            "-m", "megatron_syne.train", "--config", str(bench.config), f"run_dir={folder / 'run'}",
            f"data.tokenizer_path={DEMO / 'base_model'}", "parallel.tensor_model_parallel_size=2",
            "checkpoint.save_interval=5", "checkpoint.keep_latest=1", "monitor.tensorboard=true",
            "harness.tasks=[tiny_choice, text.yaml]", f"harness.include_path={tasks}", "harness.interval=10",
            "harness.timeout_seconds=500",
        ],
        env={"HF_HOME": str(folder / "hf_home")},
    )  # fmt: skip
    codes = wait_ranks(ranks, timeout=1500)
    assert codes == [0, 0], logs_of(ranks[0])[-3000:]
    assert "failed" not in logs_of(ranks[0]), logs_of(ranks[0])[-3000:]
    return folder / "run"


def own_numbers(folder: Path) -> dict[str, dict[str, float]]:
    """The same metrics out of transformers' logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def log_likelihood(context: list[int], continuation: list[int]) -> float:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            scores = torch.log_softmax(model(ids).logits[0, :-1].float(), dim=-1)
        rows = scores[len(context) - 1 :]
        return float(sum(rows[n, token] for n, token in enumerate(continuation)))

    hits, normed = [], []
    for question, choices, answer in CHOICES:
        context = tokenizer(question).input_ids
        sums = []
        for choice in choices:
            whole = tokenizer(question + choice).input_ids
            assert whole[: len(context)] == context
            sums.append(log_likelihood(context, whole[len(context) :]))
        by_length = [value / len(choice) for value, choice in zip(sums, choices, strict=True)]
        hits.append(sums.index(max(sums)) == answer)
        normed.append(by_length.index(max(by_length)) == answer)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    # the harness puts its start before a text that the tokenizer has begun with one: that second one is counted
    total = sum(log_likelihood([start], tokenizer(text).input_ids) for text in TEXTS)
    words = sum(len(text.split()) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    return {
        "tiny_choice": {"acc": sum(hits) / len(hits), "acc_norm": sum(normed) / len(normed)},
        "tiny_text": {
            "word_perplexity": math.exp(-total / words),
            "byte_perplexity": math.exp(-total / size),
            "bits_per_byte": -total / size / math.log(2),
        },
    }


def test_results_stand_beside_the_run_and_in_its_curves(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = {path.name for path in (run / "evaluations").iterdir()}
    assert {"iter_0000010.json", "iter_0000020.json"} <= files
    assert not any(name.startswith(("iter_0000005", "iter_0000015")) for name in files)
    assert not list((run / "evaluations").rglob("*.safetensors")) and not list(
        run.glob("evaluations/.held/*")
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row["harness"] for row in rows if "harness" in row}
    assert set(logged) == {10, 20}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for step in (10, 20):
        content = json.loads((run / f"evaluations/iter_{step:07d}.json").read_text())
        assert content["step"] == step and content["samples"] == {"tiny_choice": 5, "tiny_text": 3}
        assert content["software"]["lm_eval"] and content["weights"] and content["dtype"] == "float32"
        assert content["stderr"]["tiny_choice"]["acc"] >= 0
        for task, metrics in content["results"].items():
            for name, value in metrics.items():
                assert logged[step][f"{task}/{name}"] == value
                curve = {e.step: e.value for e in events.Scalars(f"harness/{task}/{name}")}
                assert curve[step] == pytest.approx(value, rel=1e-6)
    first, last = (logged[step]["tiny_text/bits_per_byte"] for step in (10, 20))
    assert first != last  # of two checkpoints, not of one twice


def test_the_harness_and_we_compute_the_same(run: Path, tmp_path: Path) -> None:
    from megatron_syne.evaluation.snapshot import hf_snapshot

    content = json.loads((run / "evaluations/iter_0000020.json").read_text())
    with hf_snapshot(run / "checkpoints" / "iter_0000020", tmp_path) as snapshot:
        assert snapshot.weights == content["weights"]
        own = own_numbers(snapshot.folder)
    assert list(tmp_path.iterdir()) == []
    assert content["results"].keys() == own.keys()
    for task, metrics in own.items():
        for name, value in metrics.items():
            # fp32 logits in another order of batches; word perplexity is e to the hundreds of nats / words
            assert math.log(content["results"][task][name] + 1) == pytest.approx(
                math.log(value + 1), rel=5e-6
            ), name


EACH = """
import json, sys
from megatron_syne.errors import run_cli
from megatron_syne.evaluation.__main__ import main
for given in json.loads(sys.argv[1]):
    try:
        code = run_cli(lambda: main(given))
    except SystemExit as end:
        code = end.code
    print("=exit=", code, file=sys.stderr, flush=True)
"""


def test_what_it_says_when_it_cannot(tasks: Path, tmp_path: Path) -> None:
    """In one process, since the harness takes its time to start."""
    source, output = str(DEMO / "base_model"), tmp_path / "out.json"
    no_tokenizer = tmp_path / "bare"
    no_tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        (no_tokenizer / name).symlink_to(DEMO / "base_model" / name)

    def command(task: str, checkpoint: object = source, *more: str) -> list[str]:
        return [
            "--checkpoint", str(checkpoint), "--tasks", task, "--include-path", str(tasks),
            "--output", str(output), *more,
        ]  # fmt: skip

    cases: list[tuple[list[str], int, str]] = [
        (command("remote"), 66, "dataset is not on this machine, and an evaluation uses no network"),
        (command("url.yaml"), 66, "an evaluation uses no network"),
        (command("nowhere.yaml"), 66, "task nowhere.yaml: no such file"),
        (command("tiny_choice", tmp_path / "none"), 66, "no such folder"),
        (command("tiny_choice", source, "--limit", "0"), 64, "--limit 0: must be at least 1"),
        (command("tiny_choice", source, "--nonsense"), 64, "unrecognized arguments"),
        (command(","), 64, "--tasks: names none"),
        (command("tiny_choice", source, "--device", "nonsense"), 64, "device nonsense"),
        (command("tiny_choice", source, "--limit", "2"), 0, ""),
    ]
    done: Any = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps([given for given, _, _ in cases])],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf_home")},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    parts, said = done.stderr.split("=exit= "), []
    for before, after in pairwise(parts):
        said.append((int(after.split("\n")[0]), before))
    assert len(said) == len(cases), done.stderr[-3000:]
    for (given, code, words), (found, text) in zip(cases, said, strict=True):
        assert found == code and words in text and "Traceback" not in text, (given, found, text[-2000:])
    content = json.loads(output.read_text())
    assert content["samples"] == {"tiny_choice": 2} and content["limit"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "bare", "hf_home"}
