"""Bits of a quantized module by its formats' formulas, checked against the arrays that are stored."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import Format, stored_format
from gammac.ir import Module, Weight
from gammac.targets.cost import float_bytes, module_cost
from gammac.targets.target import Target
from gammac.weights import WeightStore

TOLERANCE: Final = 0.01


@dataclass(frozen=True)
class Storage:
    """`payload_bits` and `true_bits`: means over the block linears; the rest is of all weights.

    `bytes` are those of the formulas, and of floats that stay f32; `packed_bytes` those of the arrays, each
    value in the fewest bits that hold all of its kind.
    """

    payload_bits: float
    true_bits: float
    whole_model_bits: float
    bytes: int
    packed_bytes: int


def storage_of(module: Module, store: WeightStore, target: Target, parameters: int) -> Storage:
    """What a module behind `quantize` takes. `parameters`: of the model, which whole-model bits are over.

    Payload and true bits are those of a compile's manifest. Raises CompileError for a format whose arrays
    differ from its formula by more than 1 %.
    """
    formulas: dict[str, int] = defaultdict(int)
    arrays: dict[str, list[tuple[Format, dict[str, Tensor]]]] = defaultdict(list)
    floats = 0
    for weight in module.weights.values():
        format_ = stored_format(weight)
        if format_ is None:
            floats += float_bytes(weight.type)
            continue
        formulas[format_.name] += format_.storage_bits(*_shape(weight))
        arrays[format_.name].append((format_, store.get(weight.digest)))
    packed = {name: sum(_packed_bits(stored)) for name, stored in arrays.items()}
    for name, bits in formulas.items():
        check(name, bits, packed[name])
    cost, total = module_cost(module, target), floats + _bytes(sum(formulas.values()))
    return Storage(
        round(cost.payload_bits, 6),
        round(cost.true_bits, 6),
        round(8 * total / parameters, 6),
        total,
        floats + _bytes(sum(packed.values())),
    )


def check(name: str, formula: int, packed: int) -> None:
    """Raise CompileError where a format's bits and those of its arrays are more than 1 % apart."""
    if abs(packed - formula) > TOLERANCE * formula:
        raise CompileError(
            f"{name} counts {formula} bits, its arrays take {packed}: true bits would be wrong",
            hint="storage_bits of the format must count every array",
        )


def _packed_bits(stored: list[tuple[Format, dict[str, Tensor]]]) -> list[int]:
    """Bits of each weight of one format. A format may know better, by a method `packed_bits(arrays)`."""
    own: Callable[[dict[str, Tensor]], int] | None = getattr(stored[0][0], "packed_bits", None)
    if own is not None:
        return [own(arrays) for _, arrays in stored]
    widths: dict[str, int] = defaultdict(int)
    for _, arrays in stored:
        for name, values in arrays.items():
            widths[name] = max(widths[name], _width(values))
    return [sum(widths[name] * values.numel() for name, values in arrays.items()) for _, arrays in stored]


def _width(values: Tensor) -> int:
    """The bits that each value needs: floats theirs, integers as many as the widest of them."""
    if values.dtype == torch.bool:
        return 1
    if values.dtype.is_floating_point or not values.numel():
        return 8 * values.element_size()
    low, high = int(values.min()), int(values.max())
    return max(1, high.bit_length()) if low >= 0 else 1 + max(high.bit_length(), (-low - 1).bit_length())


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _shape(weight: Weight) -> tuple[int, int]:
    rows, columns = weight.type.shape
    assert isinstance(rows, int) and isinstance(columns, int), "weights have fixed shapes"
    return rows, columns


def float_storage(module: Module, parameters: int) -> Storage:
    """The same of a model that nobody has quantized, its floats in 32 bits."""
    total = sum(float_bytes(weight.type) for weight in module.weights.values())
    return Storage(32.0, 32.0, round(8 * total / parameters, 6), total, total)
