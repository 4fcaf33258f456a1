"""One module for each library that turns text into ids; ``data.tokenizer`` chooses among them.

Each class can be pickled, which is how a preparing process hands its tokenizer to its workers: that takes a
fraction of what reading the files again would.
"""
