"""Training checkpoints: megatron-core's ``torch_dist``, complete or absent, loadable in any layout."""
