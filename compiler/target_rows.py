"""Rows and figures in a target's TOML text: what `gammac targets analyse` and `calibrate` write."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from gammac.targets.target import Analysed, Measured


def to_toml(key: str, rows: Sequence[Analysed] | Sequence[Measured]) -> str:
    """`[[key]]` and the fields of each row."""
    return "\n".join("\n".join((f"[[{key}]]", *_fields(asdict(row)))) + "\n" for row in rows)


def _fields(row: dict[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        yield f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value!r}"


def table_of(text: str, table: str = "") -> str:
    """What a table of the TVM backend is called in a target's file: that may be the target's own emitter."""
    own = re.search(r'^emitter = "tvm"$', text, flags=re.MULTILINE)
    return table if own else ".".join(("backend.tvm", *filter(None, (table,))))


def with_figure(text: str, table: str, key: str, figure: int | float) -> str:
    """The text with a figure in a table that is there; "" is what stands before all tables."""
    head = f"\n[{table}]\n" if table else ""
    start = text.index(head) + len(head)
    end = text.find("\n[", start)
    body, rest = (text[start:], "") if end < 0 else (text[start:end], text[end:])
    shown = str(figure) if isinstance(figure, int) else f"{figure:.4g}"
    line, known = f"{key} = {shown}", re.compile(rf"^{re.escape(key)} = .*$", re.MULTILINE)
    body = known.sub(line, body, count=1) if known.search(body) else f"{body.rstrip()}\n{line}\n"
    return text[:start] + body + rest
