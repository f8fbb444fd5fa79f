"""What a compile lets its user choose about the passes, and which passes follow from it."""

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gammac.diagnostics import CompileError
from gammac.formats import (
    INTEGER,
    TWO_FOUR,
    Format,
    IntegerFormat,
    NOfEightFormat,
    TwoFourFormat,
    UnstructuredFormat,
    parse_format,
    parse_formats,
)
from gammac.passes.add_adapters import AddAdapters
from gammac.passes.adopt_trained import AdoptTrained, RoundTrainedInputs
from gammac.passes.allocate import QUALITY
from gammac.passes.awq import Awq
from gammac.passes.finetune import GUMBEL, LEARNABLE, SCALED, SIGN, LearnRounding
from gammac.passes.incoherence import Incoherence
from gammac.passes.options import options_of, parse_strategy
from gammac.passes.quantize import Quantize
from gammac.passes.quantize_activations import QuantizeActivations, parse_activations
from gammac.passes.quantizers import QUANTIZERS, Quip, make_quantizer
from gammac.passes.refine import Refine
from gammac.passes.sensitivity import STRATEGIES, Gamma
from gammac.passes.smooth_quant import SmoothQuant
from gammac.passes.sparsify import TRAINED_MASKS, Sparsify
from gammac.passes.training.adapters import ADAPTERS, read_adapters
from gammac.passes.training.trained import digest_of_trained, read_trained
from gammac.pipeline import Pass
from gammac.targets.target import NO_EMITTER

# strategies whose allocations are checked end to end and improved unless the user says no
REFINED: Final = frozenset({Gamma.name})

# a block's steps: mixtures are noisy, and need more
STEPS: Final = {SIGN: LearnRounding.steps, GUMBEL: 200}

# emitters that write fake_quantize, and the interpreter
RUN_ACTIVATIONS: Final = ("onnx", NO_EMITTER)

AUTO: Final = "auto"
# sparsity → the formats that a width and a group size of kept values stand for
SPARSITIES: Final[Mapping[str, Callable[[int, int], Sequence[Format]]]] = {
    "2:4": lambda width, group: (TwoFourFormat(width, group),),
    AUTO: lambda width, group: (TwoFourFormat(width, group),),
    "n:8": lambda width, group: [NOfEightFormat(width, group, kept) for kept in (2, 3, 4, 5, 6)],
    "unstructured": lambda width, group: [UnstructuredFormat(width, group, p) for p in range(30, 75, 5)],
}


@dataclass(frozen=True)
class Choices:
    """What a compile lets its user choose about the passes.

    `strategy` may have options, as in a pipeline, and `+refine`, with or without options, behind it.
    `refine` on or off holds where the strategy doesn't say it; by default only gamma is refined.
    `incoherence` is a kind of that pass, with or without options, or none; None: what the quantizer needs.
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
    awq_scales: bool | None = None  # by default with the quantizer awq
    smooth_quant: bool = False
    smooth_alpha: float = SmoothQuant.alpha
    activations: str = ""
    guided: bool = False
    incoherence: str | None = None
    objective: str = QUALITY
    learn_rounding: bool = False
    learn_by: str = SIGN
    distill: bool = False
    mask: str = ""  # a method that learns 2:4 masks block by block, with or without options
    trained: str = ""  # the folder of a finished training, whose formats and codes are taken as they are
    adapters: str = ""  # a file of adapters for a trained folder's codes, in place of its own


def with_sparsity(formats: str, sparsity: str) -> str:
    """Formats joined by `+` as `sparsity` has them: 2:4; auto, which is both dense ones and 2:4; n:8 and
    unstructured, several densities for an allocation to choose from.

    Each width of kept values stands for the same width of all. Raises CompileError for formats without a
    width, and for a sparsity that isn't there.
    """
    if sparsity not in SPARSITIES:
        raise CompileError(f"no sparsity {sparsity!r}", hint=f"there are {', '.join(SPARSITIES)}")
    dense = parse_formats(formats)
    integers = [f for f in dense if isinstance(f, IntegerFormat) and f.bits > 1]
    if len(integers) < len(dense):
        raise CompileError(
            f"--sparsity {sparsity} takes integer formats of 2 bits or more, not {formats.replace('+', ',')}",
            hint="leave out --formats, or name sparse formats there, such as s24w4g64 or u50w4g64",
        )
    names = dict.fromkeys(f.name for i in integers for f in SPARSITIES[sparsity](i.bits, i.group))
    return "+".join((*(f.name for f in dense), *names) if sparsity == AUTO else names)


def sparsify_of(choices: Choices) -> tuple[Sparsify, ...]:
    """The pass that learns masks, or nothing. Raises CompileError for wrong options, and for formats that
    would not keep the zeros."""
    if not choices.mask:
        return ()
    match = re.fullmatch(r"(\w+)(?:\{([^{}]*)\})?", choices.mask)
    if not match:
        raise CompileError(
            f"{choices.mask!r} is no mask", hint='write sparseforge or "sparseforge{steps=400}"'
        )
    name, options = match[1], match[2] or ""
    dense = [f.name for f in parse_formats(choices.block) if f.kind != TWO_FOUR]
    if dense:
        raise CompileError(
            f"{name} makes every block linear 2:4: {dense[0]} would not store its zeros",
            hint="--sparsity 2:4",
        )
    if name not in TRAINED_MASKS:
        raise CompileError(f"nothing learns masks by {name!r}", hint=f"there are {', '.join(TRAINED_MASKS)}")
    given = options_of(name, Sparsify, options.split(","))
    unread = given.keys() & {"method", *Sparsify.unread_by(name)}
    if unread:
        raise CompileError(f"{name} has no option {', '.join(sorted(unread))}", hint="leave it out")
    return (Sparsify(method=name, **given),)


def strategy_of(choices: Choices) -> Pass:
    """The strategy with its options. Raises CompileError for an unknown one, or for wrong options."""
    return parse_strategy(choices.strategy.partition("+")[0], STRATEGIES)


def refine_of(choices: Choices, extra_bytes: int = 0) -> tuple[Refine, ...]:
    """The step behind the allocation, or nothing. Raises CompileError for wrong options."""
    _, plus, said = choices.strategy.partition("+")
    wanted = choices.refine if choices.refine is not None else strategy_of(choices).name in REFINED
    if choices.objective != QUALITY:
        if plus or choices.refine:
            raise CompileError(
                f"refine improves quality, the objective is {choices.objective}", hint="leave out one of them"
            )
        return ()
    if not plus and not wanted:
        return ()
    text = said if plus else Refine.name
    refine = parse_strategy(text, {Refine.name: Refine}, "step behind the allocation")
    assert isinstance(refine, Refine)
    return (replace(refine, budget="", tie=choices.tie, extra_bytes=extra_bytes),)


def check_choices(choices: Choices) -> None:
    """Raises CompileError for choices that don't go together, and for formats that nobody writes."""
    if (choices.learn_rounding or choices.distill) and choices.inputs != "full":
        raise CompileError(
            "what is learnt starts from the candidates, which have full-precision inputs",
            hint="leave out --inputs quantized: learning reads what quantized blocks put out anyway",
        )
    if choices.guided and choices.inputs != "full":
        raise CompileError(
            "gradients are those of the full-precision model: guided needs its inputs",
            hint="leave out --inputs quantized or --guided",
        )
    sparse = [f.name for f in parse_formats(choices.block) if f.density < 1]
    if sparse and (choices.rotate or choices.incoherence not in (None, "none")):
        raise CompileError(
            f"rotated weights lose their zeros and prune worse: not with {', '.join(sparse)}",
            hint="leave out --rotate and --incoherence, or sparse formats",
        )
    tables = [f.name for f in parse_formats(choices.table) if f.density < 1]
    if tables:
        raise CompileError(
            f"embedding and head stay dense: not {', '.join(tables)}", hint="--table-formats w8g64"
        )
    widths, strategy = {f.bits for f in parse_formats(choices.block)}, strategy_of(choices)
    if isinstance(strategy, Gamma) and len(widths) > 1:
        strategy.check_target(min(widths), max(widths))
    _check_kinds(choices)


def _check_kinds(choices: Choices) -> None:
    formats, kinds = parse_formats(choices.block), make_quantizer(choices.quantizer).kinds
    foreign = [f for f in formats if f.kind not in kinds]
    # tables in a kind that the quantizer doesn't write are rounded, which takes a grid
    foreign += [f for f in parse_formats(choices.table) if f.kind not in (*kinds, INTEGER)]
    if foreign:
        able = [name for name, q in QUANTIZERS.items() if foreign[0].kind in q.kinds]
        raise CompileError(
            f"{choices.quantizer} does not write {', '.join(f.name for f in foreign)}",
            hint=f"--quantizer {' or '.join(able)} does",
        )
    if choices.learn_rounding:
        _demand(f"learn_rounding by {choices.learn_by}", "codes", formats, LEARNABLE[choices.learn_by])
    if choices.distill:
        _demand("distill", "scales", formats, SCALED)


def _demand(learner: str, what: str, formats: Sequence[Format], kinds: Collection[str]) -> None:
    fixed = [f.name for f in formats if f.kind not in kinds]
    if fixed:
        raise CompileError(
            f"{learner} does not learn {', '.join(fixed)}",
            hint=f"it learns {what} of {' and '.join(sorted(kinds))} formats",
        )


def learn_rounding_of(choices: Choices) -> tuple[LearnRounding, ...]:
    """The pass that learns codes, or nothing."""
    if not choices.learn_rounding:
        return ()
    return (LearnRounding(by=choices.learn_by, steps=STEPS[choices.learn_by]),)


def incoherence_of(choices: Choices) -> tuple[Incoherence, ...]:
    """The pass that makes weights incoherent, or nothing. Raises CompileError for wrong options."""
    quip = choices.quantizer.partition(":")[0] == Quip.name
    wanted = choices.incoherence or ("kronecker" if quip else "none")
    if wanted == "none":
        return ()
    kind, *options = wanted.split(":")
    if choices.rotate:
        raise CompileError(
            "rotate and incoherence both turn the weights, each in its own way",
            hint="leave out --rotate, or write --incoherence none and another --quantizer than quip",
        )
    found = Incoherence(**{"kind": kind, **options_of("incoherence", Incoherence, options)})
    if found.rescale and not make_quantizer(choices.quantizer).needs_gram:
        raise CompileError(
            f"rescale needs the Gram matrices, which {choices.quantizer} does without",
            hint="leave it out, or quantize with gptq or quip",
        )
    return (found,)


def awq_of(choices: Choices) -> tuple[Awq, ...]:
    """AWQ's scales for the narrowest grid that a linear may get, or nothing.

    Raises CompileError where no format is a grid.
    """
    own = choices.quantizer.partition(":")[0] == Awq.name
    wanted = own if choices.awq_scales is None else choices.awq_scales
    if not wanted:
        return ()
    grids = [f for f in parse_formats(choices.block) if f.kind == INTEGER]
    if not grids:
        raise CompileError("awq scales for integer codes", hint="leave out --awq-scales, or choose w3g64")
    return (Awq(min(grids).name, keep_qk_range=own),)


def activations_of(choices: Choices, emitter: str, compiler: bool) -> tuple[QuantizeActivations, ...]:
    """The pass that rounds what linears read, or nothing. Raises CompileError where no kernel runs it."""
    if not choices.activations:
        return ()
    format_ = parse_activations(choices.activations)
    demand_activations(format_.bits, parse_formats(choices.block), emitter, compiler)
    return (QuantizeActivations(choices.activations),)


def demand_activations(bits: int, formats: Sequence[Format], emitter: str, compiler: bool) -> None:
    """Raises CompileError where no kernel multiplies activations of so many bits by weights in `formats`."""
    if emitter not in RUN_ACTIVATIONS:
        raise CompileError(
            f"the emitter {emitter} runs no activations of {bits} bits",
            hint="onnx does; or leave out --activations",
        )
    integers = compiler and all(isinstance(f, IntegerFormat) and f.symmetric and not f.group for f in formats)
    if bits < 8 and not integers:
        raise CompileError(
            f"activations of {bits} bits are multiplied by weights with one scale a row alone",
            hint=f"w{bits}channel-sym is such a format" + ("" if compiler else "; it takes a C++ compiler"),
        )


def adopted_of(choices: Choices, emitter: str, compiler: bool) -> tuple[Pass, ...]:
    """What stands between capture and emission for a trained folder.

    Raises CompileError where the emitter does not run what was trained.
    """
    trained, digest = read_trained(Path(choices.trained)), digest_of_trained(Path(choices.trained))
    for name, how in trained.activations.items():
        demand_activations(int(how["bits"]), [parse_format(trained.formats[name])], emitter, compiler)
    rounded = (RoundTrainedInputs(choices.trained, digest),) if trained.activations else ()
    beside = adapters_of(choices)
    return (AdoptTrained(choices.trained, digest, compiler), Quantize(), *rounded, *beside)


def adapters_of(choices: Choices) -> tuple[AddAdapters, ...]:
    """The pass that adds the adapters of a trained folder, or others of the same base; or nothing.

    Raises CompileError for a file that holds none.
    """
    if not choices.trained:
        return ()
    file = Path(choices.adapters) if choices.adapters else Path(choices.trained) / ADAPTERS
    if not choices.adapters and not file.is_file():
        return ()
    read_adapters(file)
    return (AddAdapters(str(file), hashlib.sha256(file.read_bytes()).hexdigest()),)
