"""From text to batches, in reading order:

``tokenizer`` (text -> ids; ``tokenizers/``) -> ``documents/`` (texts in files) -> ``preparation/`` (texts to token
files) -> ``tokens/`` (token files, orders, streams of one source) -> ``mixture/`` (which source each sample of the run
comes from; pure) -> ``dataset`` (samples by index) -> ``build`` (data sets of a configuration) -> ``batches``,
``loader``, ``dali`` (batches of one data-parallel rank).
"""
