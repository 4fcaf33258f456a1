"""Surgery on weights, on a machine without a GPU: vocabulary, depth, merging. Any format in, any format out.

    python tools/edit_checkpoint.py extend-vocab --from Meta-Llama-3-8B --tokenizer my_tokenizer --init subword --out hf
    python tools/edit_checkpoint.py expand-blocks --from Meta-Llama-3-8B --num-new 8 --out hf
    python tools/edit_checkpoint.py upscale-depth --from Meta-Llama-3-8B --layers-kept 24 --out hf
    python tools/edit_checkpoint.py merge linear --models a b --scales 0.5 0.5 --out hf
    python tools/edit_checkpoint.py merge task-arithmetic --base Meta-Llama-3-8B \\
        --models trained Meta-Llama-3-8B-Instruct --scales 1 1 --out hf
    python tools/edit_checkpoint.py merge slerp --models a b --t 0.5 --out hf

Memory stays at a few blocks of rows, whatever the model's size. What was done stands in surgery.json beside the
tokenizer (new layers, new tokens: what a training that freezes the rest needs) and in the certificate.
Exit codes as tools/convert_checkpoint.py.
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
    from megatron_syne.convert.streams import Weights


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options; a wrong one exits with 64."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    extend = commands.add_parser("extend-vocab", help="another tokenizer, or one with added tokens")
    extend.add_argument(
        "--tokenizer", dest="new_tokenizer", required=True, type=Path, help="folder of the new tokenizer"
    )
    extend.add_argument(
        "--init", choices=["mean", "subword", "random"], default="mean",
        help="rows of new tokens: mean of all old rows; mean of the token's pieces under the old tokenizer; "
        "random with the old rows' mean and variance",
    )  # fmt: skip
    extend.add_argument("--pad-to", type=int, default=1, help="make the vocabulary a multiple of this")
    extend.add_argument("--seed", type=int, default=0, help="of --init random")
    extend.add_argument(
        "--old-tokenizer", type=Path, help="the model's tokenizer, where it has none beside it"
    )
    expand = commands.add_parser(
        "expand-blocks", help="copies of layers that compute nothing yet (LLaMA-Pro)"
    )
    amount = expand.add_mutually_exclusive_group(required=True)
    amount.add_argument("--every", type=int, help="a copy after every so many layers")
    amount.add_argument("--num-new", type=int, help="so many copies, spread evenly")
    deepen = commands.add_parser("upscale-depth", help="two overlapping copies of the layers (SOLAR)")
    deepen.add_argument("--layers-kept", type=int, required=True, help="of each copy: 24 of 32 give 48")
    for command in (extend, expand, deepen):
        cli.add_source_option(command)
    merge = commands.add_parser("merge", help="one model out of several of one shape")
    ways = merge.add_subparsers(dest="method", required=True, parser_class=Parser)
    linear = ways.add_parser("linear", help="weighted mean")
    linear.add_argument("--no-normalize", action="store_true", help="take the scales as they are")
    task = ways.add_parser("task-arithmetic", help="base + the sum of scale * (model - base)")
    task.add_argument("--base", required=True)
    for way in (linear, task):
        way.add_argument("--scales", nargs="+", type=float, required=True, help="one for each model")
        way.add_argument("--models", nargs="+", required=True)
    arc = ways.add_parser("slerp", help="each tensor on the arc between two models'")
    arc.add_argument("--models", nargs=2, required=True)
    arc.add_argument("--t", type=float, required=True, help="0: the first model, 1: the second")
    for way in (linear, task, arc):
        way.add_argument(
            "--tokenizer", type=Path, help="of hf: tokenizer and chat template (the first model's)"
        )
    for command in (extend, expand, deepen, linear, task, arc):
        cli.add_output_options(command)
        command.add_argument(
            "--format", choices=["hf", "shards", "torch_dist"], default="hf", help="of the output (hf)"
        )
        command.add_argument(
            "--max-shard-size", default=cli.DEFAULT_SHARD_SIZE, help="of hf: size of one file"
        )
        cli.add_layout_options(command)
    return parser.parse_args(argv)


def edited(options: argparse.Namespace) -> Weights:
    """The weights that the command asks for; nothing of them is computed yet."""
    if options.command == "merge":
        return merged(options)
    weights = cli.open_named(options.source, options.revision, options.hf_config)
    if options.command == "extend-vocab":
        from megatron_syne.convert.surgery.vocabulary import extend_vocab

        return extend_vocab(
            weights,
            options.new_tokenizer,
            init=options.init,
            pad_to=options.pad_to,
            seed=options.seed,
            old_tokenizer_dir=options.old_tokenizer,
        )
    from megatron_syne.convert.surgery.depth import expand_blocks, upscale_depth

    if options.command == "expand-blocks":
        return expand_blocks(weights, every=options.every, num_new=options.num_new)
    return upscale_depth(weights, layers_kept=options.layers_kept)


def merged(options: argparse.Namespace) -> Weights:
    """The merge that the options ask for."""
    from megatron_syne.convert.surgery.merging import add_task_vectors, merge_linear, slerp

    models = [cli.open_named(name) for name in options.models]
    if options.method == "linear":
        return merge_linear(models, options.scales, normalize=not options.no_normalize)
    if options.method == "slerp":
        return slerp(models[0], models[1], options.t)
    return add_task_vectors(cli.open_named(options.base), models, options.scales)


def main() -> None:
    """Run one command."""
    options = parse()
    weights = edited(options)
    cli.write(weights, cli.plan(weights, options.format, options), options)


if __name__ == "__main__":
    sys.exit(run_cli(main))
