"""``last_exit.json``: how a run ended, for the launcher and for people; and which rank speaks about it.

When one rank fails the others soon fail too, for want of a peer. The first one to claim the record is the one
whose error counts: it is written down and shown, and the rest stay quiet.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

HEAD_START_SECONDS = 2.0
"""An error that all ranks meet alike is for rank 0 to tell: the others claim it this much later."""


class ExitRecord:
    """``<run_dir>/last_exit.json``: ``{"exit_code": 75, "iteration": 40, "rank": 0, "time": ...}``."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.path = run_dir / "last_exit.json"
        self.rank = rank

    def forget(self) -> None:
        """Remove the record of the last start; rank 0 calls it before the ranks meet."""
        self.path.unlink(missing_ok=True)

    def write(self, exit_code: int, iteration: int) -> None:
        """A run that ended well, or stopped cleanly."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(self._text(exit_code, iteration))
        temporary.replace(self.path)

    def claim(self, exit_code: int, iteration: int, met_alike: bool) -> bool:
        """Write down a failure unless another rank has; whether this rank's error is the one to show.

        ``met_alike``: an error of the user's input, which all ranks may raise at the same time.
        """
        if met_alike and self.rank != 0:
            time.sleep(HEAD_START_SECONDS)
        temporary = self.path.with_name(f".{self.path.name}.{self.rank}.{os.getpid()}")
        try:
            temporary.write_text(self._text(exit_code, iteration))
            os.link(temporary, self.path)  # unlike rename, fails where the name is taken
        except FileExistsError:
            return False
        except OSError:  # a full disk cannot take the record either: then rank 0 speaks
            return self.rank == 0
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _text(self, exit_code: int, iteration: int) -> str:
        record = {"exit_code": exit_code, "iteration": iteration, "rank": self.rank, "time": time.time()}
        return json.dumps(record) + "\n"
