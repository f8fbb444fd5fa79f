"""Why a weight has its format: its candidates, a step wider and narrower, and what bits bring elsewhere.

The price of a step is the change of the score for a million true bits. In an allocation that uses its
budget well, no step that was not taken brings more than one that was taken: this is told for one weight.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from gammac.diagnostics import CompileError
from gammac.formats import parse_format
from gammac.ir import Module, Weight
from gammac.passes.allocate import tie_groups
from gammac.passes.allocation_limits import weights_with_roles
from gammac.targets.cost import WeightCost, readers, weight_cost, weight_seconds
from gammac.targets.target import Target

MBIT: Final = 1e6
NOT_WORTH: Final = "not worth it"
WORTH: Final = "worth it alone, but steps are whole and every budget holds"


@dataclass(frozen=True)
class Option:
    """A format for some weights together: sums over them. No score or error: the file has none."""

    format: str
    score: float | None
    error: float | None  # relative output error; of a single weight only
    parameters: int
    payload_bits: int
    true_bits: int
    bytes: int
    seconds: float  # a decoded token's, predicted


@dataclass(frozen=True)
class Step:
    """From one format of some weights to the next; `score`, bits, bytes and seconds are differences."""

    weights: tuple[str, ...]
    before: str
    after: str
    score: float
    true_bits: int
    bytes: int
    seconds: float

    @property
    def price(self) -> float:
        """Score for a Mbit; positive where more bits mean a lower score."""
        return -self.score / (self.true_bits / MBIT)


@dataclass(frozen=True)
class Explanation:
    """`steps` are of the weights that are decided together, the others of weights of the same role."""

    weight: Weight
    together: tuple[str, ...]
    chosen: str
    options: tuple[Option, ...]
    wider: Step | None
    narrower: Step | None
    best_left: Step | None  # elsewhere: the step wider that would bring most for its bits
    worst_taken: Step | None  # elsewhere, as a step back: the last step taken that brought least
    unknown: int  # how many weights of its role have no scores in the file


def find_weight(module: Module, name: str) -> Weight:
    """The weight with this name or the only one that ends in it, `.weight` left out or not.

    A part of a fused weight stands for the whole. Raises CompileError for none and for several.
    """
    found = [w for w in module.weights.values() if any(_ends(n, name) for n in _names(w))]
    exact = [w for w in found if name in _names(w)]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if not found:
        near = [n for n in module.weights if name in n][:5]
        raise CompileError(f"there is no weight {name!r}", hint=f"perhaps {', '.join(near)}" if near else "")
    names = [w.name for w in found]
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    raise CompileError(f"{name!r} stands for {len(names)} weights", hint=f"write more of one: {shown}")


def _names(weight: Weight) -> tuple[str, ...]:
    parts = weight.attrs.get("parts", ())
    assert isinstance(parts, tuple)
    return (weight.name, *map(str, parts))


def _ends(name: str, wanted: str) -> bool:
    return any(f".{n}".endswith(f".{wanted}") for n in (name, name.removesuffix(".weight")))


def explain(module: Module, weight: Weight, target: Target) -> Explanation:
    """All that the module tells of the weight's format on the target."""
    groups = _groups(module, target)
    own = next((g for g in groups if weight.name in g), (weight.name,))
    mine = _steps(module, own, target)
    alike = [w for w in module.weights.values() if w.attrs.get("role") == weight.attrs.get("role")]
    elsewhere = {w.name for w in alike} - set(own)
    others = [_steps(module, group, target) for group in groups if group[0] in elsewhere]
    return Explanation(
        weight,
        own,
        _format(weight),
        tuple(options(module, (weight.name,), target)),
        mine[0],
        mine[1],
        max((up for up, _ in others if up), key=lambda step: step.price, default=None),
        min((down for _, down in others if down), key=lambda step: step.price, default=None),
        sum("scores" not in w.attrs for w in alike),
    )


def _format(weight: Weight) -> str:
    return str(weight.attrs.get("format") or weight.attrs.get("stored") or "")


def _groups(module: Module, target: Target) -> list[tuple[str, ...]]:
    """Weights decided together as `allocate` does by default; where formats differ, nothing was tied."""
    if not target.tie:
        return [(name,) for name in weights_with_roles(module)]
    found: list[tuple[str, ...]] = []
    for group in tie_groups(module):
        alike = len({_format(module.weights[name]) for name in group}) == 1
        found += [group] if alike else [(name,) for name in group]
    return found


def options(module: Module, names: tuple[str, ...], target: Target) -> Iterator[Option]:
    """Formats that all these weights may get and that the target runs, by true bits."""
    weights = [module.weights[name] for name in names]
    found = [_option(module, weights, name, target) for name in _formats(weights, target)]
    yield from sorted(found, key=lambda option: option.true_bits)


def _formats(weights: list[Weight], target: Target) -> list[str]:
    """Those with scores, else those with candidates, else the one that was chosen."""
    first = weights[0]
    tables = (_table(first, key) for key in ("scores", "candidates", "errors"))
    known = next((list(t) for t in tables if t), [f for f in [_format(first)] if f])
    return [name for name in known if all(_runs(w, name, target) for w in weights)]


def _runs(weight: Weight, format_: str, target: Target) -> bool:
    columns = weight.type.shape[-1]
    assert isinstance(columns, int)
    fits = (
        target.kernel_for(parse_format(format_), str(weight.attrs.get("role", "block")), columns) is not None
    )
    scores = _table(weight, "scores")
    return fits and (not scores or format_ in scores)


def _table(weight: Weight, key: str) -> Mapping[str, object]:
    found = weight.attrs.get(key, {})
    assert isinstance(found, Mapping)
    return found


def _option(module: Module, weights: list[Weight], format_: str, target: Target) -> Option:
    users = readers(module)
    rows: list[WeightCost] = [
        weight_cost(w, users[w.name], module, target, {w.name: format_}) for w in weights
    ]
    scores = [_number(_table(w, "scores").get(format_)) for w in weights]
    errors = [_number(_table(w, "errors").get(format_)) for w in weights]
    measured = _number(weights[0].attrs.get("measured_error")) if format_ == _format(weights[0]) else None
    known = [s for s in scores if s is not None]
    return Option(
        format_,
        sum(known) if len(known) == len(weights) else None,
        (errors[0] if errors[0] is not None else measured) if len(weights) == 1 else None,
        sum(r.numel for r in rows),
        sum(r.payload_bits for r in rows),
        sum(r.storage_bits for r in rows),
        sum(r.bytes for r in rows),
        sum(r.decode_seconds for r in rows),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _steps(module: Module, names: tuple[str, ...], target: Target) -> tuple[Step | None, Step | None]:
    """One step wider and one narrower than what was chosen; None where there is none or no score."""
    found = list(options(module, names, target))
    chosen = _format(module.weights[names[0]])
    at = next((i for i, option in enumerate(found) if option.format == chosen), None)
    if at is None:
        return None, None
    wider = _step(names, found[at], found[at + 1]) if at + 1 < len(found) else None
    return wider, _step(names, found[at], found[at - 1]) if at else None


def _step(names: tuple[str, ...], before: Option, after: Option) -> Step | None:
    if before.score is None or after.score is None or before.true_bits == after.true_bits:
        return None
    return Step(
        names, before.format, after.format, after.score - before.score, after.true_bits - before.true_bits,
        after.bytes - before.bytes, after.seconds - before.seconds,
    )  # fmt: skip


def on_device(found: Explanation, target: Target) -> Iterator[str]:
    """What the format costs on the target, why, and which wider formats are no slower there."""
    now = next((option for option in found.options if option.format == found.chosen), None)
    rows, columns = found.weight.type.shape[0], found.weight.type.shape[-1]
    if now is None or not now.seconds:
        return
    assert isinstance(rows, int) and isinstance(columns, int)
    role = str(found.weight.attrs.get("role"))
    reading, unpacking = weight_seconds(rows, columns, parse_format(now.format), target, role)
    what = "reading its bytes" if reading >= unpacking else "unpacking its weights"
    yield f"on {target.name}: {1e6 * now.seconds:.1f} µs a token, of which {what} takes most"
    wider = [o for o in found.options if o.true_bits > now.true_bits and o.seconds <= now.seconds]
    if wider:
        names = " and ".join(f"{o.format} ({1e6 * o.seconds:.1f} µs)" for o in wider)
        yield f"{names} would take no longer there: only a limit of size, memory or bits speaks against"


def reasons(found: Explanation) -> Iterator[str]:
    """What the numbers say, in words, and what is not in the file."""
    if len(found.together) > 1:
        yield f"decided together, as the target fuses them: {', '.join(found.together)}"
    if "role" not in found.weight.attrs:
        yield "it stays f32: no linear of a block, nor embedding or head"
        return
    if not _table(found.weight, "scores"):
        yield "its scores are not in this file: compile with --dump-ir, and inspect the dump behind allocate"
        return
    if not found.chosen:
        yield "it has no format yet: allocate gives it one"
    if found.unknown:
        yield f"{found.unknown} weights are not compared: the dumps have their scores, this file has not"
    if found.wider and found.worst_taken:
        gain, elsewhere = found.wider.price, found.worst_taken.price
        yield (
            f"a step wider would bring {gain:.3g} for a Mbit; the bits would come from a step that brings "
            f"{elsewhere:.3g}: {NOT_WORTH if gain <= elsewhere else WORTH}"
        )
    if found.narrower and found.best_left:
        loss, elsewhere = found.narrower.price, found.best_left.price
        yield (
            f"a step narrower would cost {loss:.3g} for a Mbit; the best that the bits could buy brings "
            f"{elsewhere:.3g}: {NOT_WORTH if loss >= elsewhere else WORTH}"
        )
