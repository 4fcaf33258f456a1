"""One table per family: which Hugging Face tensors make which Megatron parameter. Data only.

The module is named after the ``model_type`` of the Hugging Face configuration and holds ``TABLE``; its twin in
``megatron_syne/models/families`` maps the configuration. A family is added with these two files and one test.
"""
