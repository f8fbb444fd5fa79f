"""What stored bits mean. A quantizer chooses codes; a Format says which numbers they stand for.

    w3g64          3-bit codes, one f16 scale and one 3-bit zero point for each 64 inputs of a row
    w4g32-sym      4-bit codes, one f16 scale for each 32 inputs; the zero point is the midpoint, 8
    w4channel      one scale and zero point a row

`dequantize` and the count of stored bits stand here and nowhere else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.ir import Weight
from gammac.weights import WeightStore

CHANNEL: Final = 0
SCALE_BITS: Final = 16
FALLBACK_GROUPS: Final = (256, 128, 96, 64, 32, 16)


@dataclass(frozen=True, order=True)
class Format:
    """Integer codes of `bits` bits with a scale for each `group` inputs of a row (0: the whole row)."""

    bits: int
    group: int
    symmetric: bool = False

    @property
    def name(self) -> str:
        """The spelling that `parse_format` reads."""
        group = f"g{self.group}" if self.group else "channel"
        return f"w{self.bits}{group}{'-sym' if self.symmetric else ''}"

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric format."""
        return 1 << (self.bits - 1)

    def inputs_per_scale(self, in_features: int) -> int:
        """The group size in inputs, for a weight with `in_features` columns."""
        return self.group or in_features

    def groups(self, in_features: int) -> int:
        """Scales in a row."""
        return -(-in_features // self.inputs_per_scale(in_features))

    def fit(self, in_features: int) -> "Format":
        """This format, or the next smaller group size that divides the row.

        The fallback: the largest of 256, 128, 96, 64, 32, 16 that is below the wished group and
        divides `in_features`; if none does, one scale for the whole row.
        """
        if not self.group or in_features % self.group == 0:
            return self
        fits = [g for g in FALLBACK_GROUPS if g < self.group and in_features % g == 0]
        return replace(self, group=fits[0] if fits else CHANNEL)

    def payload_bits(self, rows: int, columns: int) -> int:
        """Bits of the codes alone."""
        return self.bits * rows * columns

    def storage_bits(self, rows: int, columns: int) -> int:
        """Everything stored for a weight [rows, columns]: codes, f16 scales, packed zero points."""
        per_group = SCALE_BITS + (0 if self.symmetric else self.bits)
        return self.payload_bits(rows, columns) + per_group * rows * self.groups(columns)


def parse_format(text: str) -> Format:
    """Read a format's name. Raises CompileError that shows the spelling."""
    match = re.fullmatch(r"w([1-8])(?:g(\d+)|channel)(-sym)?", text.strip())
    if not match or match[2] == "0":
        raise CompileError(
            f"{text!r} is no weight format", hint="write w4g64, w3g128-sym or w8channel (bits 1 to 8)"
        )
    return Format(int(match[1]), int(match[2] or CHANNEL), bool(match[3]))


def parse_formats(text: str) -> tuple[Format, ...]:
    """Read a list of formats, joined by commas or, inside a pass's options, by `+`."""
    return tuple(parse_format(part) for part in text.replace("+", ",").split(",") if part.strip())


@dataclass(frozen=True)
class Quantized:
    """A weight in a format: codes u8 [rows, columns], scales f16 [rows, groups], zeros u8 [rows, groups].

    A symmetric format has no zeros.
    """

    format: Format
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dequantize(self) -> Tensor:
        """scale * (code - zero), f32 [rows, columns]."""
        columns = self.codes.shape[1]
        size = self.format.inputs_per_scale(columns)
        zeros = self.format.midpoint if self.zeros is None else self.spread(self.zeros.float(), size, columns)
        return (self.codes.float() - zeros) * self.spread(self.scales.float(), size, columns)

    @staticmethod
    def spread(values: Tensor, size: int, columns: int) -> Tensor:
        """Per-group values [rows, groups] to [rows, columns]."""
        return values.repeat_interleave(size, dim=1)[:, :columns]

    def arrays(self) -> dict[str, Tensor]:
        """What the WeightStore keeps."""
        zeros = {} if self.zeros is None else {"zeros": self.zeros}
        return {"codes": self.codes, "scales": self.scales, **zeros}

    @classmethod
    def from_arrays(cls, format_: Format, arrays: Mapping[str, Tensor]) -> "Quantized":
        """The inverse of `arrays`."""
        return cls(format_, arrays["codes"], arrays["scales"], arrays.get("zeros"))

    def rows(self, start: int, end: int) -> "Quantized":
        """Some rows of it, still in the same format."""
        zeros = None if self.zeros is None else self.zeros[start:end]
        return Quantized(self.format, self.codes[start:end], self.scales[start:end], zeros)


def concat_rows(parts: list[Quantized]) -> Quantized:
    """Weights of one format and width, one below the other."""
    first = parts[0]
    assert all(p.format == first.format for p in parts), "rows of different formats don't stack"
    zeros = [p.zeros for p in parts if p.zeros is not None]
    return Quantized(
        first.format,
        torch.cat([p.codes for p in parts]),
        torch.cat([p.scales for p in parts]),
        torch.cat(zeros) if zeros else None,
    )


def stored_format(weight: Weight) -> Format | None:
    """The format of a weight's bytes, None while they are plain floats."""
    stored = weight.attrs.get("stored")
    return parse_format(stored) if isinstance(stored, str) else None


def load_quantized(weight: Weight, store: WeightStore) -> Quantized:
    """The codes of a quantized weight."""
    format_ = stored_format(weight)
    assert format_ is not None, f"{weight.name} is not quantized"
    return Quantized.from_arrays(format_, store.get(weight.digest))


def load_float(weight: Weight, store: WeightStore) -> Tensor:
    """A weight as floats, dequantized if need be."""
    if stored_format(weight) is None:
        return store.tensor(weight.digest)
    return load_quantized(weight, store).dequantize()
