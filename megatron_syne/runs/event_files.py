"""tensorboard's event files, read without torch: scalars by the names that ``metrics.jsonl`` gives them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_syne.runs.recorder import Recorder

_TAGS = {
    "memory/peak_bytes": "peak_memory_bytes",
    "speed/data_share_percent": "data_share",
    "norm/parameters": "param_norm",
}
_GROUPS = {
    **{group: "" for group in ("train/", "speed/", "time/", "memory/", "progress/")},
    "train_loss/": "loss/",
    "validation_loss/": "validation/",
}


def event_files(folder: Path) -> list[Path]:
    """The event files directly in a folder, oldest first (their names begin with the time of creation)."""

    def age(path: Path) -> tuple[list[int], str]:
        return [int(part) for part in re.findall(r"\d+", path.name)], path.name

    return sorted((path for path in folder.iterdir() if "tfevents" in path.name and path.is_file()), key=age)


def metric_name(tag: str) -> str:
    """``train/loss`` -> ``loss``, ``validation_loss/zh`` -> ``validation/zh``; unknown tags stay as they are."""
    if tag in _TAGS:
        return _TAGS[tag]
    for group, name in _GROUPS.items():
        if tag.startswith(group):
            return name + tag.removeprefix(group)
    return tag


def read_events(paths: Sequence[Path], keep: Sequence[str] | None = None) -> tuple[Recorder, list[str], bool]:
    """As :func:`read_metrics`, of the event files of one run in order; values are single precision.

    A resumed run writes another file, which says from which step on the older ones do not count any more. A file
    that is truncated is one of a run that was killed or writes on; a failed checksum means damage.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    recorder = Recorder(keep)
    problems: list[str] = []
    damaged = False
    for number, path in enumerate(paths):
        try:
            for raw in _records(path):
                event = Event.FromString(raw)
                if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                    recorder.forget_after(event.step - 1)
                for value in event.summary.value if event.HasField("summary") else ():
                    scalar = _scalar(value)
                    if scalar is not None:
                        recorder.put(metric_name(value.tag), event.step, scalar)
        except ValueError as error:
            follows = "" if number == len(paths) - 1 else "; the files after it are read"
            problems.append(f"{path}: {error}; read up to there{follows}")
            damaged = damaged or "truncated" not in str(error)
    return recorder, [*recorder.problems(), *problems], damaged


def _records(path: Path) -> Iterator[bytes]:
    """The records of one file; ValueError where it breaks off."""
    from tensorboard.compat.tensorflow_stub import errors
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader = PyRecordReader_New(str(path))
    number = 0
    while True:
        try:
            reader.GetNext()
        except errors.OutOfRangeError:
            return
        except errors.DataLossError as error:
            what = str(error.message).removeprefix(f"{path} ")
            raise ValueError(f"record {number + 1} {what}") from None
        number += 1
        yield reader.record()


def _scalar(value: Any) -> float | None:
    """The number of one summary value; None for text, histograms, pictures."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor") and value.metadata.plugin_data.plugin_name == "scalars":
        from tensorboard.util.tensor_util import make_ndarray

        return float(make_ndarray(value.tensor).reshape(-1)[0])
    return None
