"""The passes, and the pipeline that `gammac compile` runs: the list to read first."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from gammac.diagnostics import CompileError
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.collect_guided_grams import CollectGuidedGrams
from gammac.passes.finetune import LearnRounding
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.fold_norms import FoldNorms
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.keep_precision import KeepPrecision
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.passes.legalize_tvm import LegalizeTvm
from gammac.passes.options import parse_strategy
from gammac.passes.quantize import Quantize
from gammac.passes.quantizers import make_quantizer
from gammac.passes.raise_patterns import RaisePatterns
from gammac.passes.refine import Refine
from gammac.passes.rotate import Rotate
from gammac.passes.sensitivity import STRATEGIES, Gamma
from gammac.passes.split_rows import SplitRows
from gammac.pipeline import Pass

_IN_ORDER: Final[tuple[type[Pass], ...]] = (
    FoldConstants, RaisePatterns, FoldNorms, Rotate, InsertKvCache, KeepPrecision, SplitRows, CollectGrams,
    CollectGuidedGrams, Candidates, *STRATEGIES.values(), Allocate, Refine, LearnRounding, Quantize,
    LegalizeOnnx, LegalizeTvm,
)  # fmt: skip
PASSES: Final[Mapping[str, type[Pass]]] = {p.name: p for p in _IN_ORDER}

# strategies whose allocations are checked end to end and improved unless the user says no
REFINED: Final = frozenset({Gamma.name})

# emitter → the pass that brings a module into the form that it writes
LEGALIZERS: Final[Mapping[str, type[LegalizeOnnx | LegalizeTvm]]] = {"onnx": LegalizeOnnx, "tvm": LegalizeTvm}


@dataclass(frozen=True)
class Choices:
    """What a compile lets its user choose about the passes.

    `strategy` may have options, as in a pipeline, and `+refine`, with or without options, behind it.
    `refine` on or off holds where the strategy doesn't say it; by default only gamma is refined.
    """

    block: str = "w2g64+w3g64+w4g64+w8g64"
    table: str = "w4g64+w8g64"
    quantizer: str = "gptq"
    clip: str = "mse"
    act_order: bool = True
    damping: float = 0.01
    inputs: str = "full"
    strategy: str = "gamma"
    refine: bool | None = None
    tie: bool | None = None
    rotate: bool = False
    guided: bool = False
    learn_rounding: bool = False


def strategy_of(choices: Choices) -> Pass:
    """The strategy with its options. Raises CompileError for an unknown one, or for wrong options."""
    return parse_strategy(choices.strategy.partition("+")[0], STRATEGIES)


def refine_of(choices: Choices, extra_bytes: int = 0) -> tuple[Refine, ...]:
    """The step behind the allocation, or nothing. Raises CompileError for wrong options."""
    _, plus, said = choices.strategy.partition("+")
    wanted = choices.refine if choices.refine is not None else strategy_of(choices).name in REFINED
    if not plus and not wanted:
        return ()
    text = said if plus else Refine.name
    refine = parse_strategy(text, {Refine.name: Refine}, "step behind the allocation")
    assert isinstance(refine, Refine)
    return (replace(refine, budget="", tie=choices.tie, extra_bytes=extra_bytes),)


def default_pipeline(
    choices: Choices, emitter: str, *, compiler: bool, extra_bytes: int = 0, context: int = 0
) -> tuple[Pass, ...]:
    """Captured module in, module in the emitter's form out.

    `compiler`: whether the emitter's own kernels of every width can be had; without them, rows are split so
    that the widths of the stock kernels mix within a weight. `context`: the longest sequence to be run (0: as
    the emitter thinks fit). Raises CompileError for an
    unknown strategy or emitter, or for options that the strategy lacks.
    """
    strategy = strategy_of(choices)
    if emitter not in LEGALIZERS:
        raise CompileError(f"no emitter {emitter!r}", hint=f"there are {', '.join(LEGALIZERS)}")
    how = (choices.quantizer, choices.clip, choices.act_order, choices.damping)
    if choices.learn_rounding and choices.inputs != "full":
        raise CompileError(
            "learn_rounding starts from the candidates, which have full-precision inputs",
            hint="leave out --inputs quantized: learning reads what quantized blocks put out anyway",
        )
    collect = CollectGuidedGrams() if choices.guided else CollectGrams()
    if choices.guided and choices.inputs != "full":
        raise CompileError(
            "gradients are those of the full-precision model: guided needs its inputs",
            hint="leave out --inputs quantized or --guided",
        )
    needs_gram = make_quantizer(choices.quantizer).needs_gram
    return (
        # the program as a person would write it
        FoldConstants(),
        RaisePatterns(),
        # the same function with weights that are easier to quantize
        *((FoldNorms(), Rotate()) if choices.rotate else ()),
        InsertKvCache(),
        KeepPrecision(),
        *(() if compiler else (SplitRows(),)),
        # what each weight would lose in each format
        *((collect,) if needs_gram else ()),
        Candidates(choices.block, choices.table, *how, compiler=compiler),
        strategy,
        # the choice, and its execution; everything above is the same for every budget
        Allocate(tie=choices.tie, extra_bytes=extra_bytes),
        *refine_of(choices, extra_bytes),
        *((LearnRounding(),) if choices.learn_rounding else ()),
        Quantize(choices.inputs, *how),
        # the form that the emitter writes
        LEGALIZERS[emitter](context),
    )
