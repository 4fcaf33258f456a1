"""How well held-out labels are found: accuracy, precision and recall of each topic, confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def score(topics: Sequence[str], truth: Sequence[str], found: Sequence[str]) -> dict[str, Any]:
    """Scores of found topics against true ones, as JSON.

    ``confusion[i][j]`` counts documents of topic i that were taken for topic j. Precision or recall without a
    document to count it on is null. ``macro_f1`` is the mean over the topics that have held-out documents.
    """
    place = {topic: index for index, topic in enumerate(topics)}
    confusion = np.zeros((len(topics), len(topics)), np.int64)
    np.add.at(confusion, ([place[name] for name in truth], [place[name] for name in found]), 1)
    right, asked, given = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = 2 * right[asked > 0] / (asked + given)[asked > 0]
    return {
        "documents": len(truth),
        "accuracy": _ratio(right.sum(), len(truth)),
        "macro_f1": round(float(f1.mean()), 4) if f1.size else None,
        "topics": {
            topic: {
                "documents": int(asked[i]),
                "precision": _ratio(right[i], given[i]),
                "recall": _ratio(right[i], asked[i]),
            }
            for i, topic in enumerate(topics)
        },
        "confusion": confusion.tolist(),
    }


def describe(language: str, scores: dict[str, Any]) -> str:
    """The scores as text for a terminal: a line for each topic, and the matrix under the topics' numbers."""
    names = list(scores["topics"])
    lines = [
        f"{language}: accuracy {_percent(scores['accuracy'])}, macro F1 {_percent(scores['macro_f1'])}, "
        f"on {scores['documents']:,} held-out documents of {len(names)} topics",
        f"  {'':3} {'precision':>9} {'recall':>7} {'documents':>9}  topic",
    ]
    for number, (name, one) in enumerate(scores["topics"].items(), 1):
        lines.append(
            f"  {number:3} {_percent(one['precision']):>9} {_percent(one['recall']):>7} "
            f"{one['documents']:>9,}  {name}"
        )
    width = max(4, *(len(f"{n:,}") + 1 for row in scores["confusion"] for n in row))
    lines.append("  confusion: rows are true topics, columns what was found")
    lines.append("      " + "".join(f"{number:>{width}}" for number in range(1, len(names) + 1)))
    for number, row in enumerate(scores["confusion"], 1):
        lines.append(f"  {number:3} " + "".join(f"{n or '.':>{width}}" for n in row))
    return "\n".join(lines)


def _ratio(part: Any, whole: Any) -> float | None:
    return round(float(part) / float(whole), 4) if whole else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
