"""Megatron-LM's older checkpoints, ``--ckpt-format torch``: opened without torch and without unpickling freely.

iter_0000100/mp_rank_TT/model_optim_rng.pt       one per TP rank, or with pipeline stages
iter_0000100/mp_rank_TT_PPP/model_optim_rng.pt   one per TP and PP rank

Each is a zip of torch's: a pickle with ``args``, ``model`` (or ``model0``, ``model1``, ... with virtual stages),
optimizer and random states, and the numbers of the tensors beside it. Layers are numbered within their chunk
of the model, so that the order of stages and chunks gives their place in the whole.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.files import exists_inside
from megatron_syne.convert.formats.dcp_archive import Archive, StoredTensor, find_tensor
from megatron_syne.convert.formats.dcp_blocks import (
    Block,
    block_places,
    check_replicas,
    check_whole,
    stored_dtypes,
)
from megatron_syne.convert.formats.dcp_folder import checkpoint_folder, close_files, model_of, open_files
from megatron_syne.convert.formats.hf import listed
from megatron_syne.convert.formats.pickles import LEGACY_NAMES, Inert, Tensor, read_pickle
from megatron_syne.convert.pieces import Entry, Kind, check_tensor_parallel, local_shape, matrix, pieces
from megatron_syne.convert.streams import Place, StoredWeights
from megatron_syne.convert.table import find, hf_tensors, table_of
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal

WEIGHTS = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")
_LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")
_PREFIX = re.compile(r"(?:(?:model|module)\.)*")
_CHUNK = re.compile(r"model(\d{0,3})")
_PICKLE_LIMIT_BYTES = 2**28

# What the arguments of the run say of the model, and our name for it.
_ARGUMENTS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "kv_channels",
    "norm_epsilon": "layernorm_epsilon",
    "rotary_base": "rotary_base",
    "normalization": "normalization",
    "add_qkv_bias": "add_qkv_bias",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}


def open_megatron_pt(folder: Path, hf_config: Path | None = None) -> StoredWeights:
    """The weights in a checkpoint of ``model_optim_rng.pt`` files, whatever its TP, PP and VPP.

    ``folder``: the checkpoint, or one that holds ``iter_*`` folders; ``hf_config``: folder with ``config.json``
    of the model. Raises MissingInput, DataError (all problems at once), SecurityRefusal for a pickle that holds
    anything but what Megatron-LM puts there.
    """
    folder = checkpoint_folder(folder, lambda path: bool(_rank_folders(path)))
    model, config, artifacts = model_of(folder, hf_config)
    ranks = _grid(folder)
    descriptors = open_files(folder, ranks.values())
    try:
        found = _Found(model, max(tp for tp, _ in ranks) + 1, max(pp for _, pp in ranks) + 1)
        for (tp, pp), file in sorted(ranks.items()):
            found.read(tp, pp, file, descriptors[file], str(folder / file))
        found.place(folder)
        weights = StoredWeights(
            kind="megatron_pt",
            folder=folder,
            model=model,
            config=config,
            artifacts_dir=artifacts,
            dtypes=stored_dtypes(model, found.places, {}),
            shapes=hf_tensors(model),
            places=found.places,
            replicas=found.replicas,
            descriptors=descriptors,
            ignored=sorted(found.ignored),
        )
        check_replicas(weights)
    except BaseException:
        close_files(descriptors)
        raise
    return weights


def _rank_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if _RANK.fullmatch(entry.name))
    return sorted(name for name in names if exists_inside(folder / name, WEIGHTS))


def _grid(folder: Path) -> dict[tuple[int, int], str]:
    """``(tp_rank, pp_rank)`` to file. Raises DataError where ranks are missing or there twice."""
    found: dict[tuple[int, int], str] = {}
    for name in _rank_folders(folder):
        match = _RANK.fullmatch(name)
        assert match is not None
        if match[3]:
            raise DataError(
                f"{folder / name}: is cut by expert parallelism; mixtures of experts are not supported"
            )
        rank = (int(match[1]), int(match[2] or 0))
        if rank in found:
            raise DataError(f"{folder}: {name} and {found[rank]} are of one rank; remove what is out of date")
        found[rank] = f"{name}/{WEIGHTS}"
    tp_size, pp_size = max(tp for tp, _ in found) + 1, max(pp for _, pp in found) + 1
    if len(found) != tp_size * pp_size:
        absent = [
            f"mp_rank_{tp:02d}_{pp:03d}"
            for tp in range(tp_size)
            for pp in range(pp_size)
            if (tp, pp) not in found
        ]
        raise MissingInput(listed(f"{folder}: files of ranks are missing", absent))
    return found


@dataclass
class _Stored:
    """One tensor of one rank; ``name`` as in the file, ``plain`` with the layer's number in its chunk."""

    tp: int
    pp: int
    chunk: int
    plain: str
    name: str
    file: str
    tensor: StoredTensor


@dataclass
class _Found:
    """What is in the files, read one after the other, and then put in its place."""

    model: ModelConfig
    tp_size: int
    pp_size: int
    stored: list[_Stored] = field(default_factory=list)
    layers: dict[tuple[int, int, int], set[int]] = field(default_factory=dict)
    """Layer numbers by (chunk, pp, tp)."""
    problems: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    places: dict[str, list[Place]] = field(default_factory=dict)
    replicas: dict[str, list[Place]] = field(default_factory=dict)

    def read(self, tp: int, pp: int, file: str, descriptor: int, where: str) -> None:
        """The tensors of one rank's file, found but not read."""
        archive = _archive(descriptor, where)
        state = read_pickle(archive.read("data.pkl", _PICKLE_LIMIT_BYTES), LEGACY_NAMES, where)
        if not isinstance(state, dict):
            raise DataError(f"{where}: expected a dictionary with 'model', found {type(state).__name__}")
        version = state.get("checkpoint_version", 3.0)
        if not isinstance(version, int | float) or version < 3:
            raise DataError(
                f"{where}: checkpoint_version {version!r} orders query, key and value in another way; load and "
                f"save it once with Megatron-LM (checkpoint_version 3.0)"
            )
        if tp == pp == 0:  # all ranks have the same
            self._check_arguments(state.get("args"), file)
        chunks = {
            key: value for key, value in state.items() if isinstance(key, str) and _CHUNK.fullmatch(key)
        }
        self.ignored |= {key for key in state if isinstance(key, str) and key not in chunks}
        if not chunks:
            raise DataError(f"{where}: holds no 'model'; found {', '.join(sorted(map(str, state)))[:200]}")
        for key, content in chunks.items():
            self._read_chunk(tp, pp, int(key[5:] or 0), content, file, archive, where)

    def place(self, folder: Path) -> None:
        """Number the layers over the whole model and cut everything into Hugging Face rectangles. Raises
        DataError that lists what is missing, unexpected or unfit."""
        first: dict[tuple[int, int], int] = {}
        total, wrong = 0, []
        for chunk, pp in sorted({(chunk, pp) for chunk, pp, _ in self.layers}):
            numbers = [self.layers.get((chunk, pp, tp), set()) for tp in range(self.tp_size)]
            if any(one != set(range(len(one))) or one != numbers[0] for one in numbers):
                wrong.append(
                    f"stage {pp}, chunk {chunk}: layers are missing, or not the same on all TP ranks"
                )
            first[chunk, pp] = total
            total += len(numbers[0])
        if total != self.model.num_layers:
            wrong.append(f"{total} layers are stored, the model has {self.model.num_layers}")
        try:
            check_tensor_parallel(self.model, self.tp_size)
        except ConfigError as error:
            wrong.append(f"{self.tp_size} TP ranks: {error}")
        if wrong:
            raise DataError(
                listed(f"{folder}: the files do not fit the model's configuration", wrong + self.problems)
            )
        self.places = {name: [] for name in hf_tensors(self.model)}
        for one in self.stored:
            match = _LAYER.fullmatch(one.plain)
            number = first[one.chunk, one.pp] + int(match[1]) if match else 0
            self._place(one, f"decoder.layers.{number}.{match[2]}" if match else one.plain)
        check_whole(folder, self.model, self.places, self.problems)

    def _read_chunk(
        self, tp: int, pp: int, chunk: int, content: Any, file: str, archive: Archive, where: str
    ) -> None:
        numbers = self.layers.setdefault((chunk, pp, tp), set())
        if not isinstance(content, dict):
            raise DataError(f"{where}: model: expected a dictionary, found {type(content).__name__}")
        if "language_model" in content:
            raise DataError(
                f"{where}: is of Megatron-LM's old model classes (--use-legacy-models), whose names are not "
                f"known here; convert it with Megatron-LM's tools/checkpoint/convert.py --saver core"
            )
        for name, value in content.items():
            plain = name[len(match[0]) :] if (match := _PREFIX.match(str(name))) else str(name)
            if plain.endswith(("_extra_state", *table_of(self.model).ignored_suffixes)):
                self.ignored.add(plain.rpartition(".")[2])
                continue
            if not isinstance(value, Tensor):
                self.problems.append(f"{file}: {name}: not a tensor")
                continue
            if layer := _LAYER.fullmatch(plain):
                numbers.add(int(layer[1]))
            tensor = find_tensor(archive, value, f"{where}: {name}")
            self.stored.append(_Stored(tp, pp, chunk, plain, str(name), file, tensor))

    def _place(self, one: _Stored, global_name: str) -> None:
        try:
            entry = find(global_name, self.model)
        except ConfigError:
            self.problems.append(f"{one.file}: {one.name}: not a tensor of this model; it would be dropped")
            return
        wanted, tensor = local_shape(entry, self.model, self.tp_size), one.tensor
        vocabulary = entry.kind is Kind.VOCABULARY and tensor.shape[1:] == wanted[1:]
        if vocabulary and tensor.shape[0] * self.tp_size < (self.model.vocab_size or 0):
            rows = tensor.shape[0] * self.tp_size
            self.problems.append(
                f"{one.file}: {one.name}: {rows} rows on all TP ranks, the vocabulary has {self.model.vocab_size}"
            )
        if not vocabulary and tensor.shape != wanted:
            self.problems.append(
                f"{one.file}: {one.name}: shape {list(tensor.shape)}, the model gives {list(wanted)}"
            )
            return
        copy = one.plain == table_of(self.model).tied_output.megatron and (
            self.model.share_embeddings_and_output_weights
        )
        again = copy or (entry.kind is Kind.DIRECT and one.tp > 0)
        for place in self._cut(entry, one):
            (self.replicas if again else self.places).setdefault(place.piece.source, []).append(place)

    def _cut(self, entry: Entry, one: _Stored) -> list[Place]:
        """The Hugging Face rectangles of a rank's parameter. How the vocabulary is padded shows in its rows."""
        tensor, (rows, columns) = one.tensor, matrix(one.tensor.shape)
        if entry.kind is Kind.VOCABULARY:
            span = (one.tp * rows, (one.tp + 1) * rows)
            block = Block(one.file, tensor.offset, tensor.dtype, span, (0, columns), one.name)
            return list(block_places(entry, self.model, block))
        return [
            Place(one.file, tensor.offset, columns, tensor.dtype, piece, entry.shift, one.name)
            for piece in pieces(entry, self.model, one.tp, self.tp_size)
        ]

    def _check_arguments(self, arguments: Any, file: str) -> None:
        """The run's own arguments, where they are there, must be those of the model."""
        if not isinstance(arguments, Inert) or not isinstance(arguments.state, dict):
            return
        model = self.model
        expected = {theirs: getattr(model, ours) for theirs, ours in _ARGUMENTS.items()} | {
            "use_rope_scaling": model.rope_scaling_factor is not None,
            "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
        }
        for name, value in expected.items():
            found = arguments.state.get(name)
            if isinstance(found, bool | int | float | str) and found != value:
                self.problems.append(f"{file}: args.{name} is {found!r}, the model gives {value!r}")


def _archive(descriptor: int, where: str) -> Archive:
    if os.pread(descriptor, 1, 0) == b"\x80":  # PROTO, the first opcode
        raise SecurityRefusal(
            f"{where}: a bare pickle, as torch wrote before 1.6: its numbers cannot be found without running it. "
            f"Save it again as a zip file (torch.save's default) on a machine that you can afford to lose"
        )
    archive = Archive(descriptor, 0, os.fstat(descriptor).st_size, where)
    archive.check_byte_order()
    return archive
