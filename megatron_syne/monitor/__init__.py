"""Watching a run: ``console``, ``events`` (tensorboard), ``metrics_log`` (metrics.jsonl), ``wandb``, ``speed``."""
