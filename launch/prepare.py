"""A whole corpus to token files on Slurm: an array of shards, and a job that merges them.

    python launch/prepare.py --input corpus/web-en --tokenizer MODEL_FOLDER --output-prefix data/web-en \\
        --shards 64 --cpus-per-task 16 --time 4:00:00 --partition cpu --account me     submit
    ... --print                                                                        show the scripts only
    python launch/prepare.py --tokenizer MODEL_FOLDER --shards 64 --job corpus/a data/a --job corpus/b data/b
    python launch/prepare.py --status data/web-en data/a data/b                        how far it is

Options that are not listed below go to ``tools/prepare_data.py`` (``--json-key``, ``--min-tokens``, ...). The
same command again submits what is missing and nothing else: a shard whose manifest stands is finished. While
jobs for a prefix are queued or running, a second submission is refused (exit 73). A failed shard takes the
merge out of the queue; the others go on. The bytes are those of one process without shards.

Beside the output, PREFIX.slurm/ keeps ``shards.sbatch``, ``merge.sbatch``, ``submitted.json`` and ``logs/``.
Needs Slurm's commands and what ``tools/prepare_data.py`` needs (no torch).
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "launch"), str(REPOSITORY / "tools")]

import prepare_data  # noqa: E402
from array_script import Resources, Source, array_spec, check, merge_script, shards_script  # noqa: E402
from array_state import describe_inputs, live_jobs, missing_shards, record_of, show_status, unmerged  # noqa: E402
from job import read_json, write_json  # noqa: E402
from slurm import slurm_command, submission_lock  # noqa: E402

from megatron_syne.command_line import Parser  # noqa: E402
from megatron_syne.errors import CannotCreate, ConfigError, MissingInput, run_cli  # noqa: E402

NOT_FOR_TASKS = ("shard", "merge", "verify", "overwrite")
"""Options of the tool that this launcher gives by itself, or that would undo finished shards."""

# -- submission ----------------------------------------------------------------------------------------------


def submit(
    source: Source,
    resources: Resources,
    shards: int,
    tool_options: Sequence[str],
    merge_options: Sequence[str],
) -> str:
    """Submit what is missing of one source; says what was done. Raises CannotCreate where it is taken."""
    wanted = {
        "inputs": list(source.inputs),
        "files": describe_inputs(source.inputs),
        "valid_prefix": source.valid_prefix,
        "shards": shards,
        "options": list(tool_options),
    }
    with submission_lock(source.folder):
        if jobs := live_jobs(source):
            raise CannotCreate(
                f"{source.prefix}: its jobs are not over: {', '.join(jobs)}; wait for them, or scancel them"
            )
        _refuse_another_request(source, wanted)
        if not (left := unmerged(source)):
            return f"{source.prefix}: complete; nothing to submit"
        missing = missing_shards(source, shards)
        scripts = {
            "shards.sbatch": shards_script(source, resources, shards, tool_options),
            "merge.sbatch": merge_script(source, left, resources, shards, merge_options),
        }
        for name, text in scripts.items():
            (source.folder / name).write_text(text)
        array = None
        dependency = []
        if missing:
            # Held until the merge is in the queue too: all of it runs or nothing.
            spec = array_spec(missing, resources.max_running)
            array = _sbatch("--hold", f"--array={spec}", str(source.folder / "shards.sbatch"))
            dependency = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes"]
        try:
            merge = _sbatch(*dependency, str(source.folder / "merge.sbatch"))
            jobs_now = {"submitted": time.strftime("%FT%T%z"), "array": array, "merge": merge}
            write_json(record_of(source), {**wanted, **jobs_now})
        except BaseException:
            if array is not None:
                slurm_command("scancel", array)
            raise
        if array is None:
            return f"{source.prefix}: all {shards} shards are finished; merge job {merge} submitted"
        slurm_command("scontrol", "release", array)
    return f"{source.prefix}: {len(missing)} of {shards} shards to make: array job {array}, then merge job {merge}"


def _refuse_another_request(source: Source, wanted: dict[str, Any]) -> None:
    """Raise CannotCreate where something finished stands that was not made from these inputs by this command."""
    before = read_json(record_of(source))
    changed = [key for key, value in wanted.items() if before.get(key) != value]
    if not changed:
        return
    remedy = f"give the same again, or another prefix, or remove {source.prefix}.* first"
    if standing := [one for one in source.prefixes if os.path.lexists(f"{one}.json")]:
        what = f"made with other {', '.join(changed)}" if before else "not made by this command"
        raise CannotCreate(f"{standing[0]}.json: exists, {what}; {remedy}")
    count = before.get("shards")
    if isinstance(count, int) and len(missing_shards(source, count)) < count:
        raise CannotCreate(f"{source.prefix}: shards made with other {', '.join(changed)} stand; {remedy}")


def _sbatch(*arguments: str) -> str:
    try:
        text = slurm_command("sbatch", "--parsable", *arguments)
    except ConfigError as error:
        if "job array" not in str(error):
            raise
        raise ConfigError(f"{error} (is --shards above MaxArraySize of scontrol show config?)") from None
    return text.strip().split(";")[0]


# -- command line --------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those that go to ``tools/prepare_data.py``."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    what = parser.add_argument_group("what")
    what.add_argument("--input", nargs="+", metavar="PATH", help="input files and folders of one source")
    what.add_argument("--output-prefix", help="where it goes; .bin, .idx and .json are appended")
    what.add_argument(
        "--job", nargs=2, action="append", metavar=("PATH", "PREFIX"), default=[],
        help="instead of --input and --output-prefix: one source to one prefix; may be repeated",
    )  # fmt: skip
    what.add_argument(
        "--valid-suffix", metavar="SUFFIX",
        help="hold documents out, into PREFIX and this (as _valid); --valid-fraction says how many",
    )  # fmt: skip
    what.add_argument("--tokenizer", help="folder with tokenizer.json or tokenizer.model")
    what.add_argument("--shards", type=int, help="tasks of the array, each of which makes one shard")
    what.add_argument("--keep-shards", action="store_true", help="do not remove the shards after the merge")
    what.add_argument("--print", action="store_true", help="show the batch scripts, write nothing")
    what.add_argument("--status", nargs="+", metavar="PREFIX", help="show how far prefixes are")
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--cpus-per-task", type=int, default=1, help="CPUs of a task (1)")
    slurm.add_argument("--workers", type=int, help="tokenising processes of a task (as many as CPUs)")
    slurm.add_argument("--max-running", type=int, help="tasks that may run at the same time (no limit)")
    slurm.add_argument("--time", help="time limit of a task, as sbatch reads it")
    for name in ("partition", "account", "qos"):
        slurm.add_argument(f"--{name}")
    slurm.add_argument(
        "--sbatch-arg", action="append", default=[], metavar="OPTION",
        help="a further option for sbatch, as --sbatch-arg=--mem=32G; may be repeated",
    )  # fmt: skip
    slurm.add_argument(
        "--setup-line", action="append", default=[], metavar="LINE",
        help="shell code before Python starts, as 'module load x'; may be repeated",
    )  # fmt: skip
    slurm.add_argument("--python", default=sys.executable, help="Python on the nodes (this one)")
    args, tool_options = parser.parse_known_args(argv)
    if args.status:
        return args, []
    needed = ("tokenizer", "shards") if args.job else ("input", "output_prefix", "tokenizer", "shards")
    if missing := [name for name in needed if not getattr(args, name)]:
        parser.error("required: " + ", ".join("--" + name.replace("_", "-") for name in missing))
    if args.job and (args.input or args.output_prefix):
        parser.error("--job goes without --input and --output-prefix")
    for name in ("shards", "cpus_per_task", "workers", "max_running"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} = {value}: expected 1 or more")
    return args, tool_options


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    args, extra = parse(argv)
    if args.status:
        print("\n\n".join(show_status(prefix) for prefix in args.status))
        return 0
    sources = []
    for inputs, prefix in [([path], prefix) for path, prefix in args.job] or [
        (args.input, args.output_prefix)
    ]:
        whole = os.path.abspath(prefix)
        valid = None if args.valid_suffix is None else whole + args.valid_suffix
        sources.append(Source(tuple(map(os.path.abspath, inputs)), whole, valid))
    tool_options = ["--tokenizer", os.path.abspath(args.tokenizer), *extra]
    resources = Resources(
        cpus_per_task=args.cpus_per_task, workers=args.workers or args.cpus_per_task, time=args.time,
        partition=args.partition, account=args.account, qos=args.qos, max_running=args.max_running,
        sbatch_args=tuple(args.sbatch_arg), setup_lines=tuple(args.setup_line), python=args.python,
        working_folder=os.getcwd(),
    )  # fmt: skip
    check_request(sources, resources, tool_options)
    merge_options = ["--keep-shards"] if args.keep_shards else []
    if args.print:
        for source in sources:
            print(shards_script(source, resources, args.shards, tool_options))
            print(merge_script(source, source.prefixes, resources, args.shards, merge_options))
        return 0
    refused = []
    for source in sources:
        try:
            print(submit(source, resources, args.shards, tool_options, merge_options), flush=True)
        except CannotCreate as error:  # the other sources go on
            refused.append(str(error))
    if refused:
        raise CannotCreate("; ".join(refused))
    prefixes = shlex.join(os.path.relpath(source.prefix) for source in sources)
    print(f"status: python {shlex.quote(os.path.relpath(__file__))} --status {prefixes}")
    print("resume: the same command again, when no job is left; finished shards are not made twice")
    return 0


def check_request(sources: Sequence[Source], resources: Resources, tool_options: Sequence[str]) -> None:
    """Raise ConfigError or MissingInput before anything is written; the tool's own options are its to judge."""
    check(sources, resources, tool_options)
    prefixes = [prefix for source in sources for prefix in source.prefixes]
    if twice := {prefix for prefix in prefixes if prefixes.count(prefix) > 1}:
        raise ConfigError(f"given twice as a prefix: {', '.join(sorted(twice))}")
    if not os.path.exists(tokenizer := tool_options[1]):
        raise MissingInput(f"--tokenizer: no such file or folder: {tokenizer}")
    for source in sources:
        describe_inputs(source.inputs)
        understood = prepare_data.parse([*source.tool_arguments, *tool_options])
        if understood.valid_prefix != source.valid_prefix:
            raise ConfigError("--valid-prefix: say --valid-suffix here, as several sources may be given")
        if wrong := [name for name in NOT_FOR_TASKS if getattr(understood, name, None)]:
            raise ConfigError(f"--{', --'.join(wrong)}: not for an array, which this command cuts and merges")


if __name__ == "__main__":
    sys.exit(run_cli(main))
