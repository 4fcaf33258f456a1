"""What a run is: typed dataclasses (``schema``), YAML with ``base:`` and overrides (``loader``, ``tree``,
``build``), and the sums that follow from them (``arithmetic``). No torch, no megatron."""
