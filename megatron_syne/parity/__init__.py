"""Does the converted model compute the same? Megatron-core's layers against those of transformers, on the CPU.

A reader of any weights stands on one side, the safetensors library and the model class of transformers on the
other, and both go through the same tokens layer by layer; one layer of one side is in memory at a time, so an
8B fits in 4 GB. The only room that imports both engines.
"""
