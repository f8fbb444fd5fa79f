"""Weights and inputs for kernels with packed weights, their calls, and how far a result is off."""

from typing import Any

import numpy as np
import torch
import tvm

from gammac.formats import (
    Format,
    IntegerFormat,
    NormalFloat,
    OffsetNormalFloat,
    Quantized,
    TrellisFormat,
    TwoFourFormat,
    keep_two,
    spread,
)
from gammac.formats.normal_float import normal_levels
from gammac.targets.tvm.kernels import Isa, Kernel, Layout, lowering, pack

EPSILON = float(np.finfo(np.float32).eps)


def random_weight(format_: Format, rows: int, columns: int, seed: int = 0) -> Quantized:
    rng = np.random.default_rng(seed)
    if isinstance(format_, TwoFourFormat):
        values = random_weight(format_.grid, rows, columns, seed)
        mask = keep_two(torch.from_numpy(rng.random((rows, columns))))
        return format_.quantized(values.codes, mask, values.scales)
    if isinstance(format_, TrellisFormat):
        found = torch.from_numpy(rng.integers(0, 1 << format_.bits, (columns, rows), dtype=np.uint8))
        scales = rng.random((rows, format_.groups(columns))) * 0.1 + 0.01
        return format_.quantized(found, torch.from_numpy(scales.astype(np.float16)))
    assert isinstance(format_, IntegerFormat | NormalFloat)
    groups = (rows, format_.groups(columns))

    def codes(shape: tuple[int, int]) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 1 << format_.bits, shape, dtype=np.uint8))

    scales = torch.from_numpy((rng.random(groups) * 0.1 + 0.01).astype(np.float16))
    if isinstance(format_, NormalFloat):
        offsets = torch.from_numpy((rng.random(groups) * 0.1 - 0.05).astype(np.float16))
        more = {"offsets": offsets} if isinstance(format_, OffsetNormalFloat) else {}
        return format_.quantized(codes((rows, columns)), {"scales": scales, **more})
    return format_.quantized(codes((rows, columns)), scales, None if format_.symmetric else codes(groups))


def quantized_inputs(x: Any, layout: Layout) -> tuple[dict[str, Any], Any]:
    """int8 activations as `quantize_activations` states them, and the numbers that they stand for."""
    tokens, columns = x.shape
    groups = -(-columns // layout.segment)
    padded = np.zeros((tokens, groups * layout.segment), np.float32)
    padded[:, :columns] = x
    parts = padded.reshape(tokens, groups, layout.segment)
    largest = np.abs(parts).max(-1)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    codes = np.rint(parts * inverse[..., None]).astype(np.int8)
    scales = largest * np.float32(1 / 127)
    flat = np.zeros((tokens, layout.padded(columns)), np.int8)
    flat[:, :columns] = codes.reshape(tokens, -1)[:, :columns]
    meant = (codes * scales[..., None].astype(np.float64)).reshape(tokens, -1)[:, :columns]
    return {"x_codes": flat, "x_scales": scales, "x_sums": codes.sum(-1, dtype=np.int32)}, meant


def inputs(tokens: int, columns: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)


def _meant_by(weight: Quantized, integer: bool) -> Any:
    """What a kernel multiplies by, f64: with int8 inputs the levels of a codebook are bytes."""
    if not integer or not isinstance(weight.format, NormalFloat):
        return weight.dequantize().double().numpy()
    levels = (normal_levels(weight.format.bits) * 127).round().double() / 127
    size = weight.format.inputs_per_scale(weight.codes.shape[1])
    scales = spread(weight.scales.double(), size, weight.codes.shape[1])
    rounded = levels[weight.codes.long()] * scales
    if isinstance(weight.format, OffsetNormalFloat):
        offsets = weight.format.offsets_of(weight.parts).double()
        rounded += spread(offsets, size, weight.codes.shape[1])
    # by at most a 254th of the scale
    assert bool(((rounded - weight.dequantize().double()).abs() <= scales / 254 * 1.001).all())
    return rounded.numpy()


def error(y: Any, x: Any, weight: Quantized, integer: bool = False) -> float:
    """The largest |y - x @ w.T| as a share of |x| @ |w|.T, all in f64."""
    w = _meant_by(weight, integer)
    return float((np.abs(y - x @ w.T) / (np.abs(x) @ np.abs(w).T + 1e-30)).max())


def build(kernel: Kernel, isa: Isa) -> Any:
    module = tvm.IRModule({kernel.name: kernel.func.with_attr("global_symbol", kernel.name)})
    with lowering():
        return tvm.compile(module, target=tvm.target.Target(isa.llvm_target()))


def call(kernel: Kernel, library: Any, arrays: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Run a kernel with arrays by name; what it writes starts as NaN or junk."""
    shapes = {o.name: tuple(tokens if s == "m" else s for s in o.shape) for o in kernel.operands}
    for o in kernel.inputs:
        assert (arrays[o.name].shape, arrays[o.name].dtype) == (shapes[o.name], np.dtype(o.dtype)), o
    out = {
        o.name: tvm.runtime.tensor(np.full(shapes[o.name], np.nan if o.dtype == "float32" else 77, o.dtype))
        for o in kernel.outputs
    }
    library[kernel.name](*(tvm.runtime.tensor(arrays[o.name]) for o in kernel.inputs), *out.values())
    return {name: tensor.numpy() for name, tensor in out.items()}


def numbered(weights: list[Quantized], isa: Isa) -> dict[str, Any]:
    """The packed arrays of several weights of one kernel."""
    return {f"{name}{i}": a for i, w in enumerate(weights) for name, a in pack(w, isa).items()}
