"""The training program with a witness: ``recording_train.py FOLDER --config ...`` trains, and each rank adds to
``FOLDER/rank<r>_<pid>.jsonl`` a line per step with the tokens of every sample that it was given.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    from megatron_syne import assembly, train

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    build = assembly.build_trainer

    def with_witness(config: Any, model: Any, platform: Any, info: Any) -> Any:
        trainer = build(config, model, platform, info)
        stream = (folder / f"rank{info.rank}_{os.getpid()}.jsonl").open("a")
        given = trainer.train_data.global_batch

        def global_batch(start: int) -> Any:
            batches = given(start)
            rows = [
                [*map(int, tokens), int(labels[-1])]
                for batch in batches
                for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True)
            ]
            stream.write(json.dumps({"step": trainer.state.step + 1, "rows": rows}) + "\n")
            stream.flush()
            return batches

        trainer.train_data.global_batch = global_batch
        return trainer

    assembly.build_trainer = with_witness
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    from megatron_syne.errors import run_cli

    sys.exit(run_cli(main))
