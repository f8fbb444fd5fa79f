"""Weights of a module, as floats or as codes."""

from torch import Tensor

from gammac.formats.base import Format, Quantized
from gammac.formats.names import parse_format
from gammac.ir import Weight
from gammac.weights import WeightStore


def stored_format(weight: Weight) -> Format | None:
    """The format of a weight's bytes, None while they are plain floats."""
    stored = weight.attrs.get("stored")
    return parse_format(stored) if isinstance(stored, str) else None


def load_quantized(weight: Weight, store: WeightStore) -> Quantized:
    """The codes of a quantized weight. Raises CompileError for codes that its format does not have."""
    format_ = stored_format(weight)
    assert format_ is not None, f"{weight.name} is not quantized"
    parts = store.get(weight.digest)
    format_.check(parts)
    return Quantized(format_, parts)


def candidates_of(weight: Weight) -> dict[str, str]:
    """Format name → digest of the weight in that format; none before it was quantized."""
    candidates = weight.attrs.get("candidates", {})
    assert isinstance(candidates, dict)
    return {str(name): str(digest) for name, digest in candidates.items()}


def load_candidate(weight: Weight, name: str, store: WeightStore) -> Quantized:
    """The weight in one of the formats that it was quantized in."""
    return Quantized(parse_format(name), store.get(candidates_of(weight)[name]))


def load_chosen(weight: Weight, store: WeightStore) -> Quantized:
    """The weight in the format that it was given."""
    return load_candidate(weight, str(weight.attrs["format"]), store)


def load_float(weight: Weight, store: WeightStore) -> Tensor:
    """A weight as floats, dequantized if need be."""
    if stored_format(weight) is None:
        return store.tensor(weight.digest)
    return load_quantized(weight, store).dequantize()
