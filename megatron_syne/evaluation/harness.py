"""lm-evaluation-harness on a Hugging Face folder, in this process and without a network."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_syne.errors import ConfigError, DataError, MissingInput, disk_fault
from megatron_syne.evaluation.results import tables
from megatron_syne.evaluation.tasks import HOW_TO_INSTALL, is_installed, is_task_file, task_file

BOOTSTRAP_ITERS = 1000
"""Resamplings behind a standard error that has no formula; the harness's own 100,000 take minutes a task."""
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
# What a launcher tells a rank. The harness would take it for a world of its own, and wait for its peers.
_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_RANK_PREFIXES = ("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
_SOFTWARE = ("megatron_syne", "lm_eval", "transformers", "datasets", "torch")


def stand_alone(device: str) -> None:
    """Make this process one that is alone and offline; before anything of the harness is imported.

    Every connection is refused, whatever asks for it: a task file may name a URL anywhere. Without a CUDA
    device asked for, no GPU is seen: looking at one would already take some of the training's memory.
    """
    for name in list(os.environ):
        if name in _RANK_VARIABLES or name.startswith(_RANK_PREFIXES):
            del os.environ[name]
    os.environ |= dict.fromkeys(_OFFLINE, "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not device.startswith("cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.addaudithook(_refuse_network)


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: an Internet address is a tuple, the name of a local socket is not."""
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(args[1], tuple)):
        raise ConnectionError("an evaluation uses no network")


def load_tasks(tasks: Sequence[str], include_path: str | None) -> list[Any]:
    """The harness's task objects, with their documents.

    Raises ConfigError (lm_eval is missing, no such task), MissingInput (no such file, a dataset that is not on
    this machine), DataError (a task file or data set that cannot be read).
    """
    if not is_installed():
        raise ConfigError(f"lm-evaluation-harness is not installed: {HOW_TO_INSTALL}")
    manager = _task_manager(tasks, include_path)
    loaded: list[Any] = []
    for task in tasks:
        name = task
        if is_task_file(task):
            file = task_file(task, include_path)
            if not file.is_file():
                raise MissingInput(f"task {task}: no such file")
            name = str(file)
        elif task not in manager.task_index:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(
                f"task {task}: lm-evaluation-harness {importlib.metadata.version('lm_eval')} has none of that "
                f"name; {hint}Its names: lm-eval ls tasks; your own: a YAML file, or its folder as include_path"
            )
        try:
            item = manager._load_spec(name)
        except Exception as error:
            raise _why_not_loaded(task, error) from None
        loaded += item if isinstance(item, list) else [item]
    return loaded


def _task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks: of ``include_path`` alone where that is enough, else with all of its own.

    Reading its 14,000 files takes 10 s of processor time; a file or name of one's own that is a single task
    needs none of them.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind, TaskIndex

    try:
        own = TaskManager(include_path=include_path, include_defaults=False)
        for task in tasks:
            file = task_file(task, include_path) if is_task_file(task) else None
            entry = own.task_index.get(task) if file is None else TaskIndex.entry_from_path(file)
            if file is not None and not file.is_file():
                continue  # told below
            if entry is None or entry.kind is not Kind.TASK:
                return TaskManager(include_path=include_path)
    except Exception as error:  # whatever YAML it meets on its way
        where = include_path or "the tasks given"
        raise DataError(f"{where}: the harness cannot read the task files: {_words(error)}") from None
    return own


def _why_not_loaded(task: str, error: Exception) -> Exception:
    """What stands behind a task that the harness could not load."""
    if disk_fault(error):
        return error
    words = _words(error)
    offline = any(
        isinstance(each, ConnectionError) or "Offline" in type(each).__name__ for each in _chain(error)
    )
    if offline or "Offline" in words:
        return MissingInput(
            f"task {task}: its dataset is not on this machine, and an evaluation uses no network: {words}. Fetch it "
            "where there is one (load the task there once, and bring its HF_HOME), or let dataset_path and "
            "data_files of the task name local files"
        )
    if isinstance(error, FileNotFoundError):
        return MissingInput(
            f"task {task}: {words}; data_files are local files, from the current folder: an evaluation uses no network"
        )
    return DataError(f"task {task}: the harness cannot load it: {words}")


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _words(error: BaseException) -> str:
    """An error in one line, with its kind where it has few words of its own."""
    text = " ".join(str(error).split())[:300]
    return text if len(text.split()) > 2 else f"{type(error).__name__}: {text}"


def evaluate(
    folder: Path,
    tasks: Sequence[Any],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run loaded tasks on the model in ``folder``, in the format of its weights; what ``results`` writes.

    Raises ConfigError for a device that is not there. Code that comes with a model is never run.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", **own)
    try:
        model = model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device}: {_words(error)}") from None
    tokenizer = AutoTokenizer.from_pretrained(folder, **own)  # type: ignore[no-untyped-call]
    raw = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=BOOTSTRAP_ITERS,
        log_samples=False,
    )
    values, errors = tables({**raw["results"], **raw.get("groups", {})})
    return {
        "results": values,
        "stderr": errors,
        "samples": {task: count["effective"] for task, count in raw["n-samples"].items()},
        "num_fewshot": raw["n-shot"],
        "task_versions": raw["versions"],
        "limit": limit,
        "batch_size": batch_size,
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "software": {name: importlib.metadata.version(name) for name in _SOFTWARE},
    }
