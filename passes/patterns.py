"""The patterns of raise_patterns. Each looks back from the last op of a group.

A pattern gets the ops that have been rewritten so far, the op at hand, and its operands. It returns
the value that stands for the op's result, or None. What it leaves unread is dropped afterwards.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from gammac.ir import Attr, Builder, Op, Operand, Value, WeightRef

ROUGHLY: Final = 1e-6
"""Constants of a formula are written with more or fewer digits."""


class Graph:
    """The ops so far, and which of them makes a value."""

    def __init__(self, builder: Builder, hidden_size: int) -> None:
        self.builder = builder
        self.hidden_size = hidden_size
        self._producers: dict[Value, Op] = {}
        self._seen = 0
        self._tables: dict[tuple[Operand, Operand, float], tuple[Value, ...]] = {}

    def op(self, value: Operand, name: str) -> Op | None:
        """The op that makes `value`, if it goes by that name."""
        for op in self.builder.ops[self._seen :]:
            self._producers.update(dict.fromkeys(op.results, op))
        self._seen = len(self.builder.ops)
        found = self._producers.get(value) if isinstance(value, Value) else None
        return found if found is not None and found.name == name else None

    def under(self, value: Operand, name: str, **attrs: Attr) -> Operand | None:
        """The first operand of the op that makes `value`, if its name and attributes are those."""
        op = self.op(value, name)
        if op is None:
            return None
        return op.operands[0] if all(_alike(op.attrs.get(k), v) for k, v in attrs.items()) else None

    def pairs(self, value: Operand, name: str) -> Iterator[tuple[Operand, Operand]]:
        """The operands of a commutative op, in both orders; nothing if another op makes `value`."""
        op = self.op(value, name)
        if op is not None:
            yield from both_orders(op.operands)

    def emit(self, name: str, *operands: Operand, loc: str, **attrs: Attr) -> Value:
        """Append an op."""
        return self.builder.emit(name, *operands, loc=loc, **attrs)

    def rotary_table(
        self, positions: Operand, frequencies: Operand, scaling: float, loc: str
    ) -> tuple[Value, ...]:
        """cos and sin tables; the same are made once."""
        key = (positions, frequencies, scaling)
        if key not in self._tables:
            attrs: dict[str, Attr] = {} if scaling == 1.0 else {"scaling": scaling}
            self._tables[key] = self.builder.emit_all(
                "rotary_table", positions, frequencies, loc=loc, **attrs
            )
        return self._tables[key]


Pattern = Callable[[Graph, Op, tuple[Operand, ...]], Value | None]


def both_orders(operands: tuple[Operand, ...]) -> Iterator[tuple[Operand, Operand]]:
    """A pair and the pair the other way round."""
    x, y = operands
    yield x, y
    yield y, x


def _alike(found: Attr | None, wanted: Attr) -> bool:
    if isinstance(found, float) and isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=ROUGHLY)
    return found == wanted


# ---- rotary positions ---------------------------------------------------------------------------


def rotary_table(graph: Graph, op: Op, operands: tuple[Operand, ...]) -> Value | None:
    """cos or sin of position * frequency, twice side by side."""
    joined = graph.op(operands[0], "concat")
    if joined is None or len(joined.operands) != 2 or joined.operands[0] != joined.operands[1]:
        return None
    if joined.attrs["dim"] != operands[0].type.rank - 1:
        return None
    for positions, frequencies in graph.pairs(joined.operands[0], "mul"):
        plain = _positions(graph, positions)
        if plain is not None and isinstance(frequencies, WeightRef) and frequencies.type.rank == 1:
            cos, sin = graph.rotary_table(plain, frequencies, 1.0, op.loc)
            return cos if op.name == "cos" else sin
    return None


def _positions(graph: Graph, value: Operand) -> Operand | None:
    """The i64 [batch, seq] behind its f32 [batch, seq, 1]."""
    for order in (("cast", "reshape"), ("reshape", "cast")):
        found: Operand | None = value
        for name in order:
            found = graph.under(found, name) if found is not None else None
        if found is not None and found.type.rank == 2 and found.type.dtype == "i64":
            return found
    return None


def rotary_scaling(graph: Graph, op: Op, operands: tuple[Operand, ...]) -> Value | None:
    """A table times a number."""
    table = graph.op(operands[0], "rotary_table")
    by = op.attrs["by"]
    if table is None or "scaling" in table.attrs or not isinstance(by, float):
        return None
    cos, sin = graph.rotary_table(table.operands[0], table.operands[1], by, op.loc)
    return cos if operands[0] == table.results[0] else sin


def rope(graph: Graph, op: Op, operands: tuple[Operand, ...]) -> Value | None:
    """x * cos + rotate_half(x) * sin."""
    for straight, turned in both_orders(operands):
        for x, cos in graph.pairs(straight, "mul"):
            for half, sin in graph.pairs(turned, "mul"):
                tables = _table(graph, cos), _table(graph, sin)
                if tables[0] and tables[1] and _is_rotated_half(graph, half, x):
                    return graph.emit("rope", x, *tables, loc=op.loc)  # type: ignore[arg-type]
    return None


def _table(graph: Graph, value: Operand) -> Operand | None:
    """The table [batch, seq, dim] behind its [batch, 1, seq, dim]."""
    table = graph.under(value, "reshape")
    if table is None or graph.op(table, "rotary_table") is None:
        return None
    batch, *rest = table.type.shape
    return table if value.type.shape == (batch, 1, *rest) else None


def _is_rotated_half(graph: Graph, value: Operand, x: Operand) -> bool:
    joined = graph.op(value, "concat")
    width = x.type.shape[-1]
    if joined is None or len(joined.operands) != 2 or not isinstance(width, int) or x.type.rank != 4:
        return False
    upper = graph.under(joined.operands[0], "neg")
    halves = {"dim": 3, "start": 0, "end": width // 2}, {"dim": 3, "start": width // 2, "end": width}
    return (
        upper is not None
        and graph.under(upper, "slice", **halves[1]) == x
        and graph.under(joined.operands[1], "slice", **halves[0]) == x
    )


def partial_rope(graph: Graph, op: Op, operands: tuple[Operand, ...]) -> Value | None:
    """A rotation of the first features, joined with the others as they were."""
    turned = graph.op(operands[0], "rope")
    if turned is None or len(operands) != 2 or op.attrs["dim"] != 3:
        return None
    x = graph.under(turned.operands[0], "slice", dim=3, start=0)
    width = operands[0].type.shape[3]
    rest = graph.under(operands[1], "slice", dim=3, start=width)
    if x is None or x != rest or op.result.type != x.type:
        return None
    return graph.emit("rope", x, *turned.operands[1:], loc=op.loc)


# ---- norms and activations ----------------------------------------------------------------------


def rms_norm(graph: Graph, op: Op, operands: tuple[Operand, ...]) -> Value | None:
    """x * rsqrt(mean(x^2) + eps) * weight."""
    for normed, weight in both_orders(operands):
        if not isinstance(weight, WeightRef) or weight.type.shape != normed.type.shape[-1:]:
            continue
        for x, inverse in graph.pairs(normed, "mul"):
            shifted = graph.op(inverse, "rsqrt")
            eps = graph.op(shifted.operands[0], "shift") if shifted else None
            mean = graph.under(eps.operands[0], "mean", dim=x.type.rank - 1) if eps else None
            if eps and mean is not None and graph.under(mean, "pow", exponent=2.0) == x:
                return graph.emit("rms_norm", x, weight, loc=op.loc, eps=eps.attrs["by"])
    return None


def silu(graph: Graph, op: Op, operands: tuple[Operand, ...]) -> Value | None:
    """x * sigmoid(x)."""
    for x, gate in both_orders(operands):
        if graph.under(gate, "sigmoid") == x:
            return graph.emit("silu", x, loc=op.loc)
    return None


def gelu(graph: Graph, op: Op, operands: tuple[Operand, ...]) -> Value | None:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    for half, gate in both_orders(operands):
        x, inner = graph.under(half, "scale", by=0.5), graph.under(gate, "shift", by=1.0)
        inner = graph.under(inner, "tanh") if inner is not None else None
        inner = graph.under(inner, "scale", by=math.sqrt(2 / math.pi)) if inner is not None else None
        if x is None or inner is None:
            continue
        for same, cubic in graph.pairs(inner, "add"):
            cube = graph.under(cubic, "scale", by=0.044715)
            if same == x and cube is not None and graph.under(cube, "pow", exponent=3.0) == x:
                return graph.emit("gelu", x, loc=op.loc, approximate="tanh")
    return None


def residual_add(graph: Graph, op: Op, operands: tuple[Operand, ...]) -> Value | None:
    """A sum of two activations as wide as the hidden state."""
    wide = all(isinstance(o, Value) and o.type.shape[-1:] == (graph.hidden_size,) for o in operands)
    if not wide or op.result.type.rank != 3 or operands[0].type != operands[1].type:
        return None
    return graph.emit("residual_add", *operands, loc=op.loc)


PATTERNS: Final[Mapping[str, tuple[Pattern, ...]]] = {
    "cos": (rotary_table,),
    "sin": (rotary_table,),
    "scale": (rotary_scaling,),
    "concat": (partial_rope,),
    "mul": (rms_norm, silu, gelu),
    "add": (rope,),
}
"""The last op of a group → the patterns that it may end."""

SUMS: Final[Mapping[str, tuple[Pattern, ...]]] = {"add": (residual_add,)}
"""Looked for last: a sum inside a larger pattern is none of the residual stream's."""
