"""The passes, and the pipeline that `gammac compile` runs: the list to read first."""

from collections.abc import Mapping
from typing import Final

from gammac.diagnostics import CompileError
from gammac.passes.add_adapters import AddAdapters
from gammac.passes.adopt_trained import AdoptTrained, RoundTrainedInputs
from gammac.passes.allocate import Allocate
from gammac.passes.awq import Awq
from gammac.passes.candidates import Candidates
from gammac.passes.choices import (
    Choices,
    activations_of,
    adopted_of,
    awq_of,
    check_choices,
    incoherence_of,
    learn_rounding_of,
    refine_of,
    sparsify_of,
    strategy_of,
)
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.collect_guided_grams import CollectGuidedGrams
from gammac.passes.finetune import Distill, LearnRounding
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.fold_norms import FoldNorms
from gammac.passes.incoherence import Incoherence
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.keep_precision import KeepPrecision
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.passes.legalize_tvm import LegalizeTvm
from gammac.passes.quantize import Quantize
from gammac.passes.quantize_activations import QuantizeActivations
from gammac.passes.quantizers import make_quantizer
from gammac.passes.raise_patterns import RaisePatterns
from gammac.passes.refine import Refine
from gammac.passes.rotate import Rotate
from gammac.passes.sensitivity import STRATEGIES
from gammac.passes.smooth_quant import SmoothQuant
from gammac.passes.sparsify import Sparsify
from gammac.passes.split_rows import SplitRows
from gammac.pipeline import Pass
from gammac.targets.target import NO_EMITTER

_IN_ORDER: Final[tuple[type[Pass], ...]] = (
    FoldConstants, RaisePatterns, FoldNorms, Rotate, SmoothQuant, Awq, InsertKvCache, KeepPrecision,
    SplitRows, Sparsify, CollectGrams, CollectGuidedGrams, Incoherence, Candidates, *STRATEGIES.values(),
    Allocate, Refine, LearnRounding, Distill, AdoptTrained, Quantize, QuantizeActivations,
    RoundTrainedInputs, AddAdapters, LegalizeOnnx, LegalizeTvm,
)  # fmt: skip
PASSES: Final[Mapping[str, type[Pass]]] = {p.name: p for p in _IN_ORDER}

# emitter → the pass that brings a module into the form that it writes
LEGALIZERS: Final[Mapping[str, type[LegalizeOnnx | LegalizeTvm]]] = {"onnx": LegalizeOnnx, "tvm": LegalizeTvm}


def default_pipeline(
    choices: Choices, emitter: str, *, compiler: bool, extra_bytes: int = 0, context: int = 0
) -> tuple[Pass, ...]:
    """Captured module in, module in the emitter's form out.

    `compiler`: whether the emitter's own kernels of every width can be had; without them, rows are split so
    that the widths of the stock kernels mix within a weight. `context`: the longest sequence to be run (0: as
    the emitter thinks fit). Raises CompileError for an unknown strategy or emitter, or for options that the
    strategy lacks.
    """
    if choices.trained:
        return _trained_pipeline(choices, emitter, compiler=compiler, context=context)
    strategy = strategy_of(choices)
    if emitter not in (*LEGALIZERS, NO_EMITTER):
        raise CompileError(f"no emitter {emitter!r}", hint=f"there are {', '.join(LEGALIZERS)}")
    how = (choices.quantizer, choices.clip, choices.act_order, choices.damping)
    check_choices(choices)
    collect = CollectGuidedGrams() if choices.guided else CollectGrams()
    incoherence = incoherence_of(choices)
    needs_gram = make_quantizer(choices.quantizer).needs_gram
    return (
        # the program as a person would write it
        FoldConstants(),
        RaisePatterns(),
        # the same function with weights that are easier to quantize
        *((FoldNorms(), Rotate()) if choices.rotate else ()),
        *((SmoothQuant(choices.smooth_alpha),) if choices.smooth_quant else ()),
        *awq_of(choices),
        InsertKvCache(),
        KeepPrecision(),
        *(() if compiler or emitter == NO_EMITTER else (SplitRows(),)),
        *sparsify_of(choices),
        # what each weight would lose in each format
        *((collect,) if needs_gram else ()),
        *incoherence,
        Candidates(choices.block, choices.table, *how, compiler=compiler),
        strategy,
        # the choice, and its execution; everything above is the same for every budget
        Allocate(tie=choices.tie, extra_bytes=extra_bytes, objective=choices.objective),
        *refine_of(choices, extra_bytes),
        *learn_rounding_of(choices),
        *((Distill(),) if choices.distill else ()),
        Quantize(choices.inputs, *how),
        *activations_of(choices, emitter, compiler),
        # the form that the emitter writes
        *(() if emitter == NO_EMITTER else (LEGALIZERS[emitter](context),)),
    )


def _trained_pipeline(choices: Choices, emitter: str, *, compiler: bool, context: int) -> tuple[Pass, ...]:
    """The same for a trained folder: nothing is scored, allocated or rounded any more."""
    return (
        FoldConstants(),
        RaisePatterns(),
        InsertKvCache(),
        KeepPrecision(),
        *adopted_of(choices, emitter, compiler),
        *(() if emitter == NO_EMITTER else (LEGALIZERS[emitter](context),)),
    )


__all__ = [
    "LEGALIZERS",
    "PASSES",
    "STRATEGIES",
    "Choices",
    "default_pipeline",
    "incoherence_of",
    "learn_rounding_of",
    "refine_of",
    "sparsify_of",
    "strategy_of",
]
