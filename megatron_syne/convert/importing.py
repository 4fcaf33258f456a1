"""Hugging Face folder to TP/PP shards, one parameter at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.certificate import CERTIFICATE, describe_shard, new_certificate
from megatron_syne.convert.files import (
    Progress,
    check_output,
    check_space,
    new_folder,
    quiet,
    read_json_inside,
    sha256_inside,
    write_json,
)
from megatron_syne.convert.hf_io import copy_artifacts
from megatron_syne.convert.pieces import Entry, local_shape
from megatron_syne.convert.safetensors_io import TensorSpec, TensorWriter
from megatron_syne.convert.shards_io import (
    HF_FOLDER,
    MANIFEST,
    WEIGHTS,
    Layout,
    make_layout,
    manifest_of,
    rank_folder,
)
from megatron_syne.convert.source import WeightSource, open_source
from megatron_syne.convert.table import hf_tensors
from megatron_syne.errors import ConfigError
from megatron_syne.models.hf_config import config_dtype


def import_to_shards(
    source_dir: str | Path,
    out_dir: str | Path,
    parallel: ParallelConfig,
    make_vocab_size_divisible_by: int = 1,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> WeightSource:
    """Cut a Hugging Face checkpoint for a layout; the new folder, opened.

    Memory: one parameter of one rank. ``out_dir`` appears complete or not at all, with a certificate.
    Raises ConfigError (layout), DataError, MissingInput, SecurityRefusal (source), CannotCreate (output),
    IOFault (too little space).
    """
    source_dir, out_dir = Path(source_dir), Path(out_dir)
    target = check_output(out_dir, source_dir, overwrite, (MANIFEST, CERTIFICATE))
    source = open_source(source_dir, make_vocab_size_divisible_by)
    if source.kind != "hf":
        raise ConfigError(f"{source_dir}: already a folder of shards; it can be read in any layout as it is")
    layout = make_layout(source.model, parallel)
    plan = {pp: [_spec(entry, source, layout) for entry in layout.stage(pp)] for pp in _stages(layout)}
    size = sum(spec.size_bytes for specs in plan.values() for spec in specs) * layout.tp_size
    check_space(target.parent, size)
    read_bytes = sum(file.size for file in source.store.files())
    meter = _Meter(progress, size + read_bytes)
    config = read_json_inside(source_dir, "config.json")
    with new_folder(target) as scratch:
        tensors, source_files = {}, {}
        shapes = hf_tensors(source.model)
        for file in source.store.files():
            source_files[file.path.name], hashes = file.hash(lambda n: meter.add("hashing the source", n))
            for name, sha256 in hashes.items():
                if name in shapes:
                    info = file.tensors[name]
                    tensors[name] = {"dtype": info.dtype, "shape": list(info.shape), "sha256": sha256}
        shards: dict[str, Any] = {}
        files: dict[str, str] = {}
        for pp_rank in _stages(layout):
            written = _write_stage(scratch, source, layout, pp_rank, plan[pp_rank], meter)
            shards |= written[0]
            files |= written[1]
        (scratch / HF_FOLDER).mkdir()
        for name in copy_artifacts(source_dir, scratch / HF_FOLDER):
            files[f"{HF_FOLDER}/{name}"] = source_files[name] = sha256_inside(scratch, HF_FOLDER, name)
        write_json(scratch / MANIFEST, manifest_of(layout, config_dtype(config, str(source_dir))))
        files[MANIFEST] = sha256_inside(scratch, MANIFEST)
        certificate = new_certificate(
            "shards",
            source={"folder": source_dir.resolve().name, "files": source_files},
            tensors=tensors,
            ignored=source.ignored,
            files=files,
            shards=shards,
        )
        write_json(scratch / CERTIFICATE, certificate)
    source.close()
    return open_source(target)


class _Meter:
    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, what: str, count: int) -> None:
        self.done += count
        self.progress(what, self.done, self.total)


def _stages(layout: Layout) -> range:
    return range(len(layout.chunks))


def _spec(entry: Entry, source: WeightSource, layout: Layout) -> TensorSpec:
    return TensorSpec(
        entry.megatron, source.parameter_dtype(entry), local_shape(entry, layout.model, layout.tp_size)
    )


def _write_stage(
    scratch: Path, source: WeightSource, layout: Layout, pp_rank: int, specs: list[TensorSpec], meter: _Meter
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write all TP ranks of a stage side by side, so that the rows that they share are read from
    the disk once; their part of the certificate and their files' hashes."""
    writers: list[TensorWriter] = []
    try:
        for tp_rank in range(layout.tp_size):
            folder = scratch / rank_folder(tp_rank, pp_rank)
            folder.mkdir()
            metadata = {"format": "pt", "tp_rank": str(tp_rank), "pp_rank": str(pp_rank)}
            writers.append(TensorWriter(folder / WEIGHTS, specs, metadata))
        for spec in specs:
            for tp_rank, writer in enumerate(writers):
                writer.write(spec.name, source.parameter(spec.name, tp_rank, layout.tp_size))
                meter.add("writing shards", spec.size_bytes)
        shards, files = {}, {}
        for tp_rank, writer in enumerate(writers):
            rank = rank_folder(tp_rank, pp_rank)
            files[f"{rank}/{WEIGHTS}"] = writer.finish()
            shards[rank] = {
                entry.megatron: describe_shard(entry, layout, tp_rank, writer.hashes[entry.megatron])
                for entry in layout.stage(pp_rank)
            }
        return shards, files
    finally:
        for writer in writers:
            writer.close()
