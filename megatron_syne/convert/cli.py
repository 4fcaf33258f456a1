"""What the conversion tools' command lines share: the layout's options, the progress bar, plans."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.errors import ConfigError

if TYPE_CHECKING:
    from megatron_syne.convert.streams import StoredWeights, Target, Weights

DTYPES = ("bf16", "fp16", "fp32")
DEFAULT_SHARD_SIZE = "5GB"


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that writes a folder of weights."""
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="format of the weights (default: as they are)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder made by this program")
    parser.add_argument(
        "--jobs", type=int, default=0, help="tensors at work at once (default: CPUs, at most 16)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print bytes, files and memory it will take; write nothing"
    )


def add_layout_options(parser: argparse.ArgumentParser) -> None:
    """Options of the Megatron side."""
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--virtual-pipeline-model-parallel-size", type=int)
    parser.add_argument("--num-layers-in-first-pipeline-stage", type=int)
    parser.add_argument("--num-layers-in-last-pipeline-stage", type=int)
    parser.add_argument("--pipeline-model-parallel-layout", help="for example 'Et|t|t|ttL'")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=1)


def add_source_option(parser: argparse.ArgumentParser, name: str = "--from") -> None:
    """Where weights come from."""
    target: dict[str, Any] = {"dest": "source", "required": True} if name.startswith("-") else {}
    parser.add_argument(
        name,
        help="Hugging Face folder or hub id, shards, torch_dist or training checkpoint, Megatron-LM's mp_rank_*",
        **target,
    )
    parser.add_argument("--revision", help="revision of a hub id (default: main)")
    parser.add_argument(
        "--hf-config", type=Path, help="folder with config.json and tokenizer, for a checkpoint that has none"
    )


def open_named(source: str, revision: str | None = None, hf_config: Path | None = None) -> StoredWeights:
    """Weights from a folder, or from the hub where there is no such folder and the name can be an id."""
    from megatron_syne.convert.formats.detect import open_weights

    folder = Path(source)
    if not folder.exists() and source.count("/") == 1 and not source.startswith((".", "~", "/")):
        from megatron_syne.convert.hub import resolve_hub_id

        folder = resolve_hub_id(source, revision)
    elif revision is not None:
        raise ConfigError(f"--revision: {source} is a folder on this machine, not a hub id")
    return open_weights(folder, hf_config)


def plan(weights: Weights, kind: str, options: argparse.Namespace) -> Target:
    """The target that the options ask for; ``kind`` is ``hf``, ``shards`` or ``torch_dist``."""
    from megatron_syne.convert.numbers import SHORT_NAMES

    dtype = None if options.dtype is None else SHORT_NAMES[options.dtype]
    if kind == "hf":
        from megatron_syne.convert.formats.hf import plan_hf

        return plan_hf(
            weights,
            dtype=dtype,
            max_shard_size=options.max_shard_size,
            tokenizer_dir=getattr(options, "tokenizer", None),
        )
    given = {n: v for n, v in vars(options).items() if n in ParallelConfig.__dataclass_fields__}
    multiple = options.make_vocab_size_divisible_by
    if kind == "shards":
        from megatron_syne.convert.formats.shards import plan_shards

        parallel = ParallelConfig(**given)
        return plan_shards(weights, parallel, make_vocab_size_divisible_by=multiple, dtype=dtype)
    from megatron_syne.convert.formats.torch_dist import plan_torch_dist

    layout = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, 1)]
    if layout:
        raise ConfigError(f"{', '.join(layout)}: torch_dist has no layout; it loads in any")
    return plan_torch_dist(weights, make_vocab_size_divisible_by=multiple, dtype=dtype)


def write(weights: Weights, target: Target, options: argparse.Namespace) -> None:
    """Convert as the options say, or with ``--dry-run`` print what it would take."""
    from megatron_syne.convert.engine import convert

    if options.dry_run:
        print_plan(weights, target, options)
        return
    with ProgressBar() as progress:
        convert(
            weights,
            target,
            options.out,
            overwrite=options.overwrite,
            jobs=options.jobs,
            progress=progress,
        )
    changes = config_changes(weights.config, target)
    if changes:
        print("config.json, against the source's:", *changes, sep="\n  ")


def print_plan(weights: Weights, target: Target, options: argparse.Namespace) -> None:
    """What a conversion will read, write and hold in memory."""
    from megatron_syne.convert.engine import estimate

    found = estimate(weights, target, options.jobs)
    print(
        f"{options.out}: would be written as {target.kind}: {found.files} files, "
        f"{found.write_bytes:,} bytes; read: {found.read_bytes:,} bytes; "
        f"memory: {found.memory_bytes / 1e6:,.0f} MB"
    )
    for file in target.files:
        print(f"  {file.path}  {file.size:,}")
    for name, content in sorted(target.documents.items()):
        print(f"  {name}  {len(content):,}")


def config_changes(source: Mapping[str, Any], target: Target) -> list[str]:
    """Keys of the written ``config.json`` that differ from the source's, as ``key: before -> after``."""
    import json

    name = next((n for n in ("config.json", "hf/config.json") if n in target.documents), None)
    if name is None:
        return []
    written = json.loads(target.documents[name])
    absent = object()

    def text(value: Any) -> str:
        return "absent" if value is absent else json.dumps(value)

    return [
        f"{key}: {text(before)} -> {text(after)}"
        for key in sorted({*source, *written})
        if (before := source.get(key, absent)) != (after := written.get(key, absent))
    ]


class ProgressBar:
    """What is being done, how far it is, how fast, and the time left; into a file one line per 10 s."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.what = ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:  # also ends one bar before the next
        if self.bar is not None:
            self.bar.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        """See ``files.Progress``."""
        from tqdm import tqdm

        if self.bar is None or done < self.bar.n or total != self.bar.total:
            self.__exit__()
            interval = 0.2 if sys.stderr.isatty() else 10.0
            self.bar = tqdm(
                total=total, unit="B", unit_scale=True, mininterval=interval, maxinterval=interval
            )
        if what != self.what:
            self.what = what
            self.bar.set_description_str(what, refresh=False)
        self.bar.update(done - self.bar.n)
