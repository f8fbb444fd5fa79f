"""Whether a model can fit a device at all: its narrowest weights and its cache against the memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gammac.diagnostics import CompileError
from gammac.formats import parse_formats
from gammac.ir import Module, Weight
from gammac.targets.cost import FLOAT_BYTES, float_bytes, stored_bytes
from gammac.targets.target import BLOCK, Target

# what a cache is counted for where no context is given
CONTEXT: Final = 512
KEYS_AND_VALUES: Final = 2


@dataclass(frozen=True)
class Room:
    """Bytes: of the weights in the narrowest of their formats, and of a token's keys and values."""

    weights: int
    cache_per_token: int

    def bytes(self, context: int) -> int:
        """With a cache of so many tokens."""
        return self.weights + context * self.cache_per_token


def least_room(module: Module, target: Target, block: str, table: str) -> Room:
    """What a captured module takes at least; `block` and `table` are formats, joined by `+`."""
    sizes = ("layers", "kv_heads", "head_dim")
    layers, heads, dim = (int(str(module.attrs.get(name, 0))) for name in sizes)
    weights = sum(
        _least(w, target, block if w.attrs.get("role") == BLOCK else table) for w in module.weights.values()
    )
    return Room(weights, KEYS_AND_VALUES * FLOAT_BYTES * layers * heads * dim)


def _least(weight: Weight, target: Target, formats: str) -> int:
    role = weight.attrs.get("role")
    if role is None:
        return float_bytes(weight.type)
    rows, columns = weight.type.shape
    assert isinstance(rows, int) and isinstance(columns, int)
    fitted = (target.fit(f, str(role), columns) for f in parse_formats(formats))
    sizes = [stored_bytes(rows, columns, f, target, str(role)) for f in fitted if f is not None]
    return min(sizes, default=float_bytes(weight.type))


def demand_room(module: Module, target: Target, formats: Sequence[str], context: int) -> None:
    """Raises CompileError for a model that can't fit, and for a target that runs nothing, saying what would.

    `formats` are those of blocks and of tables, each joined by `+`; `context` is in tokens, 0 for none.
    """
    room, there = least_room(module, target, *formats), target.memory_bytes
    wished = context or min(CONTEXT, int(str(module.attrs.get("max_positions", CONTEXT))))
    if not target.refusal and room.bytes(wished) <= there:
        return
    cache = f"{_mb(wished * room.cache_per_token)} for a cache of {wished} tokens"
    takes = f"{module.name} takes {_mb(room.weights)} in its narrowest formats and {cache}, "
    takes += f"{target.name} has {_mb(there)}"
    if target.refusal:
        fits = "that would fit" if room.bytes(wished) <= there else _would_fit(module, room, there)
        raise CompileError(
            f"nothing can be compiled for {target.name}: {target.refusal}; {takes}",
            hint=f"{fits}; {SMALLEST}",
        )
    raise CompileError(takes, hint=_would_fit(module, room, there))


SMALLEST: Final = "of the targets that run, edge-armv7-rpi2 is the smallest"


def _would_fit(module: Module, room: Room, there: int) -> str:
    """The longest context, or, where the weights alone are too much, the largest model of their kind."""
    if room.weights < there and room.cache_per_token:
        return f"a context of {(there - room.weights) // room.cache_per_token} tokens would fit: --context"
    parameters = sum(w.type.numel() for w in module.weights.values()) * there / room.weights
    return f"a model of {parameters / 1e6:.1f} million parameters would fit without a cache"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
