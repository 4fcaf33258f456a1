"""The process of one case: its options in, its record out, whatever happens.

    python benchmarks/gpu/<module>.py --case NAME --output DIR [--rehearse]

Leaves ``DIR/NAME.json`` and exits with 0; where the measurement fails the record holds its ``error`` and the exit code
is 1. No torch at import.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from cases import FFN, GROUPS, HEADS, HIDDEN, MODULES, TINY, VOCABULARY, Case, case_named, tiny  # noqa: E402
from record import UNKNOWN, Record, environment, first_line  # noqa: E402

from megatron_syne.config.schema import ModelConfig  # noqa: E402
from megatron_syne.models.flops import model_flops_per_token  # noqa: E402

ERROR_LINES = 25
LONGEST = 8192
"""Tokens that Llama-3-8B claims to handle."""
FULL = {
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "num_query_groups": GROUPS,
    "vocab_size": VOCABULARY,
}
TINY_MODEL = {**TINY, "kv_channels": TINY["hidden_size"] // TINY["num_attention_heads"]}


@dataclass(frozen=True)
class Options:
    """How a case is run."""

    output: Path
    """Folder of the results, of the token files and of the run folders."""
    rehearse: bool = False
    """On the CPU platform, with ``tiny`` shapes: no figure means anything."""
    text: Path | None = None
    """JSONL of real text, for the cases that ask for it."""
    tokenizer: Path | None = None
    """Folder of the tokenizer for it."""


def run_case(
    measure: Callable[[Case, Options], Record], description: str | None, argv: list[str] | None = None
) -> int:
    """Parse, measure, write the record; returns the exit code."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--case", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--wait", action="store_true", help="import, then begin when a line is read")
    given = parser.parse_args(argv)
    paths = [path.resolve() if path is not None else None for path in (given.text, given.tokenizer)]
    options = Options(given.output.resolve(), given.rehearse, *paths)
    case = case_named(given.case)
    if options.rehearse:
        case = tiny(case)
    os.environ.update(case.environment)  # before torch and Transformer Engine read it
    os.chdir(ROOT)  # ``git`` tells the commit
    if given.wait:
        import_ahead(options.rehearse)
        if not sys.stdin.readline():  # whoever was to say so is gone
            return 1
    try:
        record = measure(case, options)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a record is left in any case
        traceback.print_exc()
        text = "".join(traceback.format_exception(error))
        record = new_record(case, options, error=last_lines(text, options.output))
    record.found = plain(record.found, options.output)  # errors of what was tried name files
    record.write(options.output)
    return 1 if record.error else 0


def import_ahead(rehearse: bool) -> None:
    """What takes seconds to import and computes nothing. What fails here fails again, and is told, where it is used."""
    modules = ("torch",) if rehearse else ("torch", "transformer_engine.pytorch", "megatron.core.models.gpt")
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception:
            return


def without_folders(text: str, output: Path) -> str:
    """An output without the folders of this machine, for what is kept of it."""
    sites = {os.path.abspath(each) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each}
    places = (
        (str(output), "DIR"),
        *((site, "SITE") for site in sorted(sites - {str(ROOT)}, key=len, reverse=True)),
        (str(ROOT) + os.sep, ""),
        (sys.prefix, "PYTHON"),
        (str(Path.home()), "HOME"),
    )
    for folder, word in places:
        text = text.replace(folder, word) if len(folder) > 1 else text
    return text


def plain(value: Any, output: Path) -> Any:
    """A value of a record, its texts :func:`without_folders`."""
    if isinstance(value, dict):
        return {name: plain(each, output) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each, output) for each in value]
    return without_folders(value, output) if isinstance(value, str) else value


def last_lines(text: str, output: Path) -> str:
    """The end of an output, for a record."""
    return "\n".join(without_folders(text, output).strip().splitlines()[-ERROR_LINES:])


def new_record(case: Case, options: Options, **fields: Any) -> Record:
    """The record of a case with all that follows from the case, and the machine as it is now."""
    shape = shape_of(case, options.rehearse)
    record = Record(
        case=case.name,
        kind=case.kind,
        command=command_of(case, options),
        shape=shape,
        precision=case.precision,
        warm_steps=case.warm,
        tokens_per_step=case.global_batch_size * case.seq_length,
        model_flops_per_token=model_flops_per_token(model_of(case, options.rehearse), case.seq_length),
        environment=environment(device_name()),
    )
    for name, value in fields.items():
        assert hasattr(record, name), name
        setattr(record, name, value)
    return record


def command_of(case: Case, options: Options) -> str:
    """What to type to measure a case again; the output folder is the typist's, and where text and tokenizer lie."""
    words = ["python", f"benchmarks/gpu/{MODULES[case.kind]}.py", "--case", case.name, "--output", "DIR"]
    if case.real_text and options.text is not None and options.tokenizer is not None:
        words += ["--text", options.text.name, "--tokenizer", options.tokenizer.name]
    return shlex.join(words + ["--rehearse"] * options.rehearse)


def shape_of(case: Case, rehearse: bool) -> dict[str, int]:
    """The sizes of a case, by megatron-core's names."""
    return {
        "num_layers": case.num_layers,
        **(TINY if rehearse else FULL),
        "seq_length": case.seq_length,
        "micro_batch_size": case.micro_batch_size,
        "global_batch_size": case.global_batch_size,
    }


def model_of(case: Case, rehearse: bool) -> ModelConfig:
    """The model of a case, every field filled."""
    from megatron_syne.models.config import resolve_model

    return resolve_model(ModelConfig(**model_options(case, rehearse)))


def model_options(case: Case, rehearse: bool) -> dict[str, Any]:
    """Its ``model`` section: Llama-3-8B with fewer layers, for longer sequences where the case has them."""
    longest = {"max_position_embeddings": case.seq_length} if case.seq_length > LONGEST else {}
    return {
        "preset": "llama3_8b",
        "num_layers": case.num_layers,
        **longest,
        **(TINY_MODEL if rehearse else {}),
    }


def device_name() -> str | None:
    """The GPU's name, None on a CPU: torch's where that is imported already, else the driver's, which is the same."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    name = first_line(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return None if name == UNKNOWN else name
