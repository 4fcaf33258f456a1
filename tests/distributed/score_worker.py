"""Score documents in one layout after another: ``score_worker.py jobs.json``, a list of arguments of
``megatron_syne.score`` each."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from megatron_syne import score
    from megatron_syne.parallel import setup

    leave = setup.stop_distributed
    setup.stop_distributed = setup.stop_model_parallel  # the same world builds the next layout
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        assert score.main(arguments) == 0
    leave()


if __name__ == "__main__":
    main()
