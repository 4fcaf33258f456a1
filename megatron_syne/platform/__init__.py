"""Where a run computes. The only room that asks "CUDA or CPU?": everything else takes a ``Platform``."""
