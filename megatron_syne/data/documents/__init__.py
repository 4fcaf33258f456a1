"""Texts in files, and files that appear whole: ``jsonl`` (one line, faults named by line and byte) -> ``blocks`` (a
stream cut into lines) -> ``inputs`` (JSONL, .gz, .zst, parquet, plain text, folders, stdin); ``atomic`` (outputs).
"""
