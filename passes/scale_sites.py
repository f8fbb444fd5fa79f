"""Where a scale for each channel can be moved from what makes a value into the linears that read it.

    %1 = rms_norm %0, @norm {eps = 1e-05}        @norm divided by s
    %2 = linear %1, @q                           each column of @q times its s
    %3 = linear %1, @k                           and @k alike: every reader takes part, or the site is none

A value is made by a norm, or row by row by a linear whose results reach it through ops that let a positive
factor pass: a slice, relu, the product with a gate, attention's sum over values where each head has values of
its own. The function is kept; AWQ and SmoothQuant differ in how they choose s.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.ir import Function, Module, Op, Operand, Value, Weight, WeightRef
from gammac.passes.fold_norms import mentions_of
from gammac.pipeline import Context

NORMS: Final = ("rms_norm", "layer_norm")
SWAP_HEADS: Final = (0, 2, 1, 3)


@dataclass(frozen=True, eq=False)
class Site:
    """A value, the linears that read it, and the norm or linear that makes it.

    `start` and `end` are the source's rows that the value's channels come from.
    """

    value: Value
    linears: tuple[Op, ...]
    source: Op
    start: int
    end: int

    @property
    def channels(self) -> int:
        """Entries of a scale."""
        return self.end - self.start

    def weights(self) -> list[str]:
        """Names of the weights whose columns are scaled."""
        return [op.operands[1].name for op in self.linears if isinstance(op.operands[1], WeightRef)]


@dataclass(frozen=True)
class _Source:
    op: Op
    start: int
    end: int


def find_sites(module: Module, name: str) -> list[Site]:
    """The sites of `@forward`, in order. Raises CompileError, naming the pass, for a module with a cache."""
    if set(module.functions) != {"forward"}:
        raise CompileError(
            f"{name} works on the captured function alone", hint="run it before insert_kv_cache"
        )
    return list(_Finder(module).sites())


@dataclass
class _Finder:
    module: Module
    function: Function = field(init=False)

    def __post_init__(self) -> None:
        self.function = self.module.functions["forward"]
        self.producers, self.users = self.function.producers(), self.function.users()
        self.mentions = mentions_of(self.module)

    def sites(self) -> Iterator[Site]:
        for value, readers in self.users.items():
            if value in self.function.returns or not all(self._is_scalable(op, value) for op in readers):
                continue
            source = self._source(value)
            if source is not None:
                yield Site(value, tuple(readers), source.op, source.start, source.end)

    def _is_scalable(self, op: Op, value: Value) -> bool:
        """A linear of a block, with a weight of its own that is not yet quantized."""
        ref = op.weight()
        if op.name != "linear" or op.operands[0] is not value or ref is None:
            return False
        attrs = self.module.weights[ref.name].attrs
        return len(self.mentions[ref.name]) == 1 and attrs.get("role") == "block" and "stored" not in attrs

    def _source(self, value: Operand) -> _Source | None:
        """What makes a value, if nobody else reads it on the way."""
        op = self.producers.get(value) if isinstance(value, Value) else None
        if op is None:
            return None
        match op.name:
            case "rms_norm" | "layer_norm":
                return self._whole(op)
            case "relu":
                return self._through(op.operands[0])
            case "mul":
                found = [self._through(o) for o in op.operands if o.type == op.result.type]
                return next((s for s in found if s is not None), None)
            case "reshape":
                values = self._values_of_attention(op)
                return self._through(values) if values is not None else None
            case "linear":
                return self._whole(op)
        return None

    def _through(self, value: Operand) -> _Source | None:
        """The linear behind a value that one op alone reads."""
        if not isinstance(value, Value) or len(self.users[value]) != 1:
            return None
        op = self.producers.get(value)
        if op is not None and op.name == "slice":
            return self._slice(op)
        return self._source(value) if op is not None and op.name not in NORMS else None

    def _whole(self, op: Op) -> _Source | None:
        refs = [o for o in op.operands[1:] if isinstance(o, WeightRef)]
        owned = len(refs) == len(op.operands) - 1 and all(len(self.mentions[r.name]) == 1 for r in refs)
        channels = op.result.type.shape[-1]
        if not owned or not isinstance(channels, int) or any(self._is_stored(r) for r in refs):
            return None
        return _Source(op, 0, channels)

    def _is_stored(self, ref: WeightRef) -> bool:
        return "stored" in self.module.weights[ref.name].attrs

    def _slice(self, op: Op) -> _Source | None:
        """Some rows of a linear that slices alone read, each its own."""
        whole = op.operands[0]
        inner = self.producers.get(whole) if isinstance(whole, Value) else None
        last = whole.type.rank - 1
        if inner is None or inner.name != "linear" or op.attrs["dim"] != last or self._whole(inner) is None:
            return None
        assert isinstance(whole, Value)
        start, end = _bounds(op)
        others = [user for user in self.users[whole] if user is not op]
        apart = all(
            o.name == "slice" and o.attrs["dim"] == last and (_bounds(o)[1] <= start or end <= _bounds(o)[0])
            for o in others
        )
        return _Source(inner, start, end) if apart and whole not in self.function.returns else None

    def _values_of_attention(self, reshape: Op) -> Operand | None:
        """The value [batch, seq, heads·size] whose heads attention sums up; None where heads share them."""
        out = self._behind(reshape, "transpose")
        attention = self._behind(out, "attention") if out is not None else None
        if out is None or attention is None or out.attrs["perm"] != SWAP_HEADS:
            return None
        inner = self._behind(attention, "transpose", 2)
        rows = self._behind(inner, "reshape") if inner is not None else None
        shared = attention.operands[2].type.shape[1] != attention.result.type.shape[1]
        if rows is None or inner is None or inner.attrs["perm"] != SWAP_HEADS or shared:
            return None
        same = rows.operands[0].type == reshape.result.type
        return rows.operands[0] if same else None

    def _behind(self, op: Op, name: str, operand: int = 0) -> Op | None:
        """The op that makes an operand, if it goes by that name and nobody else reads it."""
        value = op.operands[operand]
        found = self.producers.get(value) if isinstance(value, Value) else None
        alone = isinstance(value, Value) and len(self.users[value]) == 1
        return found if found is not None and found.name == name and alone else None


def _bounds(op: Op) -> tuple[int, int]:
    start, end = op.attrs["start"], op.attrs["end"]
    assert isinstance(start, int) and isinstance(end, int)
    return start, end


# ---- folding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Factors:
    """What a weight's rows and columns are multiplied by, f64."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def none(cls, weight: Weight) -> "_Factors":
        rows, *columns = (int(str(size)) for size in weight.type.shape)
        return cls(torch.ones(rows).double(), torch.ones(columns).double())

    def of(self, tensor: Tensor) -> Tensor:
        if tensor.ndim == 1:
            return (tensor.double() * self.rows).float()
        return (tensor.double() * self.rows[:, None] * self.columns).float()


def fold_scales(module: Module, scales: Mapping[Site, Tensor], ctx: Context) -> Module:
    """The module with every site's readers multiplied, and its source divided, by scales f32 [channels]."""
    factors: dict[str, _Factors] = {}

    def of(operand: Operand) -> _Factors:
        assert isinstance(operand, WeightRef)
        return factors.setdefault(operand.name, _Factors.none(module.weights[operand.name]))

    for site, scale in scales.items():
        for op in site.linears:
            of(op.operands[1]).columns.mul_(scale.double())
        for operand in site.source.operands[1:]:
            of(operand).rows[site.start : site.end].div_(scale.double())
    changed = []
    for name, factor in factors.items():
        weight = module.weights[name]
        tensor = factor.of(ctx.store.tensor(weight.digest))
        changed.append(Weight(name, weight.type, ctx.store.put({"data": tensor}), weight.attrs))
    return module.with_weights(*changed)


# ---- queries and keys ---------------------------------------------------------------------------

LAYOUT: Final = ("rope", "transpose", "reshape", "slice", "scale", "rms_norm")


def query_key_weights(function: Function) -> list[str]:
    """Weights of linears whose results attention multiplies with each other."""
    producers = function.producers()
    found: dict[str, None] = {}
    for attention in (op for op in function.ops if op.name == "attention"):
        for operand in attention.operands[:2]:
            op = producers.get(operand) if isinstance(operand, Value) else None
            while op is not None and op.name in LAYOUT:
                value = op.operands[0]
                op = producers.get(value) if isinstance(value, Value) else None
            ref = op.weight() if op is not None and op.name == "linear" else None
            if ref is not None:
                found[ref.name] = None
    return list(found)
