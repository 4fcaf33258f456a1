"""How far a corpus that Slurm tokenises is: what the files say, and what the queue says.

A shard counts as finished when its manifest stands, which ``tools/prepare_data.py`` writes last, and the files
have the sizes that it names; nothing else is remembered, so nothing can contradict the files.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from array_script import Source, array_spec
from job import read_json
from slurm import slurm_command

from megatron_syne.data.documents.inputs import find_inputs
from megatron_syne.errors import ConfigError, MissingInput


def record_of(source: Source) -> Path:
    """Where it is written down what was last submitted for a source."""
    return source.folder / "submitted.json"


def is_whole(prefix: str) -> bool:
    """Whether a prepared prefix stands: its manifest and the two files in the sizes it names."""
    try:
        files = read_json(Path(f"{prefix}.json"))["files"]
        return all(os.path.getsize(f"{prefix}.{name}") == files[name]["bytes"] for name in ("bin", "idx"))
    except (OSError, KeyError, TypeError):
        return False


def shard_prefix(prefix: str, index: int, shards: int) -> str:
    """Where ``tools/prepare_data.py --shard index/shards`` puts its part of a prefix."""
    return f"{prefix}.shard-{index:05d}-of-{shards:05d}"


def unmerged(source: Source) -> list[str]:
    """Prefixes of the source that do not stand yet."""
    return [prefix for prefix in source.prefixes if not is_whole(prefix)]


def missing_shards(source: Source, shards: int) -> list[int]:
    """Numbers of the shards that are not finished. (Those of a merged prefix are gone, and not missed.)"""
    left = unmerged(source)
    return [
        index
        for index in range(shards)
        if not all(is_whole(shard_prefix(prefix, index, shards)) for prefix in left)
    ]


def describe_inputs(paths: Sequence[str]) -> dict[str, Any]:
    """The files that the inputs are now, in short; the digest changes with any name or size.

    Raises MissingInput where there are none.
    """
    if absent := [path for path in paths if not os.path.exists(path)]:
        raise MissingInput(f"no such file or folder: {', '.join(absent)}")
    sizes = [(file, os.path.getsize(file)) for file in find_inputs(paths)]
    digest = hashlib.sha256(
        "\0".join(f"{file}\0{size}" for file, size in sizes).encode("utf-8", "surrogateescape")
    )
    return {"count": len(sizes), "bytes": sum(size for _, size in sizes), "digest": digest.hexdigest()}


def live_jobs(source: Source) -> list[str]:
    """Jobs of this prefix that Slurm still holds, as ``12 (3 PENDING, 5 RUNNING)``."""
    names = f"{source.job_name},{source.merge_name}"
    lines = slurm_command("squeue", "--noheader", "--array", f"--name={names}", "--format=%F %T").splitlines()
    jobs: dict[str, Counter[str]] = {}
    for number, state in map(str.split, lines):
        jobs.setdefault(number, Counter())[state] += 1
    return [
        f"{number} ({', '.join(f'{count} {state}' for state, count in sorted(states.items()))})"
        for number, states in sorted(jobs.items(), key=lambda item: int(item[0]))
    ]


def show_status(prefix: str) -> str:
    """What the files and Slurm say about a prefix. Raises MissingInput where nothing was submitted for it."""
    source = Source((), os.path.abspath(prefix))
    before = read_json(record_of(source))
    if not isinstance(shards := before.get("shards"), int):
        raise MissingInput(f"{record_of(source)}: is not there; nothing was submitted for this prefix")
    source = Source((), source.prefix, before.get("valid_prefix"))
    rows = [("output", one) for one in source.prefixes]
    if not unmerged(source):
        counts = [read_json(Path(f"{one}.json"))["counts"] for one in source.prefixes]
        text = "; ".join(f"{each['documents']:,} documents, {each['tokens']:,} tokens" for each in counts)
        rows.append(("state", f"complete: {text}"))
    else:
        missing = missing_shards(source, shards)
        left = f"; missing: {array_spec(missing, None)}" if missing else "; not merged"
        rows.append(("shards", f"{shards - len(missing)} of {shards} finished{left}"))
        try:
            jobs = ", ".join(live_jobs(source)) or "none; the same command submits what is missing"
        except (ConfigError, MissingInput) as error:
            jobs = f"not known: {error}"
        rows.append(("jobs", jobs))
        names = [f"shard-{index}" for index in missing] or ["merge"]
        rows += [
            (name, last) for name in names if (last := _last_line(source.folder / "logs" / f"{name}.log"))
        ]
    rows.append(("logs", str(source.folder / "logs")))
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


def _last_line(log: Path) -> str:
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")
