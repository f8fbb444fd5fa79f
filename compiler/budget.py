"""What the user grants: `3`, `3bpw`, `80MB`, `12ms/token`. One spelling each, read and shown here.

3  2.5bits     payload bits: mean code bits over the block linears
3bpw           true bits: everything stored for the block linears, by their number of weights
80MB  75MiB    bytes of the artifact
200MB@2048     predicted peak memory with 2048 tokens: weights, cache and what is alive beside them
12ms/token     predicted decode time behind 512 tokens; 12ms/token@2048 behind 2048
0.5s@512       predicted time of a prefill of 512 tokens
0.5J/token     predicted energy behind 512 tokens; @ as for the time
0.1loss        predicted loss: the sum of the scores, in the strategy's unit
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
MEMORY: Final = "memory"
PREFILL: Final = "prefill"
LOSS: Final = "loss"

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
    "uj/token": (ENERGY, "uJ/token", Decimal("1e-6")),
    "mj/token": (ENERGY, "mJ/token", Decimal("1e-3")),
    "j/token": (ENERGY, "J/token", Decimal(1)),
    "us": (PREFILL, "us", Decimal("1e-6")),
    "ms": (PREFILL, "ms", Decimal("1e-3")),
    "s": (PREFILL, "s", Decimal(1)),
    "loss": (LOSS, "loss", Decimal(1)),
}
SPELLINGS: Final = (
    "write 3 or 2.5bits, 3bpw, 80MB or 75MiB, 200MB@2048, 12ms/token, 0.5s@512, 0.5J/token, 0.1loss"
)
# kind without a number of tokens -> kind with one
_WITH_TOKENS: Final = {SIZE: MEMORY, PREFILL: PREFILL, LATENCY: LATENCY, ENERGY: ENERGY}

# kind -> what a message calls it
KINDS: Final = {
    PAYLOAD: "payload bits",
    TRUE: "true bits",
    SIZE: "bytes",
    LATENCY: "seconds a token",
    ENERGY: "joules a token",
    MEMORY: "bytes of memory",
    PREFILL: "seconds of a prefill",
    LOSS: "predicted loss",
}
# kind -> (unit that a message uses, its worth, decimals)
_SHOWN: Final = {
    PAYLOAD: ("", Fraction(1), 3),
    TRUE: ("bpw", Fraction(1), 3),
    SIZE: ("MB", Fraction(10**6), 3),
    LATENCY: ("ms/token", Fraction(1, 1000), 3),
    ENERGY: ("mJ/token", Fraction(1, 1000), 3),
    MEMORY: ("MB", Fraction(10**6), 3),
    PREFILL: ("ms", Fraction(1, 1000), 3),
    LOSS: ("loss", Fraction(1), 6),
}
# the same for amounts below one of those
_SHOWN_SMALL: Final = {
    LATENCY: ("us/token", Fraction(1, 10**6), 3),
    ENERGY: ("uJ/token", Fraction(1, 10**6), 3),
    PREFILL: ("us", Fraction(1, 10**6), 3),
}


@dataclass(frozen=True)
class Budget:
    """A limit. `value` is in bits, bytes, seconds or joules; `text` is the canonical spelling.

    `tokens` are those that it is counted for: of a prompt, or that a token stands behind; 0 if none are said.
    """

    kind: str
    value: float
    text: str
    tokens: int = 0

    def __str__(self) -> str:
        return self.text

    @property
    def exact(self) -> Fraction:
        """`value` as the decimal number that it prints as: comparisons need no tolerance."""
        return Fraction(repr(self.value))


def parse_budget(text: str) -> Budget:
    """Read one budget. Raises CompileError that lists the spellings."""
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))\s*([A-Za-z/]*)(?:@(\d+))?", text.strip())
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise CompileError(f"{text.strip()!r} is no budget", hint=SPELLINGS)
    kind, spelling, worth = unit
    number, tokens = Decimal(match[1]), int(match[3] or 0)
    if number <= 0 or match[3] == "0":
        raise CompileError(f"the budget {text.strip()} grants nothing", hint=SPELLINGS)
    if (tokens and kind not in _WITH_TOKENS) or (kind == PREFILL and not tokens):
        raise CompileError(f"{text.strip()!r} is no budget", hint=SPELLINGS)
    kind = _WITH_TOKENS[kind] if tokens else kind
    return Budget(kind, float(number * worth), f"{_plain(number)}{spelling}{_behind(tokens)}", tokens)


def _behind(tokens: int) -> str:
    return f"@{tokens}" if tokens else ""


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Read budgets that hold together: `3+80MB` or `3,80MB`. Raises CompileError."""
    return tuple(parse_budget(part) for part in re.split("[+,]", text))


def spelled(kind: str, amount: Fraction, tokens: int = 0) -> str:
    """The smallest budget of a few digits that grants `amount`; `parse_budget` reads it."""
    unit, worth, decimals = _SHOWN[kind]
    if amount < worth:
        unit, worth, decimals = _SHOWN_SMALL.get(kind, (unit, worth, decimals))
    steps = -(-amount * 10**decimals // worth)
    return f"{steps // 10**decimals}.{steps % 10**decimals:0{decimals}d}{unit}{_behind(tokens)}"


def _plain(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
