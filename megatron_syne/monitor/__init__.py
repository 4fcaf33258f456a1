"""Watching a run: ``console`` (progress line), ``events`` (tensorboard and metrics.jsonl)."""
