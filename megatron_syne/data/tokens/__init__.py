"""Token files and their order: ``indexed`` (megatron-core's ``.bin/.idx``, written) -> ``reader`` (and read, checked by
``index_check``; ``fields``: numbers kept with documents) -> ``orders`` (of documents), ``packing`` (into samples) ->
``index_cache`` (both, made once for all ranks) -> ``streams`` (the endless tokens of one source).
"""
