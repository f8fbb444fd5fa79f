"""TIR kernels for what is not a product with packed weights: norms, positions, attention, elementwise.

Each is made by a function of its sizes. Tensors are [rows, width] in f32, row by row in memory; `rows` is a
number, or None for one that is known only when the kernel runs.
"""
