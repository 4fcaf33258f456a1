"""What a model is: ``family`` and ``families`` (one configuration map each), ``hf_config`` (Hugging Face
``config.json`` to :class:`ModelConfig` and back), ``config`` (a run's model resolved), all without torch; ``rope``
and ``gpt`` (megatron-core's GPTModel for one pipeline stage)."""
