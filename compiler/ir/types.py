"""Tensor types. A dimension is an integer or a symbolic polynomial such as `past+seq`."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

DTYPES: Final = ("f32", "f16", "bf16", "i64", "i32", "i8", "u8", "bool")
FLOATS: Final = ("f32", "f16", "bf16")
BYTES: Final = {"f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i8": 1, "u8": 1, "bool": 1}

Monomial = tuple[str, ...]


@dataclass(frozen=True)
class Sym:
    """A polynomial over named sizes, kept sorted so that equal sizes are equal objects.

    `terms` maps a sorted tuple of names (the empty tuple is the constant) to its coefficient.
    """

    terms: tuple[tuple[Monomial, int], ...]

    @classmethod
    def named(cls, name: str) -> "Sym":
        """The size that goes by `name`."""
        return cls((((name,), 1),))

    def __add__(self, other: "Dim") -> "Dim":
        total = _counts(self)
        for names, n in _counts(other).items():
            total[names] += n
        return _from_counts(total)

    __radd__ = __add__

    def __mul__(self, other: "Dim") -> "Dim":
        product: Counter[Monomial] = Counter()
        for left, a in _counts(self).items():
            for right, b in _counts(other).items():
                product[tuple(sorted(left + right))] += a * b
        return _from_counts(product)

    __rmul__ = __mul__

    def __str__(self) -> str:
        return "+".join(_monomial_text(names, n) for names, n in self.terms).replace("+-", "-")


Dim = int | Sym


def _counts(dim: Dim) -> Counter[Monomial]:
    return Counter(dict(dim.terms)) if isinstance(dim, Sym) else Counter({(): dim})


def _from_counts(counts: Counter[Monomial]) -> Dim:
    # names first and the constant last: `past+seq+1`
    terms = sorted(((m, n) for m, n in counts.items() if n), key=lambda t: (not t[0], len(t[0]), t[0]))
    if not terms:
        return 0
    if len(terms) == 1 and not terms[0][0]:
        return terms[0][1]
    return Sym(tuple(terms))


def _monomial_text(names: Monomial, n: int) -> str:
    if not names:
        return str(n)
    body = "*".join(names)
    return {1: body, -1: f"-{body}"}.get(n, f"{n}*{body}")


def parse_dim(text: str) -> Dim:
    """Read `12`, `seq`, `past+seq`, `2*batch*seq-1`. Raises ValueError on anything else."""
    total: Dim = 0
    for sign, body in _signed_terms(text.replace(" ", "")):
        term: Dim = sign
        for factor in body.split("*"):
            term = term * _parse_factor(factor)
        total = total + term
    return total


def _signed_terms(text: str) -> list[tuple[int, str]]:
    pieces = re.findall(r"([+-]?)([^+-]+)", text)
    if not pieces or "".join(s + b for s, b in pieces) != text:
        raise ValueError(f"{text!r} is no dimension")
    return [(-1 if sign == "-" else 1, body) for sign, body in pieces]


def _parse_factor(text: str) -> Dim:
    if text.isdigit():
        return int(text)
    if re.fullmatch(r"[A-Za-z_]\w*", text):
        return Sym.named(text)
    raise ValueError(f"{text!r} is no dimension")


def evaluate(dim: Dim, sizes: dict[str, int]) -> int:
    """The number that `dim` stands for. Raises KeyError for a name that `sizes` lacks."""
    if isinstance(dim, int):
        return dim
    total = 0
    for names, n in dim.terms:
        for name in names:
            n *= sizes[name]
        total += n
    return total


@dataclass(frozen=True)
class TensorType:
    """Element type and shape of a value, for example `f32[batch,seq,576]`."""

    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def with_shape(self, *shape: Dim) -> "TensorType":
        """The same element type in another shape."""
        return TensorType(self.dtype, shape)

    def numel(self) -> int:
        """Number of elements. Raises TypeError when a dimension is symbolic."""
        total = 1
        for dim in self.shape:
            if not isinstance(dim, int):
                raise TypeError(f"{self} has no fixed size")
            total *= dim
        return total


def parse_type(text: str) -> TensorType:
    """Read `f32[batch,seq,576]`. Raises ValueError on anything else."""
    match = re.fullmatch(r"(\w+)\[(.*)\]", text.replace(" ", ""))
    if not match or match[1] not in DTYPES:
        raise ValueError(f"{text!r} is no tensor type")
    dims = match[2].split(",") if match[2] else []
    return TensorType(match[1], tuple(map(parse_dim, dims)))
