"""lm-evaluation-harness on a checkpoint: ``python -m megatron_syne.evaluation``, and the callback that starts it.

``tasks`` (names, files and when: no torch), ``snapshot`` (a checkpoint as a Hugging Face folder), ``harness`` (the
one module that imports ``lm_eval``), ``results`` (the file it leaves), ``callback`` (beside a training).
"""
