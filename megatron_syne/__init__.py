"""megatron_syne: continual pre-training of Llama-3 on megatron-core, from Hugging Face weights and back.

Importing the package imports nothing heavy: tools that run on a login node (the launcher, ``--dry-run``)
reach ``config``, ``models.config`` and ``data.mixture`` without torch.
"""

__version__ = "0.1.0"
