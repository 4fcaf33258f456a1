"""Labelled documents made of words that go with a topic, and of words that go with none."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

EN = {
    "Computer Science and Engineering": "compiler network software algorithm processor memory circuit database",
    "History and Geography": "empire river treaty dynasty mountain border colony harvest",
    "Psychology and Sociology": "behaviour emotion therapy community anxiety identity perception family",
}
EN_COMMON = "the of and a in is that it was for on are with as they at be this from have"
ZH = {
    "計算機科學": "編譯器 網絡 軟件 算法 處理器 內存 電路 數據庫",
    "歷史與地理": "帝國 河流 條約 王朝 山脈 邊界 殖民地 收穫",
    "心理與社會": "行為 情緒 治療 社區 焦慮 身份 感知 家庭",
}
ZH_COMMON = "的 是 在 和 了 有 這個 他們 因為 所以 可以 一個"


def make(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """``number`` documents, a third of their words from their topic, languages and topics by turns."""
    chance = random.Random(seed)
    documents = []
    for index in range(number):
        language, topics, common, gap = [("en", EN, EN_COMMON, " "), ("zh", ZH, ZH_COMMON, "")][index % 2]
        topic = list(topics)[index // 2 % len(topics)]
        words = [
            chance.choice(topics[topic].split()) if chance.random() < 0.33 else chance.choice(common.split())
            for _ in range(30)
        ]
        documents.append(
            {"id": index, "text": f"{gap.join(words)} {index}", "topic": topic, "language": language}
        )
    return documents


def write(path: Path, documents: Iterable[Mapping[str, Any]]) -> Path:
    """Documents as JSONL."""
    path.write_text(
        "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents), encoding="utf-8"
    )
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Documents of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(command: ModuleType, *arguments: object) -> int:
    """A subcommand as ``tools/curate_data.py`` runs it."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return int(command.run(parser.parse_args([str(one) for one in arguments])))
