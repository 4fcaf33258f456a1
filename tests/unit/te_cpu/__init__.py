"""Transformer Engine's Python layers on a CPU: a stand-in for its compiled extension, and what it is tested with.

Only allowed because nothing real can run where the tests do. It shows that the code above the kernels is right
(which function is called with what, shapes, formats, state); it says nothing of the kernels, their speed or their
rounding.
"""
