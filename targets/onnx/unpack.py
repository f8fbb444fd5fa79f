"""Codes of any width out of packed bytes, in standard operators."""

import numpy as np
import onnx_ir as ir

from gammac.targets.onnx.graph import GraphWriter


def unpack(
    g: GraphWriter, packed: ir.Value, bits: int, shape: list[int], to: ir.DataType = ir.DataType.FLOAT
) -> ir.Value:
    """Little-endian octets of `bits` bytes, eight codes each, in a shape and an element type."""
    starts = np.arange(8) * bits
    low, shift = starts // 8, (starts % 8).astype(np.uint32)
    octets = g.op("Reshape", packed, g.const([0, -1, bits]))
    wide = g.op("Cast", octets, to=ir.DataType.UINT32)
    first = g.op("Gather", wide, g.const(low), axis=2)
    second = g.op("Gather", wide, g.const(np.minimum(low + 1, bits - 1)), axis=2)
    word = g.op("BitwiseOr", first, g.op("BitShift", second, g.const(8, "u32"), direction="LEFT"))
    kept = g.op(
        "BitwiseAnd",
        g.op("BitShift", word, g.const(shift, "u32"), direction="RIGHT"),
        g.const(2**bits - 1, "u32"),
    )
    return g.op("Reshape", g.op("Cast", kept, to=to), g.const(shape))
