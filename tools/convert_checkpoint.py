"""Convert weights between Hugging Face and Megatron, on a machine without a GPU.

    python tools/convert_checkpoint.py import --from Meta-Llama-3-8B --out shards \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    python tools/convert_checkpoint.py import --from Meta-Llama-3-8B --out dist --format torch_dist
    python tools/convert_checkpoint.py verify shards --source Meta-Llama-3-8B
    python tools/convert_checkpoint.py verify shards --logits --reference Meta-Llama-3-8B
    python tools/convert_checkpoint.py export --from shards --out hf
    python tools/convert_checkpoint.py export --from runs/my_run/checkpoints/iter_0000100 --out hf
    python tools/convert_checkpoint.py inspect shards

--from takes any of the formats, so import also cuts shards for another layout and export reads whatever there is.
The output appears complete, with a certificate of hashes, or not at all; a conversion that was interrupted goes
on where it was when the same command is given again.
Exit codes: 64 wrong option or layout, 65 damaged or unsupported input, 66 no such input, 73 output exists,
74 disk full or failing, 77 refused for security.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_syne.command_line import Parser
from megatron_syne.convert import cli
from megatron_syne.errors import run_cli

if TYPE_CHECKING:
    from megatron_syne.convert.streams import StoredWeights


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options; a wrong one exits with 64."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    take = commands.add_parser("import", help="any weights to Megatron shards or a torch_dist checkpoint")
    cli.add_source_option(take)
    cli.add_output_options(take)
    take.add_argument(
        "--format", choices=["shards", "torch_dist"], default="shards",
        help="shards: a folder per TP x PP rank (default); torch_dist: megatron-core's, loads in any layout",
    )  # fmt: skip
    cli.add_layout_options(take)
    give = commands.add_parser("export", help="any weights to a Hugging Face folder")
    cli.add_source_option(give)
    cli.add_output_options(give)
    give.add_argument("--max-shard-size", default=cli.DEFAULT_SHARD_SIZE, help="size of one file (5GB)")
    give.add_argument(
        "--tokenizer", type=Path, help="folder with the tokenizer to ship (default: the source's)"
    )
    check = commands.add_parser(
        "verify", help="check a converted folder by its certificate, or by its logits"
    )
    check.add_argument("folder", type=Path)
    check.add_argument("--source", type=Path, help="also check against the weights that it was made from")
    check.add_argument("--jobs", type=int, default=0, help="tensors at work at once")
    check.add_argument(
        "--logits", action="store_true", help="run the Megatron model against transformers, layer by layer"
    )
    check.add_argument("--reference", type=Path, help="Hugging Face folder to compare logits with")
    check.add_argument("--hf-config", type=Path, help="folder with config.json, for a checkpoint without one")
    look = commands.add_parser("inspect", help="what a folder holds")
    cli.add_source_option(look, "source")
    return parser.parse_args(argv)


def run_import(options: argparse.Namespace) -> None:
    """Any weights to shards or torch_dist."""
    _convert(options, options.format)


def run_export(options: argparse.Namespace) -> None:
    """Any weights to a Hugging Face folder."""
    _convert(options, "hf")


def _convert(options: argparse.Namespace, kind: str) -> None:
    weights = cli.open_named(options.source, options.revision, options.hf_config)
    cli.write(weights, cli.plan(weights, kind, options), options)
    if not options.dry_run:
        describe(cli.open_named(str(options.out)))


def run_verify(options: argparse.Namespace) -> None:
    """Check a certificate, or logits."""
    if options.logits:
        from megatron_syne.parity.compare import compare

        with cli.ProgressBar() as progress:
            report = compare(
                options.folder, options.reference, hf_config=options.hf_config, progress=progress
            )
        print(*report.lines(), sep="\n")
        report.check()
        return
    from megatron_syne.convert.certificate import verify

    with cli.ProgressBar() as progress:
        found = verify(options.folder, options.source, jobs=options.jobs, progress=progress)
    print(
        f"{options.folder}: verified: {found.files} files, {found.tensors} tensors, "
        f"{found.size_bytes:,} bytes of weights\n  weights {found.fingerprint}",
        *(f"  {note}" for note in found.notes),
        sep="\n",
    )


def describe(weights: StoredWeights) -> None:
    """Print what a folder holds."""
    from megatron_syne.convert.certificate import weights_fingerprint
    from megatron_syne.models.config import padded_vocab_size

    model, files = weights.model, weights.files()
    tied = "tied" if model.share_embeddings_and_output_weights else "untied"
    names = {
        "hf": "Hugging Face folder",
        "shards": "TP/PP shards",
        "torch_dist": "torch_dist checkpoint",
        "megatron_pt": "Megatron-LM mp_rank checkpoint",
    }
    size = sum(path.stat().st_size for path in files.values())
    dtypes = "/".join(sorted(set(weights.dtypes.values())))
    print(f"{weights.folder}: {names[weights.kind]}, {len(files)} files, {size:,} bytes")
    print(
        f"  {model.model_type}: {model.num_layers} layers, hidden {model.hidden_size}, "
        f"FFN {model.ffn_hidden_size}, {model.num_attention_heads} heads, {model.num_query_groups} KV heads "
        f"of {model.kv_channels}, vocabulary {model.vocab_size}, {tied}, {dtypes}"
    )
    print(f"  rope base {model.rotary_base:g}, llama3 scaling {model.rope_scaling_factor or 'none'}")
    if weights.layout is not None:
        tp_size = weights.layout.tp_size
        print(f"  TP {tp_size} x PP {len(weights.layout.chunks)}; layers {weights.layout.chunks}")
        print(f"  vocabulary padded to {padded_vocab_size(model, tp_size)}")
    if weights.ignored:
        print(f"  left out: {', '.join(weights.ignored)}")
    if weights.certificate is None:
        print("  without a certificate")
    else:
        print(f"  weights {weights_fingerprint(weights.certificate['tensors'])} (as certified)")


def main() -> None:
    """Run one command."""
    options = parse()
    if options.command == "inspect":
        describe(cli.open_named(options.source, options.revision, options.hf_config))
    else:
        {"import": run_import, "export": run_export, "verify": run_verify}[options.command](options)


if __name__ == "__main__":
    sys.exit(run_cli(main))
