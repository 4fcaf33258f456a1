"""Evaluate a checkpoint or a Hugging Face folder with lm-evaluation-harness, offline:

    python -m megatron_syne.evaluation --checkpoint runs/x/checkpoints/iter_0000100 \\
        --tasks arc_easy,mine.yaml --include-path tasks --output scores.json

A checkpoint is exported to a temporary Hugging Face folder, which is removed afterwards. The tasks' data must be
on this machine: local files, or data sets in the cache of Hugging Face (HF_HOME). A task file may name Python
functions of its own folder (!function), which are run: take task files only from whom you trust.
Exit codes: 64 wrong option, unknown task or no lm_eval, 65 damaged input, 66 no such input or data set,
73 the output cannot be made, 74 disk full or failing, 77 refused for security.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from megatron_syne.checkpoint.folder import step_of
from megatron_syne.command_line import Parser
from megatron_syne.errors import ConfigError, MissingInput, run_cli
from megatron_syne.evaluation.harness import evaluate, load_tasks, stand_alone
from megatron_syne.evaluation.results import flat_metrics, write_results
from megatron_syne.evaluation.snapshot import hf_snapshot


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options; a wrong one exits with 64."""
    parser = Parser(prog="python -m megatron_syne.evaluation", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="training checkpoint, converted weights or Hugging Face folder",
    )
    parser.add_argument("--tasks", required=True, help="names or YAML files, separated by commas")
    parser.add_argument("--include-path", help="folder with further task files")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    parser.add_argument(
        "--scratch", type=Path, help="where the exported folder lies (default: beside the output)"
    )
    parser.add_argument("--num-fewshot", type=int, help="examples in the context (default: the task's own)")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences at a time")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument(
        "--beside", type=int, metavar="PID", help="run at low priority, and end with that process"
    )
    options = parser.parse_args(argv)
    options.tasks = [task.strip() for task in options.tasks.split(",") if task.strip()]
    if not options.tasks:
        parser.error("--tasks: names none")
    for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Export, evaluate, write."""
    options = parse(argv)
    stand_alone(options.device)
    if options.beside is not None:
        stay_beside(options.beside)
    signal.signal(signal.SIGTERM, _end)  # so that the exported folder is removed
    if not options.checkpoint.is_dir():
        raise MissingInput(f"--checkpoint {options.checkpoint}: no such folder")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise MissingInput(f"--include-path {options.include_path}: no such folder")
    if options.output.is_dir():
        raise ConfigError(f"--output {options.output}: is a folder; name a file")
    started = time.monotonic()
    tasks = load_tasks(options.tasks, options.include_path)  # first: what is wrong there costs no export
    scratch = options.scratch or options.output.resolve().parent
    scratch.mkdir(parents=True, exist_ok=True)
    with hf_snapshot(options.checkpoint, scratch) as snapshot:
        found = evaluate(
            snapshot.folder,
            tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            device=options.device,
        )
    step = step_of(options.checkpoint.resolve())
    content = {
        "source": str(options.checkpoint),
        "step": None if step < 0 else step,
        "weights": snapshot.weights,
        "tasks": options.tasks,
        **found,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_results(options.output, content)
    for name, value in flat_metrics(content).items():
        print(f"{name}: {value:.6g}")
    print(f"{options.output}: {len(found['results'])} tasks in {content['seconds']:g} s")
    return 0


def stay_beside(pid: int) -> None:
    """Lowest priority, and a SIGTERM when the training that started this process is gone, however it went."""
    import ctypes

    os.nice(19)
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != pid:
        _end()


def _end(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(run_cli(main))
