"""Make the folder for the hub: weights, tokenizer, configuration, licence, model card, certificate, SHA256SUMS.

    python tools/release_checkpoint.py --from runs/my_run --name Llama-3-8B-mine \\
        --base-model meta-llama/Meta-Llama-3-8B --language en --language zh --out release
    cd release && sha256sum -c SHA256SUMS

--from takes a run folder (its newest checkpoint), a checkpoint of it, or any weights. The card is filled in from the
run; what was not recorded it says so. A key, a password in an address or a path of this machine in any text file is
refused with its file and line. Exit codes as tools/convert_checkpoint.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_syne.command_line import Parser
from megatron_syne.convert import cli
from megatron_syne.errors import run_cli


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options; a wrong one exits with 64."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--from", dest="source", required=True, type=Path, help="run folder, checkpoint, weights"
    )
    parser.add_argument("--name", required=True, help="of the model, without the organisation")
    parser.add_argument("--base-model", help="hub id of what was trained on")
    parser.add_argument(
        "--licence", help="the hub's identifier (llama3, apache-2.0; default: found by its text)"
    )
    parser.add_argument("--licence-file", type=Path, help="its text, where the weights come without")
    parser.add_argument("--own-terms", action="store_true", help="the licensor gave you others: only warn")
    parser.add_argument("--language", action="append", default=[], help="ISO 639 code; may be repeated")
    parser.add_argument("--evaluation", type=Path, help="JSON: {task: {metric: value}}")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder with the tokenizer to ship (default: the source's)"
    )
    parser.add_argument("--hf-config", type=Path, help="folder with config.json, for weights that have none")
    parser.add_argument("--max-shard-size", default=cli.DEFAULT_SHARD_SIZE, help="size of one file (5GB)")
    cli.add_output_options(parser)
    parser.set_defaults(dtype="bf16")
    return parser.parse_args(argv)


def main() -> None:
    """Plan, then publish."""
    options = parse()
    from megatron_syne.release.folder import plan_release, publish

    plan = plan_release(
        options.source,
        name=options.name,
        base_model=options.base_model,
        licence=options.licence,
        licence_file=options.licence_file,
        own_terms=options.own_terms,
        languages=tuple(options.language),
        evaluation=options.evaluation,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        tokenizer_dir=options.tokenizer,
        hf_config=options.hf_config,
    )
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.dry_run:
        cli.print_plan(plan.weights, plan.target, options)
        return
    with cli.ProgressBar() as progress:
        publish(plan, options.out, overwrite=options.overwrite, jobs=options.jobs, progress=progress)
    print(
        f"{options.out}: {options.name}, {plan.target.size_bytes:,} bytes; check with sha256sum -c SHA256SUMS"
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
