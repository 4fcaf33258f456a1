"""What a model is: ``llama`` (Hugging Face ``config.json`` to :class:`ModelConfig` and back, shapes by name;
no torch) and ``gpt`` (megatron-core's GPTModel for one pipeline stage)."""
