"""The rules of ``train.deterministic_mode``: no environment variable may allow again what it rules out.

The mode itself is megatron-core's ``deterministic_mode`` and what Megatron-LM asks for beside it (``arguments.py``):
Transformer Engine's and cuBLAS's variables, a fixed algorithm of NCCL, no fused cross-entropy. The platform sets
these; what is refused here would undo them. Everything else of a run may be combined with the mode: Transformer
Engine chooses an attention kernel that is deterministic by itself. A CPU is deterministic in any case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from megatron_syne.preflight.facts import Facts

Problems = Iterator[str]

_MODE = "train.deterministic_mode"
DETERMINISTIC_VARIABLES = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
}
"""Variable -> its values under the mode: megatron-core's ``extensions/transformer_engine.py``, torch's note on
``use_deterministic_algorithms``, and Megatron-LM's ``arguments.py``."""


def variables_are_deterministic(facts: Facts) -> Problems:
    """Of these variables, those that ``launch.env`` or the environment sets have a value that the mode can have. On
    CUDA."""
    if not facts.get(_MODE) or facts.platform == "cpu":
        return
    for name, values in DETERMINISTIC_VARIABLES.items():
        given, found = facts.config.launch.env.get(name), os.environ.get(name)
        if given is not None:
            value, text = given, facts.named(f"launch.env.{name}", given)
        elif found is not None:
            value, text = found, f"the environment variable {name} = {found}"
        else:
            continue
        if value not in values:
            yield (
                f"{text} with {facts.at(_MODE)}: must be {' or '.join(values)}; remove it, or set {_MODE}: false"
            )


DETERMINISM_RULES: tuple[Callable[[Facts], Problems], ...] = (variables_are_deterministic,)
