"""Texts to token files: ``job`` (what is asked) -> ``encode`` (a block of lines to tokens; ``fim``) -> ``workers``
(in several processes) -> ``prepare`` (many inputs to one prefix, ``journal`` for the restart, ``counts`` for the
manifest) -> ``shards``, ``merge`` (arrays of jobs).
"""
