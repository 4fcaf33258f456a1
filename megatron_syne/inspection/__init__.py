"""What a person who does not trust the data wants to see: ``documents``, ``samples``, ``lengths``, ``mixture``
(the plan), ``consumed`` (what a run has read). Each is a command of ``tools/inspect_data.py``; no torch."""
