"""``extend-vocab``: embedding and output layer for another tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_syne.convert.formats.documents import (
    VOCABULARY,
    carried,
    check_artifacts,
    json_document,
    read_artifacts,
)
from megatron_syne.convert.pieces import Span
from megatron_syne.convert.streams import Bytes, Weights
from megatron_syne.convert.surgery.derived import Derived, rounded
from megatron_syne.convert.surgery.record import RECORD, extended, record_of
from megatron_syne.convert.surgery.rows import Moments, mean_of, moments, normal, spans
from megatron_syne.convert.surgery.tokens import NONE, Vocabulary, read_vocabulary, same_tokens, sub_pieces
from megatron_syne.convert.table import table_of
from megatron_syne.errors import ConfigError, DataError, MissingInput
from megatron_syne.models.json_file import parse_json

INITS = ("mean", "subword", "random")
GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_FILES = frozenset(
    (
        *VOCABULARY,
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.json",
        "chat_template.jinja",
    )
)
# Keys of generation_config.json that hold ids in other forms than *_token_id.
_OTHER_IDS = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_decoder_ids",
    "bad_words_ids",
    "force_words_ids",
    "sequence_bias",
)

Ids = npt.NDArray[np.int64]


def extend_vocab(
    weights: Weights,
    tokenizer_dir: Path,
    *,
    init: str = "mean",
    pad_to: int = 1,
    seed: int = 0,
    old_tokenizer_dir: Path | None = None,
) -> Weights:
    """Weights for the tokenizer in ``tokenizer_dir``: one with added tokens, or another one altogether.

    Tokens that the model's own tokenizer has too keep their rows, bit for bit, wherever their ids went; rows
    of tokens that are gone are left out. New tokens get, in the embedding and in an output layer of its own,

    - ``mean``: the mean of the rows of all old tokens (Hewitt 2021, "Initializing New Word Embeddings for
      Pretrained Language Models", without its noise);
    - ``subword``: the mean of the rows of the pieces into which the old tokenizer cuts the token's text;
      ``mean`` where there are none;
    - ``random``: normal with the mean and variance that the old tokens' rows have in each column (the diagonal
      of Hewitt's covariance), from ``seed`` and the token's id alone.

    The rows are a multiple of ``pad_to``, and never fewer than before where every old token keeps its id (a
    table that is larger than its tokenizer stays so); rows without a token keep what they held in that case,
    and are ``mean`` otherwise. ``old_tokenizer_dir`` gives the model's own tokenizer where its folder has none.
    Ids in ``config.json`` and ``generation_config.json`` (``eos_token_id``, ...) follow their tokens.

    Raises ConfigError for the options, MissingInput where a tokenizer is missing, DataError where the two have
    no token in common or a special token of the configuration is gone.
    """
    if init not in INITS:
        raise ConfigError(f"init: {init!r}: expected one of {', '.join(INITS)}")
    if pad_to < 1 or not 0 <= seed < 2**64:
        raise ConfigError(f"pad_to: {pad_to} must be above 0, and seed {seed} within 0 and 2**64 - 1")
    documents, old_files = carried(weights), {}
    if old_tokenizer_dir is not None:
        check_artifacts(old_tokenizer_dir, weights.model)
        old_files = read_artifacts([old_tokenizer_dir])
    elif not documents.keys() & {"tokenizer.json", "tokenizer.model"}:
        raise MissingInput(
            "the weights come without a tokenizer; give the folder of the one they were made with"
        )
    old = read_vocabulary(old_files or documents, str(old_tokenizer_dir or weights.artifacts_dir or "source"))
    if not tokenizer_dir.is_dir():
        raise MissingInput(f"{tokenizer_dir}: no such folder; expected one with the new tokenizer")
    check_artifacts(tokenizer_dir, weights.model)
    new_files = read_artifacts([tokenizer_dir])
    new_files = {name: content for name, content in new_files.items() if name in _TOKENIZER_FILES}
    new = read_vocabulary(new_files, str(tokenizer_dir))
    found = _Rows.plan(weights, old, new, pad_to, str(tokenizer_dir))
    kept = {name: content for name, content in documents.items() if name not in _TOKENIZER_FILES}
    result = _Extended(weights, old, new, found, kept | new_files, init=init, pad_to=pad_to, seed=seed)
    result.tokenizer_dirs = [folder for folder in (tokenizer_dir, old_tokenizer_dir) if folder is not None]
    return result


@dataclasses.dataclass
class _Rows:
    """Where the rows of the new embedding come from."""

    source: Ids
    """The old row; ``NONE`` for one to be made."""
    new: Ids
    """Ids of the new tokens, ascending."""
    old: Ids
    """Rows of old tokens, ascending."""
    moved: dict[int, int]
    """Old id of a token to its new id, for all tokens that stay."""
    counts: dict[str, int]

    @classmethod
    def plan(cls, weights: Weights, old: Vocabulary, new: Vocabulary, pad_to: int, where: str) -> _Rows:
        before = weights.model.vocab_size
        assert before is not None, "resolve_model first"
        old_rows = np.array(sorted(number for number in old.ids.values() if number < before), np.int64)
        tokens = same_tokens(new, old, before)
        shared = np.flatnonzero(tokens != NONE)
        if not len(shared):
            raise DataError(
                f"{where}: none of its {len(new.ids)} tokens is one of the old tokenizer's {len(old.ids)}; "
                f"is it the tokenizer that was meant? There is nothing to start the new rows from"
            )
        moved: dict[int, int] = {}
        for number in shared:
            moved.setdefault(int(tokens[number]), int(number))
        stays = len(moved) == len(old_rows) and all(a == b for a, b in moved.items())
        wanted = max(new.size, before) if stays else new.size
        rows = math.ceil(wanted / pad_to) * pad_to
        source = np.full(rows, NONE, np.int64)
        source[: new.size] = tokens
        fresh = np.array(sorted(n for n in new.ids.values() if tokens[n] == NONE), np.int64)
        if stays:  # rows beyond the tokenizer stay what they were
            unused = np.setdiff1d(np.arange(min(before, rows)), np.concatenate([old_rows, fresh]))
            source[unused] = unused
        counts = {
            "kept": int((tokens[shared] == shared).sum()),
            "moved": int((tokens[shared] != shared).sum()),
            "new": len(fresh),
            "dropped": len(old_rows) - len(moved),
            "without_token": rows - len(new.ids),
        }
        return cls(source, fresh, old_rows, moved, counts)


class _Extended(Derived):
    def __init__(
        self,
        weights: Weights,
        old: Vocabulary,
        new: Vocabulary,
        rows: _Rows,
        documents: dict[str, bytes],
        *,
        init: str,
        pad_to: int,
        seed: int,
    ) -> None:
        count = len(rows.source)
        parameters: dict[str, Any] = {
            "init": init,
            "pad_to": pad_to,
            "old_tokenizer": {"file": old.file, "sha256": old.sha256},
            "new_tokenizer": {"file": new.file, "sha256": new.sha256},
            "vocab_size": [weights.model.vocab_size, count],
            **rows.counts,
        }
        if init == "random":
            parameters["seed"] = seed
        super().__init__("extend-vocab", parameters, {"source": weights})
        self.source, self.rows, self.init, self.seed = weights, rows, init, seed
        self.tokenizer_dirs: list[Path] = []
        self.model = dataclasses.replace(weights.model, vocab_size=count)
        self.config = _moved_ids(weights.config, rows, new, "config.json") | {"vocab_size": count}
        self.artifacts_dir, self.documents = None, documents
        if GENERATION_CONFIG in documents:
            given = parse_json(documents[GENERATION_CONFIG], GENERATION_CONFIG)
            documents[GENERATION_CONFIG] = json_document(_moved_ids(given, rows, new, GENERATION_CONFIG))
        self.pieces: dict[int, list[int]] = {}
        if init == "subword":
            tokens = {number: token for token, number in new.ids.items()}
            wanted = [int(number) for number in rows.new]
            found = sub_pieces(new, old, [tokens[n] for n in wanted], weights.model.vocab_size or 0)
            self.pieces = dict(zip(wanted, found, strict=True))
        table = table_of(weights.model)
        self.tables = [name for entry in (table.embedding, table.output) for name in entry.hf]
        self.tables = [name for name in self.tables if name in weights.shapes]
        self.moments: dict[str, Moments] = {}
        for name in self.tables:
            self.shapes[name] = (count, *weights.shapes[name][1:])
            self.moments[name] = moments(weights, name, spans(rows.old))
        record = record_of(weights)
        earlier = np.array([n for a, b in record["new_tokens"] for n in range(a, min(b, count))], np.int64)
        new_tokens = spans(np.union1d(rows.new, np.flatnonzero(np.isin(rows.source, earlier))))
        documents[RECORD] = extended(record, self.operation, parameters, new_tokens=new_tokens)
        self.fresh = set(rows.new.tolist())

    def identity(self) -> str:
        """See :class:`Weights`; with the rows themselves, which follow from files and the tokenizers' library."""
        made = hashlib.sha256(self.rows.source.tobytes() + repr(sorted(self.pieces.items())).encode())
        return f"{super().identity()}\nrows {made.hexdigest()}"

    def folders(self) -> list[Path]:
        """See :class:`Weights`."""
        return [*super().folders(), *self.tokenizer_dirs]

    def read(self, name: str, rows: Span, out: Bytes) -> None:
        """See :class:`Weights`."""
        if name not in self.moments:
            self.source.read(name, rows, out)
            return
        source = self.rows.source[rows[0] : rows[1]]
        cuts = [0, *(np.flatnonzero(np.diff(source) != 1) + 1).tolist(), len(source)]
        for first, stop in pairwise(cuts):
            origin = int(source[first])
            if origin != NONE:
                self.source.read(name, (origin, origin + stop - first), out[first:stop])
            else:
                out[first:stop] = self._made(name, rows[0] + first)

    def _made(self, name: str, token: int) -> Bytes:
        """The row of a new token, or of none."""
        known = self.moments[name]
        values = known.mean
        if token in self.fresh and self.init == "random":
            stream = self.tables.index(name)
            values = known.mean + known.std * normal(self.seed, stream, token, len(known.mean))
        elif pieces := self.pieces.get(token):
            values = mean_of(self.source, name, pieces)
        return rounded(values[None], self.dtypes[name], f"{name}: row {token}")


def _moved_ids(config: dict[str, Any], rows: _Rows, new: Vocabulary, where: str) -> dict[str, Any]:
    """A configuration whose ``*_token_id`` follow their tokens. DataError, for all that cannot, at once."""
    if not rows.counts["moved"] and not rows.counts["dropped"]:
        return dict(config)
    found, problems = dict(config), []
    problems += [f"{key}: holds ids, which is not supported here" for key in _OTHER_IDS if config.get(key)]
    for key, value in config.items():
        if not key.endswith("_token_id") or value is None:
            continue
        named = new.ids.get(new.named.get(key.removesuffix("_id"), ""))
        ids = [_moved_id(one, rows.moved, named) for one in (value if isinstance(value, list) else [value])]
        if None in ids:
            problems.append(
                f"{key}: {value}: not every one of these tokens is in the new tokenizer, whose "
                f"tokenizer_config.json names no {key.removesuffix('_id')} either"
            )
        else:
            found[key] = list(dict.fromkeys(ids)) if isinstance(value, list) else ids[0]
    if problems:
        raise DataError(f"{where}: {'; '.join(problems)}; name it there, or change {where}")
    return found


def _moved_id(number: Any, moved: dict[int, int], named: int | None) -> int | None:
    if type(number) is int and number < 0:  # Llama-2's pad_token_id: none
        return number
    found = moved.get(number) if type(number) is int else None
    return named if found is None else found
