"""Passes from text: `allocate{budget=2.5},quantize` → pass objects. Options are dataclass fields."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.pipeline import Pass

_PASS: Final = re.compile(r"\s*([\w-]+)\s*(?:\{([^}]*)\})?\s*(,|$)")
_TRUTH: Final = {"true": True, "false": False, "on": True, "off": False}


def parse_passes(text: str, table: Mapping[str, type[Pass]]) -> tuple[Pass, ...]:
    """Passes in order. Raises CompileError naming the unknown pass or option, and the known ones."""
    found: list[Pass] = []
    position = 0
    while position < len(text):
        match = _PASS.match(text, position)
        if not match:
            raise CompileError(
                f"{text[position:]!r} is no pass", hint='write -p "allocate{budget=2.5},quantize"'
            )
        found.append(make_pass(match[1].replace("-", "_"), match[2] or "", table))
        position = match.end()
    return tuple(found)


def parse_strategy(text: str, table: Mapping[str, type[Pass]], what: str = "strategy") -> Pass:
    """One strategy, with or without options. Raises CompileError as `parse_passes` does."""
    match = _PASS.fullmatch(text)
    if not match or match[3]:
        name = next(iter(table))
        raise CompileError(f"{text!r} is no {what}", hint=f'write {name} or "{name}{{windows=32}}"')
    return make_pass(match[1].replace("-", "_"), match[2] or "", table, what)


def make_pass(name: str, options: str, table: Mapping[str, type[Pass]], what: str = "pass") -> Pass:
    """One pass from its name and `option=value,…`; `what` it is called in the refusal of its name."""
    if name not in table:
        raise CompileError(f"no {what} {name!r}", hint=f"there are {', '.join(table)}")
    kind: Any = table[name]
    made: Pass = kind(**options_of(name, kind, options.split(",")))
    return made


def options_of(name: str, kind: Any, options: Iterable[str]) -> dict[str, Any]:
    """`option=value` texts as fields of the dataclass `kind`. Raises CompileError naming the known ones."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    given: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in options)):
        key, equals, value = part.partition("=")
        if key not in fields or not equals:
            known = ", ".join(fields) or "none"
            raise CompileError(f"{name}: no option {part!r}", hint=f"the options of {name}: {known}")
        given[key] = _convert(name, key, value, fields[key])
    return given


def _convert(name: str, key: str, value: str, wanted: Any) -> Any:
    choices = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for kind in choices:
        if kind is bool and value in _TRUTH:
            return _TRUTH[value]
        if kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
        if kind is str:
            return value
    wished = " or ".join(k.__name__ for k in choices if k is not types.NoneType)
    raise CompileError(f"{name}: {key}={value!r} is no {wished}")
