"""The main job on a laptop: import, data, train, resume, export, judge. ``make demo`` runs this.

Every step is the command a user would type; its words are printed before it runs. About four minutes on two
cores. Everything it makes is below ``runs/demo`` (removed at the start of each demo).
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = ROOT / "runs" / "demo"
BASE = HERE / "base_model"
CONFIG = HERE / "demo.yaml"
SOURCES = ("en_web", "en_code", "en_math", "zh_web", "zh_book", "synth_qa")
HALF_WAY = 180
PROMPTS = ("The function returns", "端午节在农历", "Problem: A box holds", "学科：数学\n\n问：")


def step(title: str, *commands: list[str], expect: int = 0) -> float:
    """Run commands one after the other, showing each; returns the seconds they took."""
    print(f"\n=== {title}", flush=True)
    started = time.monotonic()
    for command in commands:
        print("$ " + " ".join(shlex.quote(_short(word)) for word in command), flush=True)
        code = subprocess.run(command, cwd=ROOT, env=_environment()).returncode
        if code != expect:
            sys.exit(f"the demo stopped: exit code {code}, expected {expect}, from the command above")
    return time.monotonic() - started


def _short(word: str) -> str:
    """Paths below the checkout as a user would type them."""
    return "python" if word == sys.executable else word.replace(f"{ROOT}/", "")


def _environment() -> dict[str, str]:
    tools = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **tools}


def main() -> None:
    """The whole job, then its summary."""
    shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True)
    python = sys.executable
    convert, inspect = [python, "tools/convert_checkpoint.py"], [python, "tools/inspect_data.py"]
    seconds = {
        "import": step(
            "1 of 4: import the Hugging Face model into TP 2 x PP 2 shards",
            [*convert, "import", "--from", str(BASE), "--out", str(RUNS / "shards"), "--tensor-model-parallel-size", "2",
             "--pipeline-model-parallel-size", "2"],
            [*convert, "verify", str(RUNS / "shards")],
        ),
        "data": step("2 of 4: tokenise six sources into .bin/.idx", *(_prepare(python, s) for s in SOURCES)),
        "plan": step(
            "look before you spend: what the run will read",
            [*inspect, "plan", "--config", str(CONFIG), "--output", str(RUNS / "mixture.png")],
        ),
        "train": step(
            f"3 of 4: train, 4 processes, TP 2 x PP 2; stop after step {HALF_WAY} ...",
            [str(ROOT / "launch/local.sh"), str(CONFIG), f"train.exit_interval={HALF_WAY}"],
            expect=75,
        ),
        "resume": step(
            "... and go on from the checkpoint; what was read, by its ledger",
            [str(ROOT / "launch/local.sh"), str(CONFIG)],
            [*inspect, "consumed", str(RUNS / "train")],
        ),
    }  # fmt: skip
    last = max((RUNS / "train" / "checkpoints").glob("iter_*"))
    seconds["export"] = step(
        "4 of 4: export the last checkpoint to a Hugging Face folder",
        [*convert, "export", "--from", str(last), "--out", str(RUNS / "hf")],
    )
    print("\n=== judged by transformers: held-out perplexity before and after, and a few lines", flush=True)
    started = time.monotonic()
    report = judge(RUNS / "hf")
    report["trainer"] = trainer_perplexity()
    seconds["judge"] = time.monotonic() - started
    (RUNS / "summary.json").write_text(
        json.dumps({"seconds": seconds, **report}, indent=1, ensure_ascii=False)
    )
    summarise(report, seconds)


def _prepare(python: str, source: str) -> list[str]:
    texts, data = HERE / "texts", RUNS / "data"
    return [
        python, "tools/prepare_data.py", "--tokenizer", str(BASE), "--workers", "2", "--min-tokens", "10",
        "--job", str(texts / f"{source}.train.jsonl"), str(data / source),
        "--job", str(texts / f"{source}.valid.jsonl"), str(data / f"{source}_valid"),
    ]  # fmt: skip


def judge(exported: Path) -> dict[str, object]:
    """Perplexity per source of the base and the exported folder, and greedy text, all with ``transformers``."""
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    table: dict[str, dict[str, float]] = {source: {} for source in SOURCES}
    lines: dict[str, str] = {}
    for label, folder in (("before", BASE), ("after", exported)):
        model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
        for source in SOURCES:
            table[source][label] = perplexity(model, tokenizer, HERE / "texts" / f"{source}.valid.jsonl")
        if label == "after":
            for prompt in PROMPTS:
                ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
                out = model.generate(
                    ids.input_ids,
                    attention_mask=ids.attention_mask,
                    max_new_tokens=40,
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                )
                lines[prompt] = tokenizer.decode(out[0], skip_special_tokens=True)
    return {"perplexity": table, "generated": lines}


def trainer_perplexity() -> dict[str, float]:
    """What the Megatron model itself said at its last evaluation: transformers must find the same."""
    rows = [json.loads(line) for line in (RUNS / "train" / "metrics.jsonl").read_text().splitlines()]
    last = next(row["validation"] for row in reversed(rows) if "validation" in row)
    return {source: math.exp(loss) for source, loss in last.items()}


def perplexity(
    model: object, tokenizer: object, file: Path, seq_length: int = 256, windows: int = 64
) -> float:
    """exp of the mean next-token loss over the first windows of the documents, joined by EOS as in training."""
    import torch

    ids: list[int] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False).input_ids
        ids.append(tokenizer.eos_token_id)
    count = min(windows, (len(ids) - 1) // seq_length)
    rows = torch.tensor([ids[i * seq_length : i * seq_length + seq_length + 1] for i in range(count)])
    total = 0.0
    with torch.no_grad():
        for batch in rows.split(16):
            logits = model(batch[:, :-1]).logits
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
    return float(torch.tensor(total / (count * seq_length)).exp())


def summarise(report: dict[str, object], seconds: dict[str, float]) -> None:
    """The one table to look at."""
    print(f"\n{'held-out perplexity':<20}{'before':>12}{'after':>10}{'change':>10}{'trainer said':>15}")
    for source, row in report["perplexity"].items():
        change = 100 * (row["after"] / row["before"] - 1)
        before = f"{row['before']:.2f}" if row["before"] < 1e6 else f"{row['before']:.1e}"
        said = report["trainer"][source]
        print(f"{source:<20}{before:>12}{row['after']:>10.2f}{change:>+9.1f}%{said:>15.2f}")
    print("\ngreedy text of the exported model:")
    for text in report["generated"].values():
        print("  " + " ".join(text.split()))
    print("\nseconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()), end="")
    print(f"; all {sum(seconds.values()):.0f}")
    print(
        "\nlook at it:   tensorboard --logdir runs/demo/train/tensorboard\nthe mixture:  runs/demo/mixture.png\nthe release:  runs/demo/hf"
    )


if __name__ == "__main__":
    main()
