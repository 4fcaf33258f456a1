"""The folder for the hub.

Reading order: ``folder`` (what goes in, and the one act that writes it), ``run_facts`` (what a run's own files
tell), ``card`` (the model card), ``licences`` (terms of the base model), ``private`` (keys and paths of this machine,
refused). Needs no GPU and no torch.
"""
