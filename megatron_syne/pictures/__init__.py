"""Numbers to PNG files and HTML pages, one module for each picture; ``canvas`` and ``page`` are what they share.

Nothing here computes or reads: a picture takes plain values.
"""
