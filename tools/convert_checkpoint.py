"""Convert weights between Hugging Face and Megatron, on a machine without a GPU.

    python tools/convert_checkpoint.py import --hf Meta-Llama-3-8B --out shards \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    python tools/convert_checkpoint.py verify shards
    python tools/convert_checkpoint.py export --from shards --out hf
    python tools/convert_checkpoint.py export --from runs/my_run/checkpoints/iter_0000100 --out hf
    python tools/convert_checkpoint.py inspect shards

Memory stays at one parameter. The output appears complete, with a certificate of hashes, or not at all.
Exit codes: 64 wrong option or layout, 65 damaged or unsupported input, 66 no such input, 73 output exists,
74 disk full or failing, 77 refused for security.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NoReturn

from megatron_syne.checkpoint.folder import is_checkpoint
from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.certificate import CERTIFICATE, verify
from megatron_syne.convert.export import DEFAULT_SHARD_SIZE, DTYPES, export_hf, export_shards, torch_dtype
from megatron_syne.convert.importing import import_to_shards
from megatron_syne.convert.source import WeightSource, open_source
from megatron_syne.errors import EXIT_CONFIG, run_cli
from megatron_syne.models.config import padded_vocab_size


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would exit with 2
        self.print_usage(sys.stderr)
        self.exit(EXIT_CONFIG, f"error: {message}\n")


class ProgressLine:
    """What is being done, how far it is and how fast, on one line (or one line per 10 s into a file)."""

    def __init__(self) -> None:
        self.start = self.shown = time.monotonic()
        self.what = ""
        self.terminal = sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.shown < (0.2 if self.terminal else 10) and done < total:
            return
        self.shown, seconds = now, max(now - self.start, 1e-6)
        rate = f", {done / 1e6 / seconds:,.0f} MB/s" if total > 1_000_000 else ""
        amount = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB{rate}" if rate else f"{done:,} of {total:,}"
        end = "" if self.terminal and done < total else "\n"
        begin = "\r" if self.terminal else ""
        print(
            f"{begin}{what}: {100 * done // max(total, 1)} % ({amount})", end=end, file=sys.stderr, flush=True
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options; a wrong one exits with 64."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    take = commands.add_parser("import", help="Hugging Face folder to TP/PP shards")
    take.add_argument("--hf", required=True, type=Path, help="Hugging Face folder (safetensors)")
    take.add_argument("--out", required=True, type=Path, help="folder to make")
    take.add_argument("--tensor-model-parallel-size", type=int, default=1)
    take.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    take.add_argument("--virtual-pipeline-model-parallel-size", type=int)
    take.add_argument("--num-layers-in-first-pipeline-stage", type=int)
    take.add_argument("--num-layers-in-last-pipeline-stage", type=int)
    take.add_argument("--pipeline-model-parallel-layout", help="for example 'Et|t|t|ttL'")
    take.add_argument("--make-vocab-size-divisible-by", type=int, default=1)
    give = commands.add_parser("export", help="shards or a training checkpoint to a Hugging Face folder")
    give.add_argument("--from", dest="source", required=True, type=Path, help="shards or training checkpoint")
    give.add_argument("--out", required=True, type=Path, help="folder to make")
    give.add_argument("--dtype", choices=list(DTYPES), help="format of the weights (default: as stored)")
    give.add_argument("--max-shard-size", default=DEFAULT_SHARD_SIZE, help="size of one file (5GB)")
    for command in (take, give):
        command.add_argument("--overwrite", action="store_true", help="replace a folder made by this program")
    check = commands.add_parser("verify", help="check shards or an exported folder by their certificate")
    check.add_argument("folder", type=Path)
    check.add_argument("--source", type=Path, help="also hash the files that the shards were made from")
    look = commands.add_parser("inspect", help="what a folder holds")
    look.add_argument("folder", type=Path)
    return parser.parse_args(argv)


def run_import(options: argparse.Namespace) -> None:
    """Hugging Face folder to shards."""
    names = [name for name in vars(options) if name in ParallelConfig.__dataclass_fields__]
    parallel = ParallelConfig(**{name: getattr(options, name) for name in names})
    source = import_to_shards(
        options.hf,
        options.out,
        parallel,
        options.make_vocab_size_divisible_by,
        overwrite=options.overwrite,
        progress=ProgressLine(),
    )
    describe(source)


def run_export(options: argparse.Namespace) -> None:
    """Shards or a training checkpoint to a Hugging Face folder."""
    if is_checkpoint(options.source):
        from megatron_syne.checkpoint.reader import CheckpointReader

        reader = CheckpointReader(options.source)
        stored = reader.full("decoder.final_layernorm.weight").dtype
        out = export_hf(
            reader.full,
            reader.model,
            reader.artifacts_dir,
            options.out,
            stored if options.dtype is None else torch_dtype(options.dtype),
            options.max_shard_size,
            options.overwrite,
            source_dir=options.source,
            origin={"kind": "checkpoint", "folder": options.source.resolve().name},
            progress=ProgressLine(),
        )
    else:
        source = open_source(options.source)
        out = export_shards(
            source, options.out, options.dtype, options.max_shard_size, options.overwrite, ProgressLine()
        )
    describe(open_source(out))


def run_verify(options: argparse.Namespace) -> None:
    """Check a certificate."""
    found = verify(options.folder, options.source, ProgressLine())
    print(
        f"{options.folder}: verified: {found.files} files, {found.tensors} tensors, "
        f"{found.size_bytes:,} bytes of weights\n  weights {found.fingerprint}"
    )


def describe(source: WeightSource) -> None:
    """Print what a source holds."""
    model = source.model
    files = source.store.files()
    tied = "tied" if model.share_embeddings_and_output_weights else "untied"
    kinds = {"hf": "Hugging Face folder", "shards": "TP/PP shards"}
    print(f"{source.folder}: {kinds[source.kind]}, {len(files)} files, {sum(f.size for f in files):,} bytes")
    print(
        f"  {model.model_type}: {model.num_layers} layers, hidden {model.hidden_size}, "
        f"FFN {model.ffn_hidden_size}, {model.num_attention_heads} heads, {model.num_query_groups} KV heads "
        f"of {model.kv_channels}, vocabulary {model.vocab_size}, {tied}"
    )
    print(f"  rope base {model.rotary_base:g}, llama3 scaling {model.rope_scaling_factor or 'none'}")
    if source.layout is not None:
        size = source.layout.tp_size
        print(f"  TP {size} x PP {len(source.layout.chunks)}; layers {source.layout.chunks}")
        print(f"  vocabulary padded to {padded_vocab_size(model, size)}")
    if source.ignored:
        print(f"  left out: {', '.join(source.ignored)}")
    certified = "with" if (source.folder / CERTIFICATE).is_file() else "without"
    print(f"  weights {source.fingerprint} ({certified} a certificate)")


def main() -> None:
    """Run one command."""
    options = parse()
    if options.command == "inspect":
        describe(open_source(options.folder))
    else:
        {"import": run_import, "export": run_export, "verify": run_verify}[options.command](options)


if __name__ == "__main__":
    sys.exit(run_cli(main))
