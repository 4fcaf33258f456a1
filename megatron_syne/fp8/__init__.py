"""FP8: which layers, which scales, their state; emulated on a CPU, Transformer Engine's on a GPU; guarded."""
