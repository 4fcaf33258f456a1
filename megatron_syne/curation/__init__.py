"""What is decided about documents before they are tokens, in reading order:

``records`` (JSONL in and out, every line accounted for) -> ``languages`` -> ``topic_features`` (texts to counts of
n-grams) -> ``topic_model`` (the linear classifier of a language) and ``encoder`` (a transformers one) ->
``labelling`` (a folder of them, applied) -> ``topic_scores`` (accuracy and confusion on held-out labels) ->
``topic_training`` -> ``topics`` (the command ``label-topics``); ``perplexity_windows`` -> ``perplexity_output`` ->
``perplexity_scoring`` -> ``perplexity_hf`` -> ``perplexity`` (``score-perplexity``); ``order_index`` -> ``ordering``
(the perplexity curriculum, ``order``); ``synthesis`` (question/answer documents, ``synthesize``).
"""
