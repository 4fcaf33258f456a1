"""Numbers to PNG files: ``canvas`` (what all share), ``lengths``, ``mixture``. Nothing here computes or reads."""
