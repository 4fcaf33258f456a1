"""From JSONL to batches, in reading order:

``tokenizer`` (text -> ids) -> ``jsonl`` (lines of a file, faults named by line and byte) -> ``prepare``
(many files -> ``.bin/.idx`` and a manifest, published through ``atomic``) -> ``indexed`` (the file format) ->
``mixture`` (which source each sample of the run comes from; pure) -> ``dataset`` (packed samples by index) ->
``build`` (data sets of a configuration) -> ``loader`` (batches of one data-parallel rank).
"""
