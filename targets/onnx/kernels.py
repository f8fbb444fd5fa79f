"""Which operator of ONNX Runtime multiplies by a weight, and how the weight is packed for it.

    bits 2          groups 64, 128                 com.microsoft::MatMulNBits
    bits 4, 8       groups 16 to 256, powers of 2  com.microsoft::MatMulNBits
    any other       groups in steps of 32, or the  gammac::MatMulAnyBits
                    whole row
    dual binary     likewise                       the sum of two gammac::MatMulAnyBits of 1 bit

Outside this table MatMulNBits answers, too, by expanding the whole weight at every call. (It has a kernel
for 2 bits in groups of 32, but one that is slower than 4 bits.) So does MatMulBnb4, which knows NF4: a
weight [1536, 576] times one token took 482 us, in 4-bit integers 24 us (ONNX Runtime 1.32, one
thread). A target may put MatMulAnyBits first for any width.
"""

from typing import Final

import numpy as np

from gammac.diagnostics import CompileError
from gammac.formats import DualBinaryFormat, Format, IntegerFormat, Quantized
from gammac.ir import Weight
from gammac.targets.onnx.any_bits import Bytes
from gammac.targets.target import Target

NBITS: Final = "MatMulNBits"
ANY_BITS: Final = "MatMulAnyBits"
NBITS_GROUPS: Final = {2: (64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}
ANY_BITS_STEP: Final = 32


def kernel_for(format_: Format, in_features: int) -> str | None:
    """The operator that is fast for a weight with rows of `in_features`; None if none is."""
    if isinstance(format_, DualBinaryFormat):
        format_ = format_.plane
    if not isinstance(format_, IntegerFormat):
        return None
    if format_.group in NBITS_GROUPS.get(format_.bits, ()):
        return NBITS
    return (
        ANY_BITS if format_.inputs_per_scale(in_features) % ANY_BITS_STEP == 0 or not format_.group else None
    )


def demand_kernel(weight: Weight, format_: Format, target: Target | None, *, compiler: bool) -> str:
    """The operator for a weight: the target's, if it says. Raises CompileError where there is none."""
    columns = weight.type.shape[1]
    assert isinstance(columns, int)
    kernel = kernel_for(format_, columns)
    role = str(weight.attrs.get("role"))
    row = target.kernel_for(format_, role, columns, compiler=compiler) if target else None
    if row is not None and row.op == ANY_BITS:
        kernel = kernel and ANY_BITS
    if kernel is None:
        raise no_kernel(weight, format_)
    return kernel


def no_kernel(weight: Weight, format_: Format) -> CompileError:
    """The error for a format that would run only as floats."""
    return CompileError(
        f"ONNX Runtime has no fast kernel for {format_.name}",
        loc=weight.name.removesuffix(".weight"),
        hint="groups of 32, 64 or 128 inputs work for integers of 1 to 8 bits and for fdb2, "
        "16 and 256 for 4 and 8 bits",
    )


def _join_bits(values: Bytes, bits: int) -> Bytes:
    """[..., n] values below 2**bits to [..., ceil(n * bits / 8)] bytes, low bits first; bits divides 8."""
    per_byte = 8 // bits
    missing = -values.shape[-1] % per_byte
    if missing:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], missing), np.uint8)], axis=-1)
    joined = np.zeros((*values.shape[:-1], values.shape[-1] // per_byte), np.uint8)
    for i in range(per_byte):
        joined |= values[..., i::per_byte] << np.uint8(i * bits)
    return joined


def pack_nbits(weight: Quantized) -> tuple[Bytes, Bytes | None]:
    """Codes [rows, groups, group * bits / 8] and zeros [rows, ceil(groups * bits / 8)] for MatMulNBits."""
    bits, group = int(weight.format.bits), weight.format.group
    codes: Bytes = weight.codes.numpy()
    missing = -codes.shape[1] % group
    if missing:  # the product skips what is behind the row's end
        codes = np.pad(codes, ((0, 0), (0, missing)))
    blocks = _join_bits(codes, bits).reshape(codes.shape[0], -1, group * bits // 8)
    return blocks, None if weight.zeros is None else _join_bits(weight.zeros.numpy(), bits)
