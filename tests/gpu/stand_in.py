"""As ``worker.py`` for CUDA, where there is none: the platform's own code over the stand-in of ``unit/te_cpu``."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))
    from te_cpu.harness import install

    install()
    import torch

    torch.cuda.reset_peak_memory_stats = lambda *_: None
    from gpu import worker

    worker.main()


if __name__ == "__main__":  # saving starts helper processes that import this file again
    main()
