"""Name what a group of elementary ops amounts to.

    %3 = mul %0, %1                                      %1, %2: cos and sin, [batch,1,seq,64]
    %4 = slice %0 {dim = 3, start = 0, end = 32}
    %5 = slice %0 {dim = 3, start = 32, end = 64}
    %6 = neg %5
    %7 = concat %6, %4 {dim = 3}
    %8 = mul %7, %2
    %9 = add %3, %8
->
    %3 = rope %0, %1, %2                                 %1, %2: the tables, [batch,seq,64]

The patterns, and what they look like, stand in patterns.py: rotary tables and rotations, RMS norms,
tanh-form GELUs, SiLUs, and the sums of the residual stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gammac.ir import Builder, Function, Module, Op, Operand, rewrite
from gammac.passes.patterns import PATTERNS, SUMS, Graph, Pattern
from gammac.pipeline import Context, Invariant


@dataclass(frozen=True)
class RaisePatterns:
    """Replace known groups of ops by the op that they amount to."""

    name: ClassVar[str] = "raise_patterns"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()

    def run(self, module: Module, ctx: Context) -> Module:
        """The module with patterns raised in every function."""
        hidden_size = module.attrs.get("hidden_size")
        width = hidden_size if isinstance(hidden_size, int) else 0
        functions = (_raise(f, width, PATTERNS) for f in module.functions.values())
        return module.with_functions(*(_raise(f, width, SUMS) for f in functions))


def _raise(function: Function, hidden_size: int, patterns: Mapping[str, tuple[Pattern, ...]]) -> Function:
    graph: Graph | None = None

    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        nonlocal graph
        graph = graph or Graph(b, hidden_size)
        for pattern in patterns.get(op.name, ()):
            found = pattern(graph, op, operands)
            if found is not None:
                return (found,)
        return None

    return rewrite(function, rule)
