"""The verifier: lists everything that is wrong with a module, each at its place, repairs nothing."""

from collections.abc import Iterator

from gammac.diagnostics import Diagnostic
from gammac.ir.core import Function, Module, Op, Operand, Value, WeightRef
from gammac.ir.ops import OPS, OpSpec, TypeRuleError


def verify(module: Module) -> list[Diagnostic]:
    """Every violation found; an empty list means that the module is well formed."""
    return [d for function in module.functions.values() for d in _verify_function(module, function)]


def _verify_function(module: Module, function: Function) -> Iterator[Diagnostic]:
    defined: set[Value] = set()
    where = f"@{function.name}"
    for param in function.params:
        if param in defined or not param.name:
            yield Diagnostic(f"parameter %{param.name} is listed twice or has no name", where)
        defined.add(param)
    for op in function.ops:
        place = op.loc or where
        yield from (Diagnostic(m, place) for m in _operand_errors(module, op.operands, defined))
        yield from (Diagnostic(m, place) for m in _op_errors(op))
        for value in op.results:
            if value in defined:
                yield Diagnostic(f"a result of {op.name} is defined twice", place)
            defined.add(value)
    yield from (Diagnostic(m, where) for m in _operand_errors(module, function.returns, defined))
    if len(function.returns) != len(function.return_names):
        yield Diagnostic("results and their names differ in number", where)


def _operand_errors(module: Module, operands: tuple[Operand, ...], defined: set[Value]) -> Iterator[str]:
    for operand in operands:
        if isinstance(operand, WeightRef):
            weight = module.weights.get(operand.name)
            if weight is None:
                yield f"the module has no weight @{operand.name}"
            elif weight.type != operand.type:
                yield f"@{operand.name} is {weight.type}, used as {operand.type}"
        elif operand not in defined:
            yield f"%{operand.name or '?'} ({operand.type}) is used before it is defined"


def _op_errors(op: Op) -> Iterator[str]:
    spec = OPS.get(op.name)
    if spec is None:
        yield f"there is no op {op.name}"
        return
    yield from _attr_errors(op, spec)
    try:
        expected = spec.infer(tuple(o.type for o in op.operands), op.attrs)
    except TypeRuleError as error:
        yield f"{op.name}: {error}"
        return
    found = tuple(v.type for v in op.results)
    if found != expected:
        yield f"{op.name} gives {', '.join(map(str, expected))}, not {', '.join(map(str, found))}"


def _attr_errors(op: Op, spec: OpSpec) -> Iterator[str]:
    known = {**spec.required, **spec.optional}
    for name, value in op.attrs.items():
        if name not in known:
            yield f"{op.name} has no attribute {name}"
        elif type(value) is not known[name]:
            yield f"{op.name}: {name} is a {known[name].__name__}, not {value!r}"
