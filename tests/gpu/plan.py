"""What each worker process does, as jobs for ``worker.py``: name, kind, configuration, overrides, options.

``reference`` is the CPU platform's side of every comparison. ``main`` is the GPU as a run has it. ``exact`` is the
GPU in deterministic mode with fp32 products in fp32: cuBLAS, told so by Transformer Engine, takes TF32 for them
otherwise. ``back`` is the CPU platform again, going on from what the GPU saved.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

Job = dict[str, Any]

NEEDS = {"exact": ("reference",), "back": ("exact",)}
VARIABLES = {"exact": {"NVIDIA_TF32_OVERRIDE": "0"}}
NEEDS_WHAT = {"te": "Transformer Engine", "gpu": "a GPU"}
RECIPES = ("delayed", "tensorwise", "blockwise")
FORMATS = ("hybrid", "e4m3")

FP32, BF16 = "precision.params_dtype=fp32", "precision.params_dtype=bf16"
DETERMINISTIC = "train.deterministic_mode=true"
AWARE = "optimizer.use_precision_aware_optimizer=true"
FULL = ["memory.recompute_granularity=full", "memory.recompute_method=uniform"]
SELECTIVE = ["memory.recompute_granularity=selective", "memory.recompute_modules=[core_attn,mlp]"]
CHUNKED = "memory.loss_chunk_tokens=100"  # of 512: the last part is smaller
OFFLOADED = "memory.cpu_offloading=true"
DOCUMENTS = (40, 1, 56, 31)
"""Lengths of the documents in the sample of the document mask."""
VOCABULARY = {"demo": 2560, "stories": 512}


class Plan:
    """The jobs of a session; ``rehearse`` None, ``cpu`` or ``stand-in``: see ``conftest.py``."""

    def __init__(self, folder: Path, config: Path, rehearse: str | None, stories: Path) -> None:
        self.folder, self.config, self.rehearse = folder, config, rehearse
        self.platform = "cpu" if rehearse == "cpu" else "cuda"
        self.stories = stories if stories.is_dir() else None

    def jobs(self, group: str) -> list[Job]:
        """The jobs of one worker, in their order."""
        jobs: list[Job] = getattr(self, group)()
        on = "cpu" if group in ("reference", "back") else self.platform
        for job in jobs:
            own = [f"run_dir={self.run_dir(group, job['name'])}", f"platform={on}"]
            mode = [DETERMINISTIC] if group == "exact" else []
            job["overrides"] = [*own, *mode, *job["overrides"]]
            job["platform"] = on
            needs = job.pop("needs", None)
            if self.rehearse and needs and (needs == "gpu" or self.rehearse == "cpu"):
                job["unable"] = f"rehearsal on {self.rehearse}: needs {NEEDS_WHAT[needs]}"
        return jobs

    def run_dir(self, group: str, name: str) -> Path:
        """Run folder of a job; ``<name>.first`` and ``<name>.second`` share one."""
        return self.folder / group / name.removesuffix(".first").removesuffix(".second")

    def steps(self, count: int) -> int:
        """A rehearsal's long trainings are short."""
        return min(count, 24) if self.rehearse else count

    def train(self, name: str, *overrides: str, steps: int = 20, **options: Any) -> Job:
        """A training that is abandoned after so many steps and saves nothing."""
        return self.job("train", name, *overrides, stop_after=self.steps(steps), **options)

    def saved(self, name: str, *overrides: str, until: int, **options: Any) -> Job:
        """A training that stops cleanly after a step and saves."""
        return self.job("train", name, *overrides, f"train.exit_interval={until}", **options)

    def job(self, kind: str, name: str, *overrides: str, **options: Any) -> Job:
        """Any other."""
        job = {"kind": kind, "name": name, "config": str(self.config), "overrides": list(overrides)}
        return {**job, **options}

    def both_parts(self, name: str, *overrides: str, **options: Any) -> list[Job]:
        """A training of ten steps, stopped and resumed after the fifth."""
        return [
            self.saved(f"{name}.first", *overrides, until=5, **options),
            self.saved(f"{name}.second", *overrides, until=10, **options),
        ]

    def logits(self, dtype: str) -> list[Job]:
        """The demo's base model, and ``stories260k`` where it is there; the demo's also of several documents."""
        override = f"precision.params_dtype={dtype}"
        jobs = [self.job("logits", f"demo.{dtype}", override, rows=rows("demo", 4, 128))]
        if self.stories:
            jobs.append(
                self.job(
                    "logits", f"stories.{dtype}", override, *self.of_stories(), rows=rows("stories", 4, 256)
                )
            )
        packed = [override, "data.reset_attention_mask=true", "train.micro_batch_size=1"]
        tokens = rows("demo", 1, sum(DOCUMENTS))
        return [*jobs, self.job("logits", f"documents.{dtype}", *packed, rows=tokens, documents=DOCUMENTS)]

    def of_stories(self) -> list[str]:
        """The configuration turned to ``stories260k`` and random tokens."""
        mock = ["data.sources={}", "data.stages=[]", "data.mock=true", "train.train_iters=300"]
        mock.append("schedule.lr_wsd_decay_iters=0")
        return [f"model.hf_path={self.stories}", f"checkpoint.initialize_from={self.stories}", *mock]

    def both_platforms(self) -> list[Job]:
        """What the GPU and the CPU do alike."""
        texts = f"data.validation={{en: {{path: {self.config.parent / 'en_web'}}}}}"
        jobs = [self.train("validation", texts, "train.eval_interval=10", "train.eval_iters=2")]
        if self.stories:
            jobs.append(self.train("stories", *self.of_stories()))
        return jobs

    def reference(self) -> list[Job]:
        """The CPU platform's side."""
        return [
            self.saved("written", until=5),
            *self.logits("fp32"),
            *self.logits("bf16"),
            self.train("whole", steps=50),
            *self.both_platforms(),
            self.train("norms", FP32, "monitor.norms_interval=1", steps=3),
        ]

    def main(self) -> list[Job]:
        """The GPU as in any run."""
        guard = [
            f"precision.fp8_guard.interval={self.steps(300) // 6}",
            "precision.fp8_guard.max_loss_gap=0.05",
        ]
        jobs = [
            self.job("describe", "machine"),
            self.train("bf16", steps=300),
            *(self.train(recipe, fp8(recipe), *guard, steps=300, recipe=recipe) for recipe in RECIPES),
            *self.logits("bf16"),
            *self.logits("fp32"),
            *self.both_platforms(),
        ]
        for recipe in RECIPES:
            for form in FORMATS:
                name, kind = f"kernels.{recipe}.{form}", [fp8(recipe), f"precision.fp8_format={form}"]
                jobs.append(self.job("kernels", name, *kind, needs="te", recipe=recipe))
            jobs.append(self.train(f"emulated.{recipe}", fp8(recipe), "precision.fp8_emulation=true"))
        small_gap = ["precision.fp8_guard.interval=4", "precision.fp8_guard.max_loss_gap=1.0e-12"]
        jobs += self.both_parts("state", fp8("delayed"), *small_gap, recipe="delayed", keep_fp8=True)
        jobs += self.both_parts("resumed.bf16")
        jobs += self.both_parts("resumed.delayed", fp8("delayed"), recipe="delayed")
        jobs += [
            self.train("chunked", CHUNKED),
            self.train("full", *FULL),
            self.train("selective", *SELECTIVE),
            self.train("moments", AWARE, "optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16"),
            self.train("offloaded", OFFLOADED, needs="te"),
            self.train("state_offloaded", AWARE, "optimizer.optimizer_cpu_offload=true", needs="gpu"),
        ]
        for recipe in RECIPES:
            gathered = [fp8(recipe), "precision.fp8_param_gather=true"]
            jobs.append(self.train(f"gathered.{recipe}", *gathered, needs="te", recipe=recipe))
        for name, overrides in (
            ("bf16", []),
            ("delayed", [fp8("delayed")]),
            ("tensorwise", [fp8("tensorwise")]),
        ):
            watched = {"needs": "gpu", "watch_device": True, "recipe": name if overrides else None}
            jobs.append(self.train(f"watched.{name}", *overrides, steps=30, **watched))
        return [*jobs, self.job("marks", "marks", needs="gpu")]

    def exact(self) -> list[Job]:
        """The GPU in deterministic mode."""
        written = self.run_dir("reference", "written")
        jobs = [
            self.train("whole", steps=20),
            *self.both_parts("stopped"),
            self.job("resave", "resaved", goes_on_from=[str(written), 5]),
            self.train("from_cpu", goes_on_from=[str(written), 5], steps=10),
        ]
        for recipe in RECIPES:
            jobs.append(self.train(f"whole.{recipe}", fp8(recipe), steps=10, recipe=recipe))
            jobs += self.both_parts(f"stopped.{recipe}", fp8(recipe), recipe=recipe)
            guarded = [fp8(recipe), "precision.fp8_guard.interval=3"]
            jobs.append(self.train(f"guarded.{recipe}", *guarded, steps=10, recipe=recipe))
        jobs += [
            self.train("plain32", FP32, steps=10),
            self.train("chunked32", FP32, CHUNKED, steps=10),
            self.train("full32", FP32, *FULL, steps=10),
            self.train("selective32", FP32, *SELECTIVE, steps=10),
            self.train("unfused32", FP32, steps=10, needs="te", unfused=True),
            self.train("offloaded32", FP32, OFFLOADED, steps=10, needs="te"),
            self.train("norms", FP32, "monitor.norms_interval=1", steps=3),
            self.saved(
                "written_async",
                "checkpoint.async_save=true",
                "checkpoint.save_interval=5",
                until=10,
                slow_writing=True,
            ),
            *self.logits("fp32"),
        ]
        return jobs

    def back(self) -> list[Job]:
        """The CPU platform going on from the GPU's checkpoints."""
        jobs = []
        for name, run in (("from_resaved", "resaved"), ("from_gpu", "stopped")):
            start = [str(self.run_dir("exact", run)), 5]
            jobs.append(self.train(name, goes_on_from=start, steps=10))
        return jobs


def fp8(recipe: str) -> str:
    """The override of a recipe."""
    return f"precision.fp8={recipe}"


def rows(model: str, count: int, length: int) -> list[list[int]]:
    """Token ids, the same in every process: no text, so that no tokenizer is needed."""
    chosen = random.Random(model)
    return [[chosen.randrange(3, VOCABULARY[model]) for _ in range(length)] for _ in range(count)]
