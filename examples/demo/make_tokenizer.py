"""Makes the demo's tokenizer, a byte-level BPE like Llama-3's, from the training texts.

    python examples/demo/make_tokenizer.py                     # writes base_model/tokenizer.json and its settings
    python examples/demo/make_tokenizer.py --out some/folder

2558 learned tokens (256 of them the bytes), then the two special tokens at the end, as Llama-3 has them. Llama-3's
vocabulary knew some Chinese before Llama-3-SynE's continual pre-training; so does this one: about an eighth of the
text it learns from is Chinese, although the base model itself reads English only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from make_texts import write
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 2560
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
MODEL_MAX_LENGTH = 256
LONGEST_TOKEN = 15  # bytes: five Chinese characters; longer ones would be whole clauses of the templates

# How Llama-3 cuts text before BPE: contractions, words with the space before them, numbers of up to three
# digits, punctuation, line ends, spaces (tokenizer.json of Meta-Llama-3-8B).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Bytes of each source's training file to learn from.
SHARES = {
    "en_web": 1_900_000,
    "en_code": 900_000,
    "en_math": 300_000,
    "zh_web": 250_000,
    "zh_book": 150_000,
    "synth_qa": 400_000,
}


def texts(folder: Path) -> Iterator[str]:
    """The documents to learn from: of every source the first ones, up to its share."""
    for source, share in SHARES.items():
        read = 0
        with (folder / f"{source}.train.jsonl").open(encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                read += len(text.encode())
                if read > share:
                    break
                yield text


def train(folder: Path) -> Tokenizer:
    """The tokenizer, special tokens and all; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(folder), trainer)
    tokenizer.add_special_tokens([BEGIN, END])
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, begin)]
            ),
        ]
    )
    return tokenizer


def settings(tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    """The two small files beside tokenizer.json, by name."""
    special = {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    return {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(begin): {"content": BEGIN, **special},
                str(end): {"content": END, **special},
            },
            "bos_token": BEGIN,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": MODEL_MAX_LENGTH,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "generation_config.json": {
            "bos_token_id": begin,
            "eos_token_id": end,
            "do_sample": False,
            "max_length": MODEL_MAX_LENGTH,
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=Path, default=HERE / "texts", help="folder of the texts")
    parser.add_argument("--out", type=Path, default=HERE / "base_model", help="folder for the three files")
    options = parser.parse_args()
    tokenizer = train(options.texts)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"expected {VOCAB_SIZE} tokens, the texts gave {tokenizer.get_vocab_size()}")
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "tokenizer.json", [tokenizer.to_str(pretty=True), "\n"])
    for name, content in settings(tokenizer).items():
        write(options.out / name, [json.dumps(content, indent=2, ensure_ascii=False), "\n"])
    print(f"{options.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
