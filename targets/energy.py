"""Joules of a decoded token: bytes read from memory and multiply-adds, each at the target's picojoules.

With the bytes of weights alone this is the simplest model: proportional to the sum of bits by weights.
"""

from typing import Final

from gammac.ir import Module, Op
from gammac.targets.cost import (
    CONTEXT,
    FLOAT_BYTES,
    Formats,
    Sizes,
    attention_work,
    decode_function,
    format_of,
    numel_at,
    weight_cost,
)
from gammac.targets.target import Target

PICO: Final = 1e-12


def op_joules(op: Op, module: Module, target: Target, sizes: Sizes, formats: Formats | None = None) -> float:
    """Of one op. What is neither a product nor attention moves nothing that caches don't hold."""
    ref, energy = op.weight(), target.energy
    if op.name == "linear" and ref is not None:
        weight = module.weights[ref.name]
        format_ = format_of(weight, formats)
        macs = numel_at(op.operands[0].type, sizes) * int(str(weight.type.shape[0]))
        read = weight_cost(weight, (), module, target, formats).bytes
        return PICO * (read * energy["byte"] + macs * energy["int8_mac" if format_ else "float_mac"])
    if op.name in ("attention", "gqa"):
        cache, macs = attention_work(op, sizes)
        return PICO * (FLOAT_BYTES * cache * energy["byte"] + macs * energy["float_mac"])
    return 0.0


def decode_joules(
    module: Module, target: Target, formats: Formats | None = None, past: int = CONTEXT
) -> float | None:
    """Of one token behind `past` others; None where the target has no figures for energy."""
    chosen = decode_function(module, past)
    if not target.energy or chosen is None:
        return None
    return sum(op_joules(op, module, target, chosen[1], formats) for op in chosen[0].ops)
