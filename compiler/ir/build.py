"""Building and rewriting functions: types are inferred, what nothing uses is dropped."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from gammac.ir.core import Attr, Function, Op, Operand, Value
from gammac.ir.ops import OPS, TypeRuleError


class Builder:
    """Appends ops to a function under construction."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def emit_all(self, name: str, *operands: Operand, loc: str = "", **attrs: Attr) -> tuple[Value, ...]:
        """Append an op and return its results. Raises TypeRuleError."""
        if name not in OPS:
            raise TypeRuleError(f"there is no op {name}")
        types = OPS[name].infer(tuple(o.type for o in operands), attrs)
        op = Op(name, operands, tuple(Value(t) for t in types), attrs, loc)
        self.ops.append(op)
        return op.results

    def emit(self, name: str, *operands: Operand, loc: str = "", **attrs: Attr) -> Value:
        """Append an op with one result and return it. Raises TypeRuleError."""
        (value,) = self.emit_all(name, *operands, loc=loc, **attrs)
        return value


Rewrite = Callable[[Builder, Op, tuple[Operand, ...]], Sequence[Operand] | None]


def rewrite(function: Function, rule: Rewrite, params: Sequence[Value] | None = None) -> Function:
    """Rebuild a function op by op.

    `rule(builder, op, operands)` sees each op with its operands already rewritten. It returns the
    values that stand for the op's results, or None to keep the op as it is. Dead ops are dropped.
    """
    builder = Builder()
    mapping: dict[Value, Operand] = dict(
        zip(function.params, params if params is not None else function.params, strict=True)
    )

    def mapped(operand: Operand) -> Operand:
        return mapping[operand] if isinstance(operand, Value) else operand

    for op in function.ops:
        operands = tuple(mapped(o) for o in op.operands)
        new = rule(builder, op, operands)
        if new is None:
            new = builder.emit_all(op.name, *operands, loc=op.loc, **op.attrs)
        mapping.update(zip(op.results, new, strict=True))
    returns = tuple(mapped(value) for value in function.returns)
    return drop_dead(
        replace(
            function,
            params=tuple(params) if params is not None else function.params,
            ops=tuple(builder.ops),
            returns=returns,
        )
    )


def drop_dead(function: Function) -> Function:
    """Without the ops whose results nothing reads."""
    live: set[Value] = {v for v in function.returns if isinstance(v, Value)}
    kept: list[Op] = []
    for op in reversed(function.ops):
        if live.intersection(op.results):
            live.update(o for o in op.operands if isinstance(o, Value))
            kept.append(op)
    return replace(function, ops=tuple(reversed(kept)))
