"""The passes, and the pipeline that `gammac compile` runs: the list to read first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gammac.diagnostics import CompileError
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.keep_precision import KeepPrecision
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.passes.options import parse_strategy
from gammac.passes.quantize import Quantize
from gammac.passes.quantizers import make_quantizer
from gammac.passes.raise_patterns import RaisePatterns
from gammac.passes.sensitivity import STRATEGIES
from gammac.passes.split_rows import SplitRows
from gammac.pipeline import Pass

_IN_ORDER: Final[tuple[type[Pass], ...]] = (
    FoldConstants, RaisePatterns, InsertKvCache, KeepPrecision, SplitRows, CollectGrams, Candidates,
    *STRATEGIES.values(), Allocate, Quantize, LegalizeOnnx,
)  # fmt: skip
PASSES: Final[Mapping[str, type[Pass]]] = {p.name: p for p in _IN_ORDER}

# emitter → the pass that brings a module into the form that it writes
LEGALIZERS: Final[Mapping[str, type[Pass]]] = {"onnx": LegalizeOnnx}


@dataclass(frozen=True)
class Choices:
    """What a compile lets its user choose about the passes. `strategy` may have options, as in a pipeline."""

    block: str = "w2g64+w3g64+w4g64+w8g64"
    table: str = "w4g64+w8g64"
    quantizer: str = "gptq"
    clip: str = "mse"
    act_order: bool = True
    damping: float = 0.01
    inputs: str = "full"
    strategy: str = "fisher"
    tie: bool | None = None


def strategy_of(choices: Choices) -> Pass:
    """The strategy with its options. Raises CompileError for an unknown one, or for wrong options."""
    return parse_strategy(choices.strategy, STRATEGIES)


def default_pipeline(
    choices: Choices, emitter: str, *, compiler: bool, extra_bytes: int = 0
) -> tuple[Pass, ...]:
    """Captured module in, module in the emitter's form out.

    `compiler`: whether a C++ compiler is at hand for the emitter's own kernels; without one, rows are
    split so that the widths of the stock kernels mix within a weight. Raises CompileError for an
    unknown strategy or emitter, or for options that the strategy lacks.
    """
    strategy = strategy_of(choices)
    if emitter not in LEGALIZERS:
        raise CompileError(f"no emitter {emitter!r}", hint=f"there are {', '.join(LEGALIZERS)}")
    how = (choices.quantizer, choices.clip, choices.act_order, choices.damping)
    needs_gram = make_quantizer(choices.quantizer).needs_gram
    return (
        # the program as a person would write it
        FoldConstants(),
        RaisePatterns(),
        InsertKvCache(),
        KeepPrecision(),
        *(() if compiler else (SplitRows(),)),
        # what each weight would lose in each format
        *((CollectGrams(),) if needs_gram else ()),
        Candidates(choices.block, choices.table, *how, compiler=compiler),
        strategy,
        # the choice, and its execution; everything above is the same for every budget
        Allocate(tie=choices.tie, extra_bytes=extra_bytes),
        Quantize(choices.inputs, *how),
        # the form that the emitter writes
        LEGALIZERS[emitter](),
    )
