"""Lowering of `linear` and `embedding`: packed weights, shared where a table is also the head."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from gammac.formats import (
    DualBinaryFormat,
    IntegerFormat,
    Quantized,
    load_float,
    load_quantized,
    stored_format,
)
from gammac.formats.dual_binary import PLANES
from gammac.ir import Op, Operand, Value, Weight, WeightRef
from gammac.targets.onnx.any_bits import DOMAIN, OP, OP_ZEROS, groups_of, pack
from gammac.targets.onnx.graph import MICROSOFT, Array, GraphWriter
from gammac.targets.onnx.integers import integer_product, multiplies_integers
from gammac.targets.onnx.kernels import ANY_BITS, demand_kernel, no_kernel, pack_nbits
from gammac.targets.onnx.names import TRANSPOSED
from gammac.targets.onnx.unpack import unpack

# activations in 8 bits by block: the only level at which all of 2, 4 and 8 bits have packed kernels
ACCURACY_LEVEL: Final = 4
STRIP: Final = 4
FLOAT: Final = ir.DataType.FLOAT


def lower_linear(g: GraphWriter, op: Op) -> Sequence[ir.Value]:
    """MatMulNBits, MatMulAnyBits or MatMulInteger for codes, MatMul for floats; then the bias."""
    x, ref, *bias = op.operands
    if not isinstance(ref, WeightRef):
        y = g.op("MatMul", g.operand(x), g.op("Transpose", g.operand(ref), perm=[1, 0]))
    else:
        y = _product(g, x, ref, g.module.weights[ref.name])
    return [g.op("Add", y, g.operand(bias[0])) if bias else y]


def _product(g: GraphWriter, x: Operand, ref: WeightRef, weight: Weight) -> ir.Value:
    if isinstance(stored_format(weight), DualBinaryFormat):
        return _dual_product(g, g.operand(x), weight)
    format_ = _stored_grid(weight)
    if format_ is None:
        return _float_product(g, g.operand(x), ref)
    if isinstance(x, Value) and x in g.rounded and multiplies_integers(format_):
        return integer_product(g, g.rounded[x], weight, format_)
    return _packed_product(g, g.operand(x), weight, format_)


def _stored_grid(weight: Weight) -> IntegerFormat | None:
    """The format of a weight's codes, None for floats. Raises CompileError for codes that are no grid's."""
    format_ = stored_format(weight)
    if format_ is None or isinstance(format_, IntegerFormat):
        return format_
    raise no_kernel(weight, format_)


def _kernel(g: GraphWriter, weight: Weight, format_: IntegerFormat) -> str:
    return demand_kernel(weight, format_, g.target, compiler=g.compiler)


def _float_product(g: GraphWriter, x: ir.Value, ref: WeightRef) -> ir.Value:
    if g.is_stored(ref.name):  # a table that was looked up in before: its bytes are stored once
        return g.op("FusedMatMul", x, g.float_weight(ref), domain=MICROSOFT, transB=1)
    name = f"{ref.name}{TRANSPOSED}"
    array = None if g.is_stored(name) else load_float(g.module.weights[ref.name], g.store).numpy().T
    return g.op("MatMul", x, g.stored(name, array))


def _packed_product(g: GraphWriter, x: ir.Value, weight: Weight, format_: IntegerFormat) -> ir.Value:
    rows, columns = weight.type.shape
    operands = packed_weight(g, weight, format_)
    if _kernel(g, weight, format_) == ANY_BITS:
        return _any_bits_product(g, x, weight, format_, operands)
    return g.op(
        "MatMulNBits", x, operands[0], in_f32(g, operands[1]), *operands[2:], domain=MICROSOFT,
        N=rows, K=columns, bits=format_.bits, block_size=format_.group,
        accuracy_level=None if g.on_gpu else ACCURACY_LEVEL,
    )  # fmt: skip


def _any_bits_product(
    g: GraphWriter, x: ir.Value, weight: Weight, format_: IntegerFormat, operands: Sequence[ir.Value]
) -> ir.Value:
    rows, columns = weight.type.shape
    assert isinstance(columns, int)
    kind = OP if format_.symmetric else OP_ZEROS
    g.library_ops.add(kind)
    group = format_.inputs_per_scale(columns)
    return g.op(kind, x, *operands, domain=DOMAIN, N=rows, K=columns, bits=format_.bits, group=group)


def _dual_product(g: GraphWriter, x: ir.Value, weight: Weight) -> ir.Value:
    """The sum of the products with both planes, each of them binary codes."""
    q = load_quantized(weight, g.store)
    format_ = q.format
    assert isinstance(format_, DualBinaryFormat)
    demand_kernel(weight, format_, g.target, compiler=g.compiler)
    products = []
    for plane, binary in zip(PLANES, format_.planes(q.parts), strict=True):
        names = [f"{weight.name}.{plane}.{part}" for part in ("codes", "scales")]
        arrays = (None, None) if g.is_stored(names[0]) else _any_bits_arrays(binary)[:2]
        operands = [g.stored(name, array) for name, array in zip(names, arrays, strict=True)]
        products.append(_any_bits_product(g, x, weight, format_.plane, operands))
    return g.op("Add", *products)


def _any_bits_arrays(q: Quantized) -> tuple[Array, Array, Array | None]:
    """Codes, scales and zeros in MatMulAnyBits' layout."""
    zeros = None if q.zeros is None else q.zeros.numpy()
    group = q.format.inputs_per_scale(q.codes.shape[1])
    packed = pack(q.codes.numpy(), q.scales.numpy(), zeros, int(q.format.bits), group)
    return packed.codes, packed.scales, packed.zeros


def packed_weight(g: GraphWriter, weight: Weight, format_: IntegerFormat) -> list[ir.Value]:
    """Codes, f16 scales and, where the format has them, zeros: written once, as the kernel wants them."""
    names = [f"{weight.name}.{part}" for part in ("codes", "scales", "zeros")]
    names = names[: 2 if format_.symmetric else 3]
    if g.is_stored(names[0]):
        return [g.stored(name) for name in names]
    q = load_quantized(weight, g.store)
    if _kernel(g, weight, format_) == ANY_BITS:
        arrays = _any_bits_arrays(q)
    else:
        codes, zeros = pack_nbits(q)
        arrays = codes, q.scales.numpy().astype(np.float16), zeros
    return [g.stored(name, array) for name, array in zip(names, arrays, strict=False)]


def in_f32(g: GraphWriter, scales: ir.Value) -> ir.Value:
    """f16 scales as f32: ONNX Runtime folds this when it loads the model."""
    return g.shared(f"{scales.name} as f32", "Cast", scales, to=FLOAT)


# ---- embedding ----------------------------------------------------------------------------------


def lower_embedding(g: GraphWriter, op: Op) -> Sequence[ir.Value]:
    """Gather of float rows, or of packed rows that are spread out after they are gathered."""
    ids, ref = g.operand(op.operands[0]), op.operands[1]
    assert isinstance(ref, WeightRef)
    weight = g.module.weights[ref.name]
    format_ = _stored_grid(weight)
    if format_ is None:
        return [g.op("Gather", g.float_weight(ref), ids, axis=0)]
    if _kernel(g, weight, format_) == ANY_BITS:
        return [_gather_any_bits(g, ids, weight, format_)]
    codes, scales, *zeros = packed_weight(g, weight, format_)
    columns = weight.type.shape[1]
    assert isinstance(columns, int)
    flat = g.shared(f"{weight.name} by row", "Reshape", codes, g.const([0, columns * format_.bits // 8]))
    attrs = {"bits": format_.bits, "block_size": format_.group, "gather_axis": 0, "quantize_axis": 1}
    return [g.op("GatherBlockQuantized", flat, ids, in_f32(g, scales), *zeros, domain=MICROSOFT, **attrs)]


def _gather_any_bits(g: GraphWriter, ids: ir.Value, weight: Weight, format_: IntegerFormat) -> ir.Value:
    """Rows out of MatMulAnyBits' layout (custom_op/any_bits.h), four rows a strip, in standard operators."""
    columns, bits = weight.type.shape[1], format_.bits
    assert isinstance(columns, int)
    group, groups = format_.inputs_per_scale(columns), groups_of(columns, format_.inputs_per_scale(columns))
    codes, scales, *zeros = packed_weight(g, weight, format_)
    flat = g.op("Reshape", ids, g.const([-1]))
    strip, lane = g.op("Div", flat, g.const(STRIP)), g.op("Mod", flat, g.const(STRIP))
    lane = g.op("Unsqueeze", lane, g.const([1]))

    def of_lane(packed: ir.Value, perm: list[int]) -> ir.Value:
        """[n, ..., 4, ...] without the rows of the strip that were not asked for."""
        return g.op("GatherND", g.op("Transpose", packed, perm=perm), lane, batch_dims=1)

    code = unpack(g, of_lane(g.op("Gather", codes, strip, axis=0), [0, 2, 1, 3]), bits, [0, -1])
    code = g.op("Slice", code, g.const([0]), g.const([columns]), g.const([1])) if columns % 64 else code
    scale = g.op("Cast", of_lane(g.op("Gather", scales, strip, axis=0), [0, 2, 1]), to=FLOAT)
    if not zeros:
        zero = g.const(float(format_.midpoint), "f32")
    else:
        pairs = unpack(g, g.op("Gather", zeros[0], strip, axis=0), bits, [0, -1, STRIP])
        even = of_lane(pairs, [0, 2, 1])
        zero = g.op("Slice", even, g.const([0]), g.const([groups]), g.const([1])) if groups % 2 else even
        zero = g.op("Unsqueeze", zero, g.const([2]))
    grouped = g.op("Reshape", code, g.const([0, groups, group]))
    values = g.op("Mul", g.op("Sub", grouped, zero), g.op("Unsqueeze", scale, g.const([2])))
    shape = g.op("Concat", g.op("Shape", ids), g.const([columns]), axis=0)
    return g.op("Reshape", values, shape)
