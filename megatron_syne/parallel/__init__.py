"""Who computes what: ``topology`` (pure: the rank grid and the layers of each stage) and ``setup``
(torch.distributed and megatron-core's process groups)."""
