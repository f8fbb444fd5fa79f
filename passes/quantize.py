"""Replace each weight's floats by codes in the format that it was given.

    weight @up : f32[512,192] = sha256:aa {role = "block", format = "w3g64", candidates = {…}}
->
    weight @up : f32[512,192] = sha256:bb {role = "block", format = "w3g64", stored = "w3g64"}

With `inputs=full` the candidates that were scored are taken as they are. With `inputs=quantized`
each block is quantized against what the already quantized blocks before it really put out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from gammac.calibration import Stream, run_segment
from gammac.diagnostics import CompileError, Diagnostic
from gammac.formats import Format, parse_format
from gammac.ir import Attr, Module, Weight
from gammac.passes.candidates import quantize_stack
from gammac.passes.collect_grams import GramSums
from gammac.passes.quantizers import Quantizer, make_quantizer
from gammac.pipeline import Context, Invariant

DONE_WITH = ("candidates", "errors", "gram")


def weights_have_formats(module: Module) -> Iterator[Diagnostic]:
    """Every weight with a role was given a format."""
    for weight in module.weights.values():
        if "role" in weight.attrs and not weight.attrs.keys() & {"format", "stored"}:
            yield Diagnostic("has no format", weight.name, "run allocate first")


def weights_are_stored_in_their_formats(module: Module) -> Iterator[Diagnostic]:
    """The bytes of every weight with a format are codes in that format."""
    for weight in module.weights.values():
        if weight.attrs.get("format") != weight.attrs.get("stored"):
            yield Diagnostic("is not quantized", weight.name, "run quantize")


@dataclass(frozen=True)
class Quantize:
    """`inputs`: full or quantized. The other options matter only for weights quantized here."""

    name: ClassVar[str] = "quantize"
    reads: ClassVar[tuple[str, ...]] = ("calibration",)
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_formats,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_are_stored_in_their_formats,)
    inputs: str = "full"
    quantizer: str = "gptq"
    clip: str = "mse"
    act_order: bool = True
    damping: float = 0.01

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError for an unknown `inputs` or `quantizer`."""
        quantizer = make_quantizer(
            self.quantizer, clip=self.clip, act_order=self.act_order, damping=self.damping
        )
        if self.inputs not in ("full", "quantized"):
            raise CompileError(f"inputs={self.inputs!r}", hint="inputs is full or quantized")
        if self.inputs == "quantized" and quantizer.needs_gram:
            module = _quantize_in_order(module, quantizer, ctx)
        return _quantize_rest(module, quantizer, ctx)


def _quantize_rest(module: Module, quantizer: Quantizer, ctx: Context) -> Module:
    todo = [w for w in module.weights.values() if "format" in w.attrs and "stored" not in w.attrs]
    for weight in ctx.progress(todo, "storing codes"):
        module = module.with_weights(_from_candidate(weight) or _quantized(weight, quantizer, ctx))
    return module


def _from_candidate(weight: Weight) -> Weight | None:
    candidates, errors, name = (weight.attrs.get(k) for k in ("candidates", "errors", "format"))
    if not isinstance(candidates, dict) or name not in candidates:
        return None
    error = errors[name] if isinstance(errors, dict) else 0.0
    return stored_as(weight, str(name), str(candidates[name]), error)


def _quantized(weight: Weight, quantizer: Quantizer, ctx: Context, sums: GramSums | None = None) -> Weight:
    format_: Format = parse_format(str(weight.attrs["format"]))
    gram = sums.mean(weight.name) if sums else None
    found = quantize_stack([weight], (format_,), quantizer, ctx, gram)[weight.name]
    return stored_as(weight, format_.name, found["candidates"][format_.name], found["errors"][format_.name])


def stored_as(weight: Weight, format_: str, digest: str, error: Attr) -> Weight:
    """The weight with its bytes replaced by codes."""
    attrs = {k: v for k, v in weight.attrs.items() if k not in DONE_WITH}
    return replace(weight, digest=digest, attrs={**attrs, "stored": format_, "measured_error": error})


def _quantize_in_order(module: Module, quantizer: Quantizer, ctx: Context) -> Module:
    """Block by block: measure the inputs behind the quantized blocks, quantize, run on."""
    if ctx.calibration is None:
        raise CompileError("inputs=quantized needs calibration text", hint="give --calibration FILE")
    stream = Stream(module.functions["forward"], ctx.calibration.tokens)
    stream.start()
    for index in ctx.progress(range(len(stream.segments)), "quantizing on quantized inputs"):
        sums = GramSums(module)
        run_segment(module, stream, ctx.store, sums.visit, index, forget=False)
        for name in sums.readers:
            module = module.with_weights(_quantized(module.weights[name], quantizer, ctx, sums))
        # once more with the quantized weights, for the block that follows
        run_segment(module, stream, ctx.store, lambda *_: None, index)
    return module
