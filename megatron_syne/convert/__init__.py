"""Hugging Face weights to Megatron shards and back.

Reading order: ``pieces`` (the idea: every parameter of a rank is made of rectangles of Hugging Face tensors),
``llama`` (the table of the family, data only), ``table`` (names looked up in it), ``files`` and
``safetensors_io`` (safe reading, streaming writing), ``store`` (any rectangle out of any stored layout),
``hf_io`` and ``shards_io`` (the two kinds of folder), ``source`` (weights to start from), ``importing`` and
``export`` (the two directions), ``artifacts`` (what travels beside the tensors), ``certificate`` (hashes of
it all). Needs no GPU and never holds more than a few parameters at a time.
"""
