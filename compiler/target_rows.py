"""Rows of a target's file as TOML text: what `gammac targets analyse` and `calibrate` write."""

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
