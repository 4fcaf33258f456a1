"""The kinds of folder that weights lie in. Each knows where every rectangle of every Hugging Face tensor is
(reading) or will be (writing); the bytes are moved by ``convert/engine.py``.
"""
