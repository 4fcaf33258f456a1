"""Weights from any format to any other, proved, in bounded memory, as fast as the disk.

Reading order: ``pieces`` (the idea: every parameter of a rank is made of rectangles of Hugging Face tensors),
``families/`` (a table each, data only), ``table`` (names looked up in it), ``streams`` (weights to read, places to
write), ``formats/`` (where the rectangles lie: hf, shards, torch_dist, megatron_pt), ``engine`` (moves them) with
``lanes``, ``tiles``, ``feeder``, ``workers`` and ``outfile`` (read once, hashed and written beside each other) and
``journal`` (what an interrupted one has done), ``certificate`` (proves it), ``surgery/`` (weights computed from
weights), ``weights`` (tensors for training; the only part that needs torch), ``artifacts`` and ``hub``, ``cli``.
"""
