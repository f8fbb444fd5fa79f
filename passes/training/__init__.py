"""Training with the quantization in the loop, on the module that is compiled.

A Trainer runs a Method over Data; `trained.py` keeps what came of it, for `gammac compile` to take on.
"""
