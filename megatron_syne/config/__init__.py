"""What a run is: typed dataclasses (``schema``), YAML with ``base:`` and overrides (``loader``), and the
rules that a configuration must meet before a process is started (``validate``). No torch, no megatron."""
