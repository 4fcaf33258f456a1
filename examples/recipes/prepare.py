"""What the recipes start from: tokenised texts, and the demo's base model after surgery. Under a minute on 2 cores.

    python examples/recipes/prepare.py                       # everything, in runs/recipes
    python examples/recipes/prepare.py --only data solar

Every step is a command of this project; its words are printed. Only the tokens of the larger vocabulary are
chosen here: the most frequent Chinese words of two to four characters, as counts of neighbouring characters tell.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"
BASE, TEXTS = DEMO / "base_model", DEMO / "texts"
SOURCES = ("en_web", "en_code", "en_math", "zh_web", "zh_book", "synth_qa")
NEW_TOKENS = 256
STEPS = ("data", "stability_gap", "llama_pro", "solar", "vocabulary")


def command(tool: str, *words: str | Path) -> None:
    """Run one of the project's tools, showing it; its failure ends this program."""
    line = [f"tools/{tool}.py", *map(str, words)]
    print("$ python " + " ".join(shlex.quote(word.replace(f"{ROOT}/", "")) for word in line), flush=True)
    tokens = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, *line], cwd=ROOT, env={**os.environ, **tokens})
    if done.returncode:
        sys.exit(done.returncode)


def tokenise(tokenizer: Path, sources: tuple[str, ...], folder: Path, texts: Path) -> None:
    """Training and validation files of some sources."""
    jobs: list[str | Path] = []
    for source in sources:
        for part, end in (("train", ""), ("valid", "_valid")):
            jobs += ["--job", texts / f"{source}.{part}.jsonl", folder / f"{source}{end}"]
    command("prepare_data", "--tokenizer", tokenizer, "--overwrite", *jobs)


def score(out: Path, texts: Path) -> None:
    """Mathematics with its perplexity under the base model, so that a run can take the best part of it."""
    scored = out / "scored_math.jsonl"
    command("curate_data", "score-perplexity", "--model", BASE, "--input", texts / "en_math.train.jsonl",
            "--output", scored, "--overwrite")  # fmt: skip
    command("prepare_data", "--tokenizer", BASE, "--overwrite", "--input", scored, "--keep", "perplexity",
            "--output-prefix", out / "data" / "scored_math")  # fmt: skip


def words(texts: Path) -> Iterator[tuple[str, int]]:
    """Runs of two to four Chinese characters with their weight: how often, times the characters spared."""
    counts: Counter[str] = Counter()
    for source in ("zh_web", "zh_book"):
        with (texts / f"{source}.train.jsonl").open(encoding="utf-8") as file:
            for line in file:
                for run in re.findall(r"[\u4e00-\u9fff]{2,}", json.loads(line)["text"]):
                    for length in (2, 3, 4):
                        counts.update(run[n : n + length] for n in range(len(run) - length + 1))
    weight = {word: count * (len(word) - 1) for word, count in counts.items()}
    yield from sorted(weight.items(), key=lambda item: (-item[1], item[0]))


def vocabulary(out: Path, texts: Path) -> None:
    """The base's tokenizer with 256 tokens more, the model fitted to it, and the texts in its tokens."""
    from tokenizers import Tokenizer

    folder = out / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    known = tokenizer.get_vocab_size()
    for word, _ in words(texts):
        if tokenizer.get_vocab_size() == known + NEW_TOKENS:
            break
        if len(tokenizer.encode(word, add_special_tokens=False).ids) > 1:  # it is no token yet
            tokenizer.add_tokens([word])
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(BASE / "tokenizer_config.json", folder)
    command("edit_checkpoint", "extend-vocab", "--from", BASE, "--tokenizer", folder, "--init", "subword",
            "--out", out / "models" / "vocabulary", "--overwrite")  # fmt: skip
    tokenise(folder, ("en_web", "zh_web", "zh_book"), out / "data_vocabulary", texts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="steps (all)")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of the texts (the demo's)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "recipes", help="folder for the result")
    options = parser.parse_args()
    out, texts = options.out.resolve(), options.texts.resolve()
    surgery = ("edit_checkpoint", "--from", BASE, "--overwrite", "--out")
    for folder in ("data", "data_vocabulary", "models"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    if "data" in options.only:
        tokenise(BASE, SOURCES, out / "data", texts)
    if "stability_gap" in options.only:
        score(out, texts)
    if "llama_pro" in options.only:
        command(surgery[0], "expand-blocks", "--every", "2", *surgery[1:], out / "models" / "llama_pro")
    if "solar" in options.only:
        command(surgery[0], "upscale-depth", "--layers-kept", "3", *surgery[1:], out / "models" / "solar")
    if "vocabulary" in options.only:
        vocabulary(out, texts)


if __name__ == "__main__":
    main()
