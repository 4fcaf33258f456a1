"""Parts of a whole, made out of what a run logs: the parts of a step's time, the shares of the sources."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np

from megatron_syne.runs.recorder import Series

_PARTS = {
    "data": "data_seconds",
    "forward-backward": "forward_backward_seconds",
    "optimizer": "optimizer_seconds",
}


def step_parts(series: Mapping[str, Series]) -> dict[str, Series]:
    """``time/<part>`` in seconds: data, forward-backward, optimizer, what is left of the step, and checkpoint.

    {} where the run did not log its step time.
    """
    if "step_seconds" not in series:
        return {}
    whole = series["step_seconds"]
    rest = np.array(whole.values)
    found = {}
    for part, name in _PARTS.items():
        if name in series and series[name].steps == whole.steps:
            found[part] = series[name]
            rest = rest - np.array(series[name].values)
    if not found:
        return {}
    found["other"] = Series(whole.steps, array("d", np.maximum(rest, 0.0)))
    if "checkpoint_seconds" in series and series["checkpoint_seconds"].steps == whole.steps:
        found["checkpoint"] = series["checkpoint_seconds"]
    return {f"time/{part}": each for part, each in found.items()}


def token_shares(series: Mapping[str, Series], window: int) -> dict[str, Series]:
    """``mixture/<source>``: the source's part of the tokens read since ``window`` logged steps before.

    Out of ``tokens/<source>``, which count from the beginning of the run: exact, whatever was planned.
    """
    counts = {
        name.removeprefix("tokens/"): each for name, each in series.items() if name.startswith("tokens/")
    }
    if not counts:
        return {}
    steps = np.unique(np.concatenate([np.array(each.steps) for each in counts.values()]))
    read = {}
    for source, each in counts.items():
        # a source that is not named at a step has read nothing since
        place = np.searchsorted(np.array(each.steps), steps, side="right")
        total = np.concatenate([[0.0], np.maximum.accumulate(np.nan_to_num(np.array(each.values)))])[place]
        before = np.concatenate([np.zeros(min(window, len(total))), total[:-window]])
        read[source] = total - before
    whole = np.maximum(sum(read.values()), 1.0)
    at = array("q", steps.tolist())
    return {
        f"mixture/{source}": Series(at, array("d", (part / whole).tolist())) for source, part in read.items()
    }
