"""gammac: an ahead-of-time compiler for transformers.

diagnostics  files           what is said and how it is written
ir           formats weights the program, what stored bits mean, where bytes live
budget       gammac.targets  what the user allows, what a device can do and what it costs
pipeline     calibration     how passes are run, what they may look at
gammac.passes                one pass a file; the default pipeline is the list to read first
frontend     runtime         transformers in, tokens out
driver       cli             the recipe, and the only file that prints or exits
"""

__version__ = "0.1.2"
