"""The empirical study: quantization methods by bits and group, measured by one harness.

Its table is that of "How Good Are Low-bit Quantized LLaMA3 Models?" (arXiv 2404.14047, table 1), with true
bits and quantization time beside the headline bits.

    rows      which methods, at which bits: data
    make      a row's options to a quantized module, and what that took
    storage   bits by the formula, checked against the arrays
    measure   perplexity and KL on texts, accuracy on tasks
    run       row by row, remembered
    estimate  what it would take
    report    the table as Markdown, CSV, JSON
    plot      perplexity over true bits
"""
