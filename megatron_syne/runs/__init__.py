"""Read what runs have left (``metrics.jsonl``, tensorboard events) and compare them. No torch."""
