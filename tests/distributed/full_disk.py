"""What a training in two processes says when its disk is full, whether it waited for the checkpoint or not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .ranks import logs_of, wait_ranks

SmallDisk = Callable[[str], AbstractContextManager[Path]]


def assert_full_disk_is_told(ranks: list[subprocess.Popen[Any]]) -> None:
    """Both ranks end with 74; one error, in words."""
    assert wait_ranks(ranks) == [74, 74], [logs_of(r)[-2000:] for r in ranks]
    text = logs_of(ranks[0]) + logs_of(ranks[1])
    assert "cannot write a checkpoint" in text and " bytes free there)" in text
    assert "Traceback" not in text
    assert sum(line.startswith("error") for line in text.splitlines()) == 1
