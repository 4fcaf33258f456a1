"""What is measured on one GPU, in order of importance: name, shape, precision, options. No torch.

Every case runs in a process of its own (``suite.py``), so one that fails takes nothing with it. ``tiny`` shapes are
for a rehearsal on a CPU: everything runs, no figure means anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One measurement."""

    name: str
    kind: str = "ours"
    """``ours``, ``transformers``, ``compiled``; or the module of this folder that measures it: ``machine``,
    ``profile``, ``loader``, ``stall``."""
    num_layers: int = 8
    seq_length: int = 8192
    precision: str = "bf16"
    micro_batch_size: int = 1
    global_batch_size: int = 1
    steps: int = 25
    """Measured, after ``warm`` others."""
    warm: int = 5
    overrides: tuple[str, ...] = ()
    """Options of the run, ``section.field=value``; of ours alone."""
    engine: tuple[tuple[str, object], ...] = ()
    """megatron-core's ``TransformerConfig`` fields put over those of the CUDA platform: what is tried out, and has no
    option of ours until it is found to pay."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of the process (``NVTE_FLASH_ATTN``)."""
    baseline: str | None = None
    """The case that this one is a change of."""
    prediction: str = ""
    """What the change was expected to do, written down before it was measured."""
    minutes: float = 1.5
    """It is ended after so long."""


HIDDEN, FFN, HEADS, GROUPS, VOCABULARY = 4096, 14336, 32, 8, 128256
"""Llama-3-8B's layer."""


def tiny(case: Case) -> Case:
    """The case as a CPU can run it in seconds; its widths are ``TINY``'s."""
    overrides = tuple(text for text in case.overrides if not text.startswith("memory.loss_chunk_tokens"))
    if overrides != case.overrides:
        overrides += ("memory.loss_chunk_tokens=48",)
    return replace(case, num_layers=min(case.num_layers, 2), seq_length=128, steps=3, warm=2, overrides=overrides)


TINY = {"hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 8, "num_query_groups": 4, "vocab_size": 2048}
"""In place of Llama-3-8B's, in a rehearsal."""
