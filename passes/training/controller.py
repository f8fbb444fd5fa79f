"""DSA-QAT's Dynamic Precision Controller: the state behind `precision.py`, on a module and a target.

C_b is what the target's own cost model says (`targets/cost.py`, which the allocator asks, too): payload bits,
which the paper's energy E ∝ Σ b·N counts; seconds of a decoded token; or bytes, which is bandwidth. Formats
that the target does not run were left out before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from gammac.formats import Format
from gammac.ir import Module
from gammac.passes.allocate import tie_groups
from gammac.passes.training.fake_quantize import HeldGrid
from gammac.passes.training.options import DsaQatOptions
from gammac.passes.training.precision import (
    Layers,
    Level,
    Picks,
    by_bisection,
    by_program,
    by_trade_off,
    followed,
    reversed_errors,
    steadied,
    within,
)
from gammac.passes.training.sensitivity import Layer, gradient_variance, sensitivities, smoothed
from gammac.pipeline import Context
from gammac.targets import cost

LOSS_KEEP: Final = 0.9
SAMPLED: Final = 64  # rows, of which there are hundreds that are alike


@dataclass(frozen=True)
class Price:
    """A format of one group of weights: its share of C, and its payload bits."""

    cost: float
    bits: int


class Controller:
    """Which format each block weight has at the moment. Weights that the target fuses get one format."""

    def __init__(
        self, module: Module, ctx: Context, options: DsaQatOptions, offered: Mapping[str, Sequence[Format]]
    ) -> None:
        self.options, self.names = options, list(offered)
        self.groups = _groups(module, ctx, offered)
        self.offered = [_common([offered[n] for n in names]) for names in self.groups]
        self.prices = _prices(module, ctx, options.cost, self.groups, self.offered)
        self.sizes = {n: module.weights[n].type.numel() for n in offered}
        self.capacity = math.floor(options.average_bits * sum(self.sizes.values()) + 1e-6)
        self.variances: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.distortions: dict[str, float] = {}
        self.trade_off = options.trade_off
        self.picks: Picks = tuple(0 for _ in self.groups)
        self.loss: float | None = None
        self.seen: float | None = None  # the smoothed loss at the last look

    # ---- what it learns -------------------------------------------------------------------------

    def observe(self, gradients: Mapping[str, Tensor]) -> None:
        """Smooth Var(∇W) of each block weight."""
        now = {n: gradient_variance(gradients[n]) for n in self.names}
        self.variances = smoothed(self.variances, now, self.options.keep)

    def follow(self, loss: float) -> None:
        """Smooth the loss."""
        self.loss = loss if self.loss is None else LOSS_KEEP * self.loss + (1 - LOSS_KEEP) * loss

    # ---- what it decides ------------------------------------------------------------------------

    def decide(
        self, weights: Mapping[str, Tensor], errors: Mapping[str, float], distortions: Mapping[str, float],
        *, first: bool,
    ) -> int:  # fmt: skip
        """Choose widths for the weights as they are now; how many groups changed.

        The first choice is taken as it is; later ones move by one step, and never exceed the budget.
        Raises CompileError for a budget that can't be met.
        """
        self.errors = smoothed(self.errors, errors, self.options.keep)
        self.distortions = smoothed(self.distortions, distortions, self.options.keep)
        layers = self.layers(weights)
        wanted = self._wanted(layers)
        picks = wanted if first else steadied(layers, self.picks, wanted, self.trade_off)
        picks = within(layers, picks, self.capacity)
        changed = sum(a != b for a, b in zip(picks, self.picks, strict=True))
        self.picks = picks
        return changed

    def _wanted(self, layers: Layers) -> Picks:
        if self.options.trade_off:
            if self.loss is not None and self.seen is not None:
                self.trade_off = followed(self.trade_off, self.seen, self.loss)
            self.seen = self.loss
            return by_trade_off(layers, self.trade_off)
        if self.options.controller == "milp":
            return by_program(layers, self.capacity)
        picks, self.trade_off = by_bisection(layers, self.capacity)
        return picks

    def layers(self, weights: Mapping[str, Tensor]) -> Layers:
        """Each group's formats with S · ε and C. ε is the weight's relative squared rounding error."""
        found = sensitivities({n: self.layer(n, weights[n]) for n in self.names}, *self.options.weights)
        layers = []
        for names, formats, prices in zip(self.groups, self.offered, self.prices, strict=True):
            noise = [sum(found[n] * relative_error(weights[n], f, self.options.clip) for n in names)
                     for f in formats]  # fmt: skip
            pairs = zip(formats, noise, prices, strict=True)
            layers.append([Level(f.name, e, p.cost, p.bits) for f, e, p in pairs])
        if self.options.reverse:
            return reversed_errors(layers, [sum(found[n] for n in names) for names in self.groups])
        return layers

    def layer(self, name: str, weight: Tensor) -> Layer:
        """What was learnt of one, and its weight as it is now."""
        return Layer(
            self.variances[name], float(weight.square().sum()), self.sizes[name], self.errors[name],
            self.distortions.get(name, 0.0),
        )  # fmt: skip

    def formats(self) -> dict[str, Format]:
        """The format of each block weight."""
        rows = zip(self.groups, self.offered, self.picks, strict=True)
        return {n: formats[pick] for names, formats, pick in rows for n in names}

    def average_bits(self) -> float:
        """Payload bits a block weight."""
        bits = sum(p[pick].bits for p, pick in zip(self.prices, self.picks, strict=True))
        return bits / sum(self.sizes.values())

    # ---- state ----------------------------------------------------------------------------------

    STATE: Final = ("variances", "errors", "distortions", "trade_off", "loss", "seen")

    def facts(self) -> dict[str, Any]:
        """All of it as JSON, which keeps every bit of a float."""
        return {"picks": list(self.picks), **{name: getattr(self, name) for name in self.STATE}}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """The inverse of `facts`."""
        self.picks = tuple(facts["picks"])
        for name in self.STATE:
            setattr(self, name, facts[name])


def relative_error(weight: Tensor, format_: Format, clip: str) -> float:
    """ε: Σ(W − Q(W))² / ΣW², over SAMPLED rows that are evenly spaced."""
    weight = weight[:: -(-len(weight) // SAMPLED)]
    grid = HeldGrid(format_, clip)
    grid.refresh(weight)
    lost = (weight - grid.quantized(weight).dequantize()).square().sum()
    return float(lost / weight.square().sum().clamp(min=1e-30))


def _groups(module: Module, ctx: Context, offered: Mapping[str, Sequence[Format]]) -> list[tuple[str, ...]]:
    """Block weights that are decided together; a tie without a common format is undone."""
    tied = tie_groups(module) if ctx.target.tie else [(n,) for n in offered]
    found: list[tuple[str, ...]] = []
    for names in tied:
        own = tuple(n for n in names if n in offered)
        if own and _common([offered[n] for n in own]):
            found.append(own)
        else:
            found += [(n,) for n in own]
    return found


def _common(offers: Sequence[Sequence[Format]]) -> list[Format]:
    return [f for f in offers[0] if all(f in offer for offer in offers)]


def _prices(
    module: Module, ctx: Context, kind: str, groups: Sequence[Sequence[str]],
    offered: Sequence[Sequence[Format]],
) -> list[list[Price]]:  # fmt: skip
    """C by group and format, in shares of what the widest formats cost."""
    readers = cost.readers(module)

    def row(name: str, format_: Format) -> cost.WeightCost:
        return cost.weight_cost(
            module.weights[name], readers[name], module, ctx.target, {name: format_.name}
        )  # fmt: skip

    rows = [
        [[row(n, f) for n in names] for f in formats] for names, formats in zip(groups, offered, strict=True)
    ]
    field = {"bits": "payload_bits", "seconds": "decode_seconds", "bytes": "bytes"}[kind]
    costs = [[sum(getattr(r, field) for r in one) for one in formats] for formats in rows]
    whole = sum(max(c) for c in costs)
    return [
        [Price(c / whole, sum(r.payload_bits for r in one)) for c, one in zip(cs, formats, strict=True)]
        for cs, formats in zip(costs, rows, strict=True)
    ]
