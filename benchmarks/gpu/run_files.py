"""What a case of ours reads: token files and the YAML of its run. No torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from case import Case
from process import ROOT, model_options, shape_of

from megatron_syne.data.tokens.indexed import IndexedWriter, token_dtype

RANDOM_TOKENS = 4_000_000
"""In the file of random tokens; a run that needs more reads it again."""
MEAN_DOCUMENT = 1000


def token_prefix(case: Case, output: Path, rehearse: bool) -> Path:
    """Prefix of the ``.bin`` and ``.idx`` of random tokens of a case's vocabulary, written where they are not yet.

    The same bytes each time: documents of random lengths, ids evenly over the vocabulary.
    """
    vocabulary = shape_of(case, rehearse)["vocab_size"]
    count = RANDOM_TOKENS // 40 if rehearse else RANDOM_TOKENS
    prefix = output / "tokens" / f"random-{vocabulary}"
    done = prefix.with_suffix(".idx")
    if done.exists():
        return prefix
    prefix.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1234)
    lengths = random.geometric(1 / MEAN_DOCUMENT, size=count // MEAN_DOCUMENT).astype(np.int32) + 1
    tokens = random.integers(0, vocabulary, size=int(lengths.sum()), dtype=np.int32)
    unfinished = prefix.with_suffix(".idx.tmp")
    with open(prefix.with_suffix(".bin"), "w+b") as data, open(unfinished, "w+b") as index:
        writer = IndexedWriter(data, index, token_dtype(vocabulary))
        writer.add(tokens, lengths)
        writer.finish()
    unfinished.replace(done)
    return prefix


def text_prefix(text: Path, tokenizer: Path, output: Path) -> Path:
    """Prefix of real text, tokenised by ``tools/prepare_data.py`` where ``output`` does not have it yet.

    Where it was brought along, neither the text nor the tokenizer need be there: the name of the text tells it.
    """
    prefix = output / "tokens" / f"text-{text.stem}"
    if not Path(f"{prefix}.json").exists():
        prefix.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--input", str(text)]
        command += ["--tokenizer", str(tokenizer), "--output-prefix", str(prefix), "--overwrite"]
        subprocess.run(command, check=True)
    return prefix


def run_options(case: Case, prefix: Path, run_dir: Path, rehearse: bool) -> dict[str, Any]:
    """The run of a case as its YAML has it, the case's overrides in it."""
    fp8 = {"fp8": case.precision} if case.precision not in ("bf16", "fp32") else {}
    tokens = (case.warm + case.steps) * case.global_batch_size * case.seq_length
    options: dict[str, Any] = {
        "run_dir": str(run_dir),
        "platform": "cpu" if rehearse else "cuda",
        "model": model_options(case, rehearse),
        "data": {
            "seq_length": case.seq_length,
            "sources": {"text": {"path": str(prefix), "max_epochs": float("inf")}},
            "stages": [{"name": "measured", "tokens": tokens, "mixture": {"text": 1.0}}],
        },
        "precision": {"params_dtype": "fp32" if case.precision == "fp32" else "bf16", **fp8},
        "optimizer": {"lr": 1.0e-4},
        "schedule": {"lr_decay_style": "constant", "lr_warmup_iters": min(3, case.warm)},
        "train": {"micro_batch_size": case.micro_batch_size, "global_batch_size": case.global_batch_size},
    }
    for text in case.overrides:
        key, _, value = text.partition("=")
        section, _, name = key.rpartition(".")
        place = options
        for part in section.split("."):
            place = place.setdefault(part, {})
        place[name] = yaml.safe_load(value)
    return options


def run_yaml(
    case: Case, output: Path, rehearse: bool, text: Path | None = None, tokenizer: Path | None = None
) -> Path:
    """Write ``output/runs/NAME/run.yaml`` and the tokens that it reads, and return its path.

    Real text only for a case that asks for it, where both ``text`` and ``tokenizer`` are given and no rehearsal's small
    vocabulary is in the way. The run folder is ``output/runs/NAME/run``.
    """
    if text is not None and tokenizer is not None and case.real_text and not rehearse:
        prefix = text_prefix(text.resolve(), tokenizer.resolve(), output)
    else:
        prefix = token_prefix(case, output, rehearse)
    folder = output / "runs" / case.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_options(case, prefix, folder / "run", rehearse), sort_keys=False))
    return path
