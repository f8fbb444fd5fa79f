"""Rounded activations times weights with one scale a row, as integers: MatMulInteger, exact int32 sums.

    codes = u8(clip(round(x / step))) + 128               a step for each token, or one
    y = f32(MatMulInteger(codes, weights, 128, midpoint)) * step * scales

The kernels of packed weights would round once more, to 8 bits by block, and where activations have fewer
bits every such tremor moves some of the next codes by a whole step. Weights are stored in as many bits as
their codes have; ONNX Runtime spreads them out to bytes when it loads the model. Both operands are unsigned,
because a product of mixed signs saturates on processors without VNNI.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from gammac.formats import IntegerFormat, load_quantized
from gammac.ir import Op, Weight
from gammac.ir.interpret import SMALLEST_MAGNITUDE
from gammac.targets.onnx.any_bits import Bytes, to_octets
from gammac.targets.onnx.graph import GraphWriter, Rounded
from gammac.targets.onnx.unpack import unpack

FLOAT: Final = ir.DataType.FLOAT
UINT8: Final = ir.DataType.UINT8
MIDDLE: Final = 128


def lower_fake_quantize(g: GraphWriter, op: Op) -> list[ir.Value]:
    """Codes as floats; GraphWriter.operand multiplies them by their step for whoever reads the values."""
    x, top = g.operand(op.operands[0]), float(2 ** (int(str(op.attrs["bits"])) - 1) - 1)
    if "scale" in op.attrs:
        step = g.const(float(str(op.attrs["scale"])), "f32")
    else:
        largest = g.op("ReduceMax", g.op("Abs", x), g.const([-1]), keepdims=1)
        step = g.op("Div", g.op("Max", largest, g.const(SMALLEST_MAGNITUDE, "f32")), g.const(top, "f32"))
    codes = g.op("Clip", g.op("Round", g.op("Div", x, step)), g.const(-top, "f32"), g.const(top, "f32"))
    g.rounded[op.result] = Rounded(codes, step)
    return [codes]


def multiplies_integers(format_: IntegerFormat) -> bool:
    """Whether a weight's product needs one scale a row and nothing else."""
    return format_.symmetric and not format_.group


def integer_product(g: GraphWriter, x: Rounded, weight: Weight, format_: IntegerFormat) -> ir.Value:
    """x [..., columns] times a weight [rows, columns]."""
    shifted = g.shared(f"{x.codes.name} + {MIDDLE}", "Add", x.codes, g.const(float(MIDDLE), "f32"))
    codes = g.shared(f"{x.codes.name} as u8", "Cast", shifted, to=UINT8)
    weights, scales = _stored(g, weight, format_)
    zeros = g.const(MIDDLE, "u8"), g.const(format_.midpoint, "u8")
    sums = g.op("Cast", g.op("MatMulInteger", codes, weights, *zeros), to=FLOAT)
    return g.op("Mul", g.op("Mul", sums, x.step), scales)


def _stored(g: GraphWriter, weight: Weight, format_: IntegerFormat) -> tuple[ir.Value, ir.Value]:
    """Codes u8 [columns, rows], unpacked when the model is loaded, and scales f32 [rows]."""
    names = f"{weight.name}.codes", f"{weight.name}.scales"
    rows, bits = weight.type.shape[0], format_.bits
    if not g.is_stored(names[0]):
        q = load_quantized(weight, g.store)
        g.stored(names[0], _packed(q.codes.numpy().T, bits))
        g.stored(names[1], q.scales.numpy().reshape(-1))
    codes = g.stored(names[0])
    if bits < 8:
        assert isinstance(rows, int)
        codes = unpack(g, codes, bits, [0, -1], UINT8)
        if rows % 8:
            codes = g.op("Slice", codes, g.const([0]), g.const([rows]), g.const([1]))
    scales = g.shared(f"{names[1]} as f32", "Cast", g.stored(names[1]), to=FLOAT)
    return codes, scales


def _packed(codes: Bytes, bits: int) -> Bytes:
    """[columns, rows] to [columns, ceil(rows / 8) * bits] bytes."""
    if bits == 8:
        return codes
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
    return to_octets(padded.reshape(len(codes), -1, 8), bits).reshape(len(codes), -1)
