"""Quantize each weight once in every format that it may get, with the quantizer to be deployed.

    weight @up : f32[512,192] = sha256:… {role = "block", gram = "sha256:…"}
->
    weight @up : f32[512,192] = sha256:… {role = "block", gram = "sha256:…",
        candidates = {w2g64 = "sha256:…", w4g64 = "sha256:…"}, errors = {w2g64 = 0.061, w4g64 = 0.0029}}

`errors` are relative output errors tr(Δ G Δᵀ) / tr(W G Wᵀ). Scores are computed from candidates and
the artifact is made of them, so another budget quantizes nothing again. Weights that read the same
input are stacked and share one sweep; memory holds one such stack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gammac.cache import key_of
from gammac.diagnostics import CompileError, Diagnostic
from gammac.formats import Format, parse_formats
from gammac.ir import Module, Weight
from gammac.passes.quantizers import Quantizer, for_tables, make_quantizer, output_error
from gammac.pipeline import Context, Invariant


def weights_have_candidates(module: Module) -> Iterator[Diagnostic]:
    """Every weight with a role has been quantized in some formats."""
    for weight in module.weights.values():
        if "role" in weight.attrs and not weight.attrs.keys() & {"candidates", "stored"}:
            yield Diagnostic("has no candidates", weight.name, "run candidates first")


@dataclass(frozen=True)
class Candidates:
    """Formats are joined by `+`; `block` is for the linears of the blocks, `table` for embedding and
    head. `compiler` false leaves out what needs a C++ compiler to run."""

    name: ClassVar[str] = "candidates"
    reads: ClassVar[tuple[str, ...]] = ("target",)
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    block: str = "w2g64+w3g64+w4g64+w8g64"
    table: str = "w4g64+w8g64"
    quantizer: str = "gptq"
    clip: str = "mse"
    act_order: bool = True
    damping: float = 0.01
    compiler: bool = True

    def run(self, module: Module, ctx: Context) -> Module:
        """Each finished stack is remembered: a killed run goes on behind it."""
        quantizer = make_quantizer(
            self.quantizer, clip=self.clip, act_order=self.act_order, damping=self.damping
        )
        stacks = list(_stacks(module, quantizer, parse_formats(self.block)).values())
        found: dict[str, dict[str, Any]] = {}
        for stack in ctx.progress(stacks, f"quantizing ({self.quantizer})"):
            formats = self.formats_for(stack[0], ctx)
            names = "+".join(f.name for f in formats)
            key = key_of(
                self.name, repr(quantizer_for(stack[0], quantizer)), names,
                *(w.digest for w in stack), _gram_digest(stack[0]),
            )  # fmt: skip

            def compute(stack: list[Weight] = stack, formats: tuple[Format, ...] = formats) -> dict[str, Any]:
                return quantize_stack(stack, formats, quantizer, ctx)

            found.update(ctx.cache.record(key, compute, ctx.store))
        return module.with_weights(
            *(
                module.weights[n].with_attrs(candidates=r["candidates"], errors=r["errors"])
                for n, r in found.items()
            )
        )

    def formats_for(self, weight: Weight, ctx: Context) -> tuple[Format, ...]:
        """The formats asked for, each fitted to the weight's width and to the target's kernels.

        Raises CompileError naming the weight when the target runs none of them.
        """
        role = str(weight.attrs["role"])
        rows, columns = weight.type.shape
        assert isinstance(rows, int) and isinstance(columns, int)
        wished = parse_formats(self.block if role == "block" else self.table)
        fitted = [ctx.target.fit(f, role, columns, rows=rows, compiler=self.compiler) for f in wished]
        usable = tuple(dict.fromkeys(f for f in fitted if f is not None))
        if not usable:
            raise CompileError(
                f"{ctx.target.name} runs none of {', '.join(f.name for f in wished)} at {rows} rows of "
                f"{columns} inputs",
                loc=weight.name,
                hint="gammac targets show lists what it runs",
            )
        return usable


def _stacks(module: Module, quantizer: Quantizer, formats: Sequence[Format]) -> dict[str, list[Weight]]:
    """Weights that read the same input and are clipped alike; others stand alone."""
    stacks: dict[str, list[Weight]] = {}
    stackable = quantizer.stacks and all(f.by_rows for f in formats)
    for weight in module.weights.values():
        if "role" in weight.attrs:
            alone = weight.attrs["role"] == "table" or "gram" not in weight.attrs or not stackable
            key = f"{weight.attrs.get('gram')} {weight.attrs.get('clip', '')}"
            stacks.setdefault(weight.name if alone else key, []).append(weight)
    return stacks


def _gram_digest(weight: Weight) -> str:
    return str(weight.attrs.get("gram", "none"))


def gram_of(weight: Weight, ctx: Context) -> Tensor | None:
    """The Gram matrix of a weight's input, if one was collected."""
    return ctx.store.tensor(_gram_digest(weight)) if "gram" in weight.attrs else None


def quantizer_for(weight: Weight, quantizer: Quantizer) -> Quantizer:
    """The quantizer as a weight wants it: what the weight's own `clip` says stands over the option."""
    clip, fields = weight.attrs.get("clip"), getattr(quantizer, "__dataclass_fields__", {})
    return replace(quantizer, clip=clip) if clip and "clip" in fields else quantizer  # type: ignore[type-var]


def quantize_stack(
    stack: list[Weight],
    formats: tuple[Format, ...],
    quantizer: Quantizer,
    ctx: Context,
    gram: Tensor | None = None,
) -> dict[str, Any]:
    """Weight name → digests and errors by format."""
    floats = [ctx.store.tensor(w.digest) for w in stack]
    gram = gram_of(stack[0], ctx) if gram is None else gram
    quantizer = quantizer_for(stack[0], quantizer)
    if stack[0].attrs["role"] == "table":
        quantizer = for_tables(quantizer, formats)
    if gram is None and quantizer.needs_gram:
        foreign = [f.name for f in formats if f.kind not in make_quantizer("rtn").kinds]
        if foreign:
            raise CompileError(
                f"no linear reads it, so that nothing says what {foreign[0]} loses", loc=stack[0].name,
                hint="--table-formats w8g64",
            )  # fmt: skip
        quantizer = make_quantizer("rtn")  # an embedding that no linear reads has no inputs to weigh
    results = quantizer.quantize(torch.cat(floats), gram, formats)
    found: dict[str, Any] = {w.name: {"candidates": {}, "errors": {}} for w in stack}
    for format_, whole in zip(formats, results, strict=True):
        start = 0
        for weight, values in zip(stack, floats, strict=True):
            part = whole if len(stack) == 1 else whole.rows(start, start + len(values))
            start += len(values)
            found[weight.name]["candidates"][format_.name] = ctx.store.put(part.parts)
            error = output_error(values, part.dequantize(), gram)
            found[weight.name]["errors"][format_.name] = float(f"{error:.6g}")
    return found
