"""How passes are run: check, run, show, verify, check. Everything else is an observer."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from gammac.budget import Budget
from gammac.cache import PassCache
from gammac.diagnostics import CompileError, Diagnostic
from gammac.ir import Module, verify
from gammac.progress import Progress, no_progress
from gammac.targets.target import Target
from gammac.texts import Calibration
from gammac.weights import WeightStore

Invariant = Callable[[Module], Iterator[Diagnostic]]


@dataclass(frozen=True)
class Context:
    """What a pass may look at besides the module. What it learns, it writes into the module."""

    target: Target
    store: WeightStore = field(default_factory=WeightStore)
    budgets: tuple[Budget, ...] = ()
    calibration: Calibration | None = None
    seed: int = 0
    progress: Progress = no_progress
    # finished pieces of long passes, so that a killed run goes on where it stopped
    cache: PassCache = field(default_factory=PassCache)

    def fingerprint(self, reads: Sequence[str]) -> str:
        """What of this context a cached result depends on."""
        parts = {
            "target": lambda: self.target.digest,
            "budget": lambda: ",".join(map(str, self.budgets)),
            "calibration": lambda: self.calibration.digest if self.calibration else "none",
            "seed": lambda: str(self.seed),
        }
        return ";".join(f"{name}={parts[name]()}" for name in sorted(reads))


@runtime_checkable
class Pass(Protocol):
    """A named step from module to module.

    A pass is a frozen dataclass: its fields are its options. It must not touch the module it is
    given. What it counts on, it says in `requires`; what it promises, in `ensures`; what must hold
    from here to the end, in `keeps` (may be left out); what of the context its result depends on, in
    `reads` (of target, budget, calibration, seed).
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    requires: ClassVar[tuple[Invariant, ...]]
    ensures: ClassVar[tuple[Invariant, ...]]

    def run(self, module: Module, ctx: Context) -> Module:
        """The new module."""
        ...


@dataclass(frozen=True)
class Step:
    """One pass that has run: what went in, what came out, how long it took."""

    index: int
    pass_: Pass
    before: Module
    after: Module
    seconds: float
    cached: bool


Observer = Callable[[Step], None]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order, watched by observers, which see a module before it is judged."""

    passes: tuple[Pass, ...]
    observers: tuple[Observer, ...] = ()

    def run(self, module: Module, ctx: Context) -> Module:
        """The module after the last pass. Raises CompileError when a promise is broken."""
        kept: list[Invariant] = []
        for index, pass_ in enumerate(self.passes):
            _check(pass_, "requires", pass_.requires, module)
            started = time.perf_counter()
            after, cached = ctx.cache.module_of(pass_, module, ctx)
            step = Step(index, pass_, module, after, time.perf_counter() - started, cached)
            for observe in self.observers:
                observe(step)
            kept += getattr(pass_, "keeps", ())
            _check(pass_, "ensures", (*pass_.ensures, *kept), after)
            module = after
        return module


def _check(pass_: Pass, clause: str, invariants: Sequence[Invariant], module: Module) -> None:
    found = verify(module) if clause == "ensures" else []
    found += [d for invariant in invariants for d in invariant(module)]
    if found:
        raise CompileError.from_diagnostics(f"{pass_.name}: what it {clause} does not hold", found)


def full_options_text(pass_: Pass) -> str:
    """All options with their values: what a cached result depends on."""
    fields: Any = dataclasses.fields(pass_)  # type: ignore[arg-type]
    return pass_.name + "{" + ",".join(f"{f.name}={getattr(pass_, f.name)!r}" for f in fields) + "}"
