"""Going on with a conversion that was interrupted: is it the same one, and what of it is really there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from blake3 import blake3

from megatron_syne import __version__
from megatron_syne.convert.files import Progress
from megatron_syne.convert.journal import Workplace
from megatron_syne.convert.outfile import OutFile
from megatron_syne.convert.pieces import matrix
from megatron_syne.convert.slices import split_replicas
from megatron_syne.convert.streams import StoredWeights, Target, Weights
from megatron_syne.convert.tiles import Buffers, Count, hash_tensor
from megatron_syne.convert.workers import work
from megatron_syne.errors import DataError


def plan_identity(target: Target, source: str) -> str:
    """What makes a conversion the same: the whole plan, the source's files, and this program."""
    digest = blake3()
    for part in (
        __version__,
        source,
        target.kind,
        target.layout,
        target.dtypes,
        [(file.path, file.size) for file in target.files],
        target.places,
        sorted(target.documents),
    ):
        digest.update(repr(part).encode() + b"\n")
    for file in target.files:
        for offset, content in file.fixed:
            digest.update(f"{offset} {len(content)}\n".encode())
            digest.update(content)
    for _, content in sorted(target.documents.items()):
        digest.update(f"{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def read_back(
    weights: Weights,
    target: Target,
    place: Workplace,
    files: Mapping[str, OutFile],
    jobs: int,
    progress: Progress,
) -> dict[str, str]:
    """Tensors of an earlier run that really are in the partial files, and their hashes."""
    first, again = {}, {}
    for name, places in target.places.items():
        first[name], again[name] = split_replicas(places)
    written = StoredWeights(
        kind=target.kind,
        folder=place.output,
        model=target.model,
        config={},
        artifacts_dir=None,
        dtypes=target.dtypes,
        shapes=weights.shapes,
        places=first,
        descriptors={name: file.descriptor for name, file in files.items()},
    )
    noted = place.finished["tensor"]
    # what is stored in another form could differ in bits that the tensor's own form does not show: again
    names = [
        name
        for name, places in target.places.items()
        if name in noted and all(p.dtype == target.dtypes[name] and not p.shift for p in places)
    ]
    good: dict[str, str] = {}

    def check_one(name: str, buffers: Buffers, count: Count) -> None:
        try:
            found = hash_tensor(written, name, target.dtypes[name], again[name], buffers, count)
        except DataError:  # files cut short, replicas that differ
            return
        if found == noted[name]:
            good[name] = found

    total = sum(matrix(weights.shapes[n])[0] * written.row_bytes(n) for n in names)
    work([[partial(check_one, n) for n in names]], jobs, lambda size: progress("reading back", size, total))
    return good
