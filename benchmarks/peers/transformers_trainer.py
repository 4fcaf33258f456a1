"""Training with ``transformers.Trainer``, as Llama-3-SynE was trained: ``transformers_trainer.py MODEL OPTIONS.json``.

AdamW (0.9, 0.95), clipping at 1, sdpa attention, weights in fp32 and, with ``bf16``, autocast (what its code asks
for); gradient checkpointing where asked. Prints the seconds of each step as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Random tokens, the same every time."""

    def __init__(self, vocabulary: int, seq_length: int, count: int) -> None:
        chance = torch.Generator().manual_seed(0)
        self.rows = torch.randint(vocabulary, (count, seq_length), generator=chance)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    """Train on random tokens and print."""
    model = LlamaForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
    options = json.loads(sys.argv[2])
    steps, batch, micro = options["steps"], options["global_batch_size"], options["micro_batch_size"]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=batch // micro,
                max_steps=steps,
                learning_rate=1e-4,
                adam_beta2=0.95,
                weight_decay=0.1,
                max_grad_norm=1.0,
                lr_scheduler_type="constant",
                logging_steps=2,
                report_to="none",
                save_strategy="no",
                bf16=options["bf16"],
                gradient_checkpointing=options["gradient_checkpointing"],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Tokens(model.config.vocab_size, options["seq_length"], steps * batch),
            callbacks=[clock],
        )
        trainer.train()
    print("SECONDS " + json.dumps([b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]))


if __name__ == "__main__":
    main()
