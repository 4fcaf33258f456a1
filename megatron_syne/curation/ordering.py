"""``order``: documents by a number in each, low to high: the perplexity curriculum.

    curate_data.py order --input scored.jsonl --by perplexity --output ordered.jsonl
    curate_data.py order --input scored.jsonl --by perplexity --within topic --buckets 10 \\
        --drop-lowest 0.01 --drop-highest 0.02 --output-dir ordered_by_topic

Llama-3-SynE read its Chinese data in ascending order of the model's own perplexity. Documents with the same number
stay in the order of the input. Memory is 24 bytes a document, and some 50 more while they are sorted: texts stay on
the disk, where each is read in its turn.
"""

from __future__ import annotations

import argparse
import os
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_syne.curation.order_index import DocumentIndex
from megatron_syne.curation.records import (
    Documents,
    Record,
    Source,
    add_output_arguments,
    add_reading_arguments,
    name_in,
    refuse_present,
    with_fields,
)
from megatron_syne.data.documents.atomic import Outputs
from megatron_syne.data.documents.jsonl import number_in
from megatron_syne.errors import ConfigError, DataError

SORTED, GIVEN = "sorted", "given"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_reading_arguments(parser)
    add_output_arguments(parser, split=False)
    parser.add_argument("--by", default="perplexity", metavar="FIELD", help="the number (perplexity)")
    parser.add_argument(
        "--within", metavar="FIELD",
        help="order each value of this field (topic, source) for itself; in one file they follow one another",
    )  # fmt: skip
    parser.add_argument("--buckets", type=int, help="this many of equal counts; the number is written")
    parser.add_argument(
        "--bucket-key", default="bucket", help="field for the bucket's number, from 0 (bucket)"
    )
    parser.add_argument(
        "--within-bucket", choices=[SORTED, GIVEN], default=SORTED,
        help="order in a bucket: by the number (default), or as in the input",
    )  # fmt: skip
    for name in ("--drop-lowest", "--drop-highest"):
        parser.add_argument(
            name, type=_share, default=Fraction(0), metavar="SHARE",
            help="leave out this share of the documents at that end, rounded down (0)",
        )  # fmt: skip


def _share(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a share such as 0.01, found {text!r}") from None


class Placed(NamedTuple):
    """What is kept of the kept documents, in their new order: places in the index, buckets."""

    places: NDArray[np.int64]
    buckets: NDArray[np.int64]
    dropped_lowest: int
    dropped_highest: int


def place(
    values: NDArray[np.float64],
    lowest: Fraction = Fraction(0),
    highest: Fraction = Fraction(0),
    buckets: int = 1,
    within_bucket: str = SORTED,
) -> Placed:
    """The new order of documents with these numbers; pure. Equal numbers keep their order.

    Of n documents floor(n * share) go at either end; of the m that stay, the one of rank r (from 0) is in bucket
    floor(r * buckets / m), so that the sizes of buckets differ by at most one.
    """
    order = np.argsort(values, kind="stable")
    low, high = int(len(values) * lowest), int(len(values) * highest)
    kept = order[low : len(values) - high]
    numbers = np.arange(len(kept), dtype=np.int64)
    numbers *= buckets  # in place: there may be a hundred million
    numbers //= max(len(kept), 1)
    if within_bucket == GIVEN:
        kept = kept[np.lexsort((kept, numbers))]
    return Placed(kept, numbers, low, high)


def run(options: argparse.Namespace) -> int:
    """Do what the options say; raises ConfigError, MissingInput, DataError, CannotCreate."""
    _check(options)
    with Outputs(overwrite=options.overwrite) as outputs:
        documents = Documents(outputs, options)
        source = Source(options, documents.quarantine)
        folder = Path(options.output_dir or os.path.dirname(os.path.abspath(options.output)))
        with DocumentIndex(folder) as index:
            _read(source, options, index)
            if not index.names:
                raise DataError(f"no document to order in {source.tally.describe()}")
            report = _write(source, options, index, documents)
            index.check_unchanged()
        documents.publish(source, {"by": options.by, "within": options.within, "groups": report})
    for one in report:
        print(f"  {one['documents']:12,}  {one['lowest']:12.4f} to {one['highest']:12.4f}  {one['group']}")
    print(source.tally.describe(), flush=True)
    return 0


def _write(
    source: Source, options: argparse.Namespace, index: DocumentIndex, documents: Documents
) -> list[dict[str, Any]]:
    """Every group in its new order; what is told of each."""
    report = []
    values, groups = np.frombuffer(index.values), np.frombuffer(index.groups, np.uint16)
    by_group = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups, minlength=len(index.names)))
    for name, members in zip(index.names, np.split(by_group, ends[:-1]), strict=True):
        placed = place(
            values[members],
            options.drop_lowest,
            options.drop_highest,
            options.buckets or 1,
            options.within_bucket,
        )
        for at, bucket in zip(members[placed.places], placed.buckets, strict=True):
            added = {options.bucket_key: int(bucket)} if options.buckets else {}
            documents.write(with_fields(index.read(at), added), (name,))
        source.tally.written += len(placed.places)
        source.tally.drop("lowest", placed.dropped_lowest)
        source.tally.drop("highest", placed.dropped_highest)
        report.append(_describe(name, values[members], placed, options.buckets))
    return report


def _check(options: argparse.Namespace) -> None:
    wrong = []
    for name in ("drop_lowest", "drop_highest"):
        share = getattr(options, name)
        if not 0 <= share < 1:
            wrong.append(f"--{name.replace('_', '-')}: must lie in [0, 1), found {float(share)}")
    if options.drop_lowest + options.drop_highest >= 1:
        wrong.append("--drop-lowest and --drop-highest leave nothing")
    if options.buckets is not None and options.buckets < 1:
        wrong.append(f"--buckets: must be at least 1, found {options.buckets}")
    if options.within_bucket == GIVEN and options.buckets is None:
        wrong.append("--within-bucket given: needs --buckets")
    if options.output_dir and not options.within:
        wrong.append("--output-dir: needs --within, whose values make the files")
    if wrong:
        raise ConfigError("; ".join(wrong))


def _read(source: Source, options: argparse.Namespace, index: DocumentIndex) -> None:
    """Index all documents."""

    def extract(record: Record) -> tuple[float, str]:
        if options.buckets:
            refuse_present(record, [options.bucket_key], "--bucket-key")
        name = name_in(record, options.within) if options.within else ""
        return number_in(record.fields, options.by, record.line), name

    for chunk in source.chunks(extract):
        for record, (value, name) in chunk:
            index.add(record, value, name)


def _describe(name: str, values: NDArray[np.float64], placed: Placed, buckets: int | None) -> dict[str, Any]:
    """One group's line in the report; ``buckets``: the least number of each, and how many documents."""
    kept = values[placed.places]
    described: dict[str, Any] = {
        "group": name,
        "documents": len(kept),
        "lowest": float(kept.min()) if len(kept) else 0.0,
        "highest": float(kept.max()) if len(kept) else 0.0,
    }
    if buckets:
        numbers, begins, sizes = np.unique(placed.buckets, return_index=True, return_counts=True)
        least = np.minimum.reduceat(kept, begins) if len(kept) else kept
        described["buckets"] = [
            {"bucket": int(number), "documents": int(size), "lowest": float(low)}
            for number, size, low in zip(numbers, sizes, least, strict=True)
        ]
    return described
