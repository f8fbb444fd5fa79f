"""What a pass changed: the lines of two dumps that differ, without the noise of renumbering.

Values are named by what makes them, not by a running number, so that one op more at the top does not
change every line below it.
"""

import difflib
from collections import defaultdict
from collections.abc import Iterator

from gammac.ir.core import Function, Module, Value
from gammac.ir.text import attrs_text, op_text, weight_text


def diff_modules(before: Module, after: Module) -> Iterator[str]:
    """Lines that start with `-` or `+`, each part under a line that starts with `@@`."""
    yield from _section("module", [attrs_text(before.attrs)], [attrs_text(after.attrs)])
    yield from _section(
        "weights",
        [weight_text(w) for w in before.weights.values()],
        [weight_text(w) for w in after.weights.values()],
    )
    for name in dict.fromkeys([*before.functions, *after.functions]):
        sides = [_lines(m.functions[name]) if name in m.functions else [] for m in (before, after)]
        yield from _section(f"func @{name}", *sides)


def _section(title: str, before: list[str], after: list[str]) -> Iterator[str]:
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")]
    if changed:
        yield f"@@ {title} @@"
        yield from changed


def _lines(function: Function) -> list[str]:
    names: dict[Value, str] = {p: f"%{p.name}" for p in function.params}
    taken: dict[str, int] = defaultdict(int)
    lines = [f"({', '.join(f'%{p.name}: {p.type}' for p in function.params)})"]
    for op in function.ops:
        stem = f"{op.loc}.{op.name}" if op.loc else op.name
        for value in op.results:
            taken[stem] += 1
            names[value] = f"%{stem}" + (f".{taken[stem]}" if taken[stem] > 1 else "")
        lines.append(op_text(op, names))
    returns = zip(function.return_names, function.returns, strict=True)
    return [*lines, *(f"return {n} = {names[v] if isinstance(v, Value) else v.name}" for n, v in returns)]
