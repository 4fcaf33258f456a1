"""Plan before spending: does a run fit, how fast is it, which layout is best, and why. No torch.

``hardware`` (GPUs), ``memory`` (bytes per rank by component), ``speed`` (seconds of a step by part), ``timeline``
(the pipeline's tasks), ``search`` (layouts ranked), ``published`` (measurements that the predictions are held to),
``drawings`` (a configuration's pictures), ``report`` (text).
``costs``, ``update``, ``stacks``, ``calibration`` and ``refit`` belong to ``speed``; ``model_state``, ``activations``,
``recompute`` and ``in_flight`` to ``memory``; ``layouts``, ``shapes``, ``asked``, ``found`` and ``plan_facts`` to
the tool (``cli``).
"""
