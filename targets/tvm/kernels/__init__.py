"""Linear layers with packed weights of 1 to 8 bits, generated in TIR from a format."""

from gammac.targets.tvm.kernels.activations import quantize_activations, rms_norm_quantize
from gammac.targets.tvm.kernels.fused import gated_linear, stacked_linear
from gammac.targets.tvm.kernels.isa import ISAS, Isa, isa_of
from gammac.targets.tvm.kernels.layout import Layout, Packable, activation_group, has_layout
from gammac.targets.tvm.kernels.linear import decode_linear, prefill_linear
from gammac.targets.tvm.kernels.low_rank import Branch, low_rank
from gammac.targets.tvm.kernels.lowering import lowering
from gammac.targets.tvm.kernels.operands import Kernel, Operand
from gammac.targets.tvm.kernels.packed import layout_of, pack, packed_bytes

__all__ = [
    "ISAS",
    "Branch",
    "Isa",
    "Kernel",
    "Layout",
    "Operand",
    "Packable",
    "activation_group",
    "decode_linear",
    "gated_linear",
    "has_layout",
    "isa_of",
    "layout_of",
    "low_rank",
    "lowering",
    "pack",
    "packed_bytes",
    "prefill_linear",
    "quantize_activations",
    "rms_norm_quantize",
    "stacked_linear",
]
