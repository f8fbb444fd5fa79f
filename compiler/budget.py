"""What the user grants: `3`, `3bpw`, `80MB`, `12ms/token`. One spelling each, read and shown here.

3  2.5bits     payload bits: mean code bits over the block linears
3bpw           true bits: everything stored for the block linears, by their number of weights
80MB  75MiB    bytes of the artifact
12ms/token     predicted decode time
0.5J/token     predicted energy
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Final

from gammac.diagnostics import CompileError

PAYLOAD: Final = "payload"
TRUE: Final = "true"
SIZE: Final = "size"
LATENCY: Final = "latency"
ENERGY: Final = "energy"

# unit in lower case -> (kind, canonical spelling, worth in bits, bytes, seconds or joules)
UNITS: Final[dict[str, tuple[str, str, Decimal]]] = {
    "": (PAYLOAD, "", Decimal(1)),
    "bit": (PAYLOAD, "", Decimal(1)),
    "bits": (PAYLOAD, "", Decimal(1)),
    "bpw": (TRUE, "bpw", Decimal(1)),
    "kb": (SIZE, "KB", Decimal(10**3)),
    "mb": (SIZE, "MB", Decimal(10**6)),
    "gb": (SIZE, "GB", Decimal(10**9)),
    "kib": (SIZE, "KiB", Decimal(2**10)),
    "mib": (SIZE, "MiB", Decimal(2**20)),
    "gib": (SIZE, "GiB", Decimal(2**30)),
    "us/token": (LATENCY, "us/token", Decimal("1e-6")),
    "ms/token": (LATENCY, "ms/token", Decimal("1e-3")),
    "s/token": (LATENCY, "s/token", Decimal(1)),
    "j/token": (ENERGY, "J/token", Decimal(1)),
}
SPELLINGS: Final = "write 3 or 2.5bits, 3bpw, 80MB or 75MiB, 12ms/token, 0.5J/token"

# kind -> what a message calls it
KINDS: Final = {
    PAYLOAD: "payload bits",
    TRUE: "true bits",
    SIZE: "bytes",
    LATENCY: "seconds a token",
    ENERGY: "joules a token",
}
# kind -> (unit that a message uses, its worth, decimals)
_SHOWN: Final = {
    PAYLOAD: ("", Fraction(1), 3),
    TRUE: ("bpw", Fraction(1), 3),
    SIZE: ("MB", Fraction(10**6), 3),
    LATENCY: ("ms/token", Fraction(1, 1000), 3),
    ENERGY: ("J/token", Fraction(1), 3),
}


@dataclass(frozen=True)
class Budget:
    """A limit. `value` is in bits, bytes, seconds or joules; `text` is the canonical spelling."""

    kind: str
    value: float
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def exact(self) -> Fraction:
        """`value` as the decimal number that it prints as: comparisons need no tolerance."""
        return Fraction(repr(self.value))


def parse_budget(text: str) -> Budget:
    """Read one budget. Raises CompileError that lists the spellings."""
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))\s*([A-Za-z/]*)", text.strip())
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise CompileError(f"{text.strip()!r} is no budget", hint=SPELLINGS)
    kind, spelling, worth = unit
    number = Decimal(match[1])
    if number <= 0:
        raise CompileError(f"the budget {text.strip()} grants nothing", hint=SPELLINGS)
    return Budget(kind, float(number * worth), f"{_plain(number)}{spelling}")


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Read budgets that hold together: `3+80MB` or `3,80MB`. Raises CompileError."""
    return tuple(parse_budget(part) for part in re.split("[+,]", text))


def spelled(kind: str, amount: Fraction) -> str:
    """The smallest budget of a few digits that grants `amount`; `parse_budget` reads it."""
    unit, worth, decimals = _SHOWN[kind]
    steps = -(-amount * 10**decimals // worth)
    return f"{steps // 10**decimals}.{steps % 10**decimals:0{decimals}d}{unit}"


def _plain(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
