"""Megatron-core against transformers on the same tokens, layer by layer in bounded memory.

report = compare(Path("shards"), Path("Meta-Llama-3-8B"))
print(*report.lines(), sep="\n")
report.check()
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.nn.functional import linear

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.files import Progress, quiet
from megatron_syne.errors import DataError
from megatron_syne.models.hf_config import model_config_from_hf
from megatron_syne.parity.filling import Lender
from megatron_syne.parity.megatron_side import MegatronSide, Source, megatron_side
from megatron_syne.parity.probes import LENGTHS, Probe, make_probes
from megatron_syne.parity.reference import Reference
from megatron_syne.parity.report import Comparison, Difference, Report
from megatron_syne.parity.tensors import open_tensors
from megatron_syne.platform.base import select

TOLERANCE = 3e-4
"""Relative difference (``Difference.relative``) up to which fp32 arithmetic in another order is to blame. Seen:
2e-5 over four layers of 8B shape, 5e-5 over 32 layers of random weights three times the usual size. The mildest
faults tried, a wrong epsilon and one tensor rounded to fp16, lie above it in a small model; a rounding that a
large one hides is for the certificate's hashes to find."""

ROWS = 4096
"""Rows of the output layer that are multiplied at a time."""


def compare(
    weights: Path,
    reference: Path | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    tokens: Sequence[int] | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    hf_config: Path | None = None,
    progress: Progress = quiet,
) -> Report:
    """Compare the hidden states after every layer and all logits; both sides in fp32 on the CPU.

    ``weights``: any format that ``convert.weights.open_source`` reads, for the Megatron side. ``reference``: the
    Hugging Face folder for transformers (not given = the weights themselves; that leaves conversion out and
    compares only what the two engines compute). ``lengths``, ``tokens``, ``seed``: see ``probes.make_probes``.

    Each side goes on from its own hidden states, so errors add up as in a real forward pass. Memory: one layer
    in fp32, attention's scores (3 x heads x length^2 x 4 bytes), hidden states of the probes; not the depth.
    A difference is not an error here: ``Report.check`` raises it. Raises MissingInput, DataError,
    SecurityRefusal, and ConfigError where transformers lacks the family.
    """
    from megatron_syne.convert.weights import open_source

    source = open_source(weights, hf_config=hf_config)
    try:
        return compare_source(
            source,
            weights,
            reference or weights,
            lengths=lengths,
            tokens=tokens,
            seed=seed,
            tolerance=tolerance,
            progress=progress,
        )
    finally:
        source.close()


def compare_source(
    source: Source,
    name: Path,
    reference: Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    tokens: Sequence[int] | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    progress: Progress = quiet,
) -> Report:
    """:func:`compare` for an open source; ``name`` stands for it in the report."""
    select("cpu")  # before transformers, too, can look for a GPU
    with torch.no_grad(), ExitStack() as stack:
        tensors = open_tensors(reference)
        stack.callback(tensors.close)
        right = model_config_from_hf(tensors.config, str(reference))
        # by the reference's context: a source that has lost its scaling would not reach far
        probes = make_probes(right, lengths, tokens, seed)
        _check_sizes(source.model, name, right, reference)
        theirs = Reference(tensors)
        ours = stack.enter_context(megatron_side(source))
        title = f"{name} in megatron-core against {reference} in {theirs.name}, fp32"
        report = Report(title, [str(probe) for probe in probes], tolerance, _notes(right, probes))
        _forward(ours, theirs, probes, report, progress)
    return report


def _check_sizes(model: ModelConfig, name: Path, reference: ModelConfig, folder: Path) -> None:
    """What must agree for states to be comparable at all; everything else shows in the numbers."""
    different = [
        f"{key} {getattr(model, key)} against {getattr(reference, key)}"
        for key in ("num_layers", "hidden_size", "vocab_size")
        if getattr(model, key) != getattr(reference, key)
    ]
    if different:
        raise DataError(f"{name}: cannot be compared with {folder}: {', '.join(different)}")


def _forward(
    ours: MegatronSide, theirs: Reference, probes: list[Probe], report: Report, progress: Progress
) -> None:
    layers, done = theirs.num_layers, theirs.vocabulary_bytes
    total = 2 * theirs.vocabulary_bytes + layers * theirs.layer_bytes  # of one side, in fp32
    progress("embedding", 0, total)
    mine, other = _embed(ours, theirs, probes)
    report.stages["embedding"] = _apart(mine, other)
    lender = Lender()  # one for both: never are two layers in memory
    calls = [theirs.prepare(probe) for probe in probes]
    for index in range(layers):
        progress(f"layer {index}", done, total)
        run = theirs.layer(index, [call[index] for call in calls], lender)
        other = [run(probe, hidden) for probe, hidden in enumerate(other)]
        run = ours.layer(index, probes, lender)
        mine = [run(probe, hidden) for probe, hidden in enumerate(mine)]
        report.stages[f"layer {index}"] = _apart(mine, other)
        done += theirs.layer_bytes
    run = theirs.final_norm(lender)
    other = [run(probe, hidden) for probe, hidden in enumerate(other)]
    run = ours.final_norm(lender)
    mine = [run(probe, hidden) for probe, hidden in enumerate(mine)]
    report.stages["final norm"] = _apart(mine, other)
    found = [Comparison(len(probe.tokens)) for probe in probes]
    for start, part in ours.vocabulary("output_layer.weight"):
        for first in range(0, len(part), ROWS):
            progress("logits", done + 4 * (start + first) * theirs.hidden_size, total)
            rows = part[first : first + ROWS].float()
            same_rows = theirs.output(start + first, start + first + len(rows)).float()
            for comparison, a, b in zip(found, mine, other, strict=True):
                comparison.add(linear(a, rows), linear(b, same_rows))
    report.stages["logits"] = [comparison.result() for comparison in found]
    progress("logits", total, total)


def _embed(
    ours: MegatronSide, theirs: Reference, probes: list[Probe]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The embedding's rows of every probe's tokens, ours and the reference's."""
    mine = [torch.full((len(probe.tokens), theirs.hidden_size), torch.nan) for probe in probes]
    other = [torch.full_like(hidden, torch.nan) for hidden in mine]
    for start, rows in ours.vocabulary("embedding.word_embeddings.weight"):
        same_rows = theirs.embedding(start, start + len(rows))
        for probe, a, b in zip(probes, mine, other, strict=True):
            here = (probe.tokens >= start) & (probe.tokens < start + len(rows))
            a[here] = rows[probe.tokens[here] - start].float()
            b[here] = same_rows[probe.tokens[here] - start].float()
    return mine, other


def _apart(mine: list[torch.Tensor], other: list[torch.Tensor]) -> list[Difference]:
    results = []
    for a, b in zip(mine, other, strict=True):
        comparison = Comparison(len(a))
        comparison.add(a, b)
        results.append(comparison.result())
    return results


def _notes(model: ModelConfig, probes: list[Probe]) -> list[str]:
    window = model.window_size
    longest = max(len(probe.tokens) for probe in probes)
    if window is not None and longest <= window:
        return [
            f"the sliding window of {window} tokens is not reached: add a longer length to compare beyond it"
        ]
    return []
