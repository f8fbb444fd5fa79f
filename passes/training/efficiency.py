"""DSA-QAT's figures of efficiency, as the paper states them.

The paper claims a model "more than 60 %" smaller; INT4, INT6 and INT8 alone would make it 75 to 87.5 %
smaller than f32. 60 % means b_avg = 12.8, as with tables left in floats.
"""

from collections.abc import Mapping
from typing import Final

FULL_BITS: Final = 32


def compression_ratio(average_bits: float) -> float:
    """CR = 32 / b_avg."""
    return FULL_BITS / average_bits


def size_reduction(average_bits: float) -> float:
    """1 − b_avg / 32: the share of f32's bytes that is saved."""
    return 1 - average_bits / FULL_BITS


def speed_up(full_seconds: float, quantized_seconds: float) -> float:
    """Speedup = T_FP32 / T_QAT."""
    return full_seconds / quantized_seconds


def energy(bits: Mapping[str, float], operations: Mapping[str, int]) -> float:
    """E ∝ Σ_l b_l · N_l, in bits times operations: a proportion, not joules."""
    return sum(bits[name] * operations[name] for name in bits)
