"""Which source each sample of a run comes from, pure and exact: ``shares`` (groups multiplied out) -> ``interleave``
(sources in turn) -> ``plan`` (segments; ``plan_json``) -> ``planning`` (of a configuration, new or resumed) ->
``ledger`` (what a checkpoint keeps), ``supply`` (does a source run dry), ``reweighting``, ``report``.
"""
