"""One configuration map per family: which fields of its config.json mean what. Data only.

The module is named after the ``model_type`` of the Hugging Face configuration and holds ``FAMILY``; its twin in
``megatron_syne/convert/families`` is the table of tensors. A family is added with these two files and one test.
"""
