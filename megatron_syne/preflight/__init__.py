"""What is checked and shown before a process is started: cross-field ``rules``, the batch and learning-rate
arithmetic (``schedule``) and the ``--dry-run`` report (``report``). No torch, no megatron."""
