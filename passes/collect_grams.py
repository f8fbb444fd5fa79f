"""Run calibration text through the model and keep, for each linear, the Gram matrix of its inputs.

    weight @model.layers.0.mlp.up_proj.weight : f32[512,192] = sha256:… {role = "block"}
->
    weight @model.layers.0.mlp.up_proj.weight : f32[512,192] = sha256:… {role = "block", gram = "sha256:…"}

The matrix is the mean of x xᵀ over all calibration tokens, f32 [inputs, inputs], with the inputs of
the full-precision model. Linears that read the same value share one matrix.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from gammac.cache import key_of
from gammac.calibration import Segment, SegmentWeights, Stream, run_segment
from gammac.diagnostics import CompileError, Diagnostic
from gammac.ir import Module, Op, Operand, WeightRef, to_text
from gammac.pipeline import Context, Invariant


def weights_have_grams(module: Module) -> Iterator[Diagnostic]:
    """Every weight with a role that a linear reads has a Gram matrix."""
    read = {op.weight() for f in module.functions.values() for op in f.ops if op.name == "linear"}
    for ref in read:
        weight = module.weights[ref.name] if ref else None
        if weight and "role" in weight.attrs and not weight.attrs.keys() & {"gram", "stored"}:
            yield Diagnostic("has no Gram matrix", weight.name, "run collect_grams first")


@dataclass(frozen=True)
class CollectGrams:
    """See the module's text."""

    name: ClassVar[str] = "collect_grams"
    reads: ClassVar[tuple[str, ...]] = ("calibration",)
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_grams,)

    def run(self, module: Module, ctx: Context) -> Module:
        """Each finished block is remembered: a killed run goes on behind it."""
        if ctx.calibration is None:
            raise CompileError("collect_grams needs calibration text", hint="give --calibration FILE")
        key = key_of(to_text(module), ctx.calibration.digest, self.name)
        folder = None if ctx.cache.folder is None else ctx.cache.folder / "streams" / key
        with _claimed(folder) if folder is not None else nullcontext():
            stream = Stream(module.functions["forward"], ctx.calibration.tokens, folder)
            grams = _collect(module, ctx, stream, key)
        if folder is not None:
            _remove(folder)
        weights = [module.weights[name].with_attrs(gram=digest) for name, digest in grams.items()]
        return module.with_weights(*weights)


def _collect(module: Module, ctx: Context, stream: Stream, key: str) -> dict[str, str]:
    """Weight name → digest of its Gram matrix."""
    _restore(module, ctx, stream, key)
    grams: dict[str, str] = {}
    for index in ctx.progress(range(len(stream.segments)), "calibrating"):

        def compute(index: int = index) -> dict[str, str]:
            sums = GramSums(module)
            # the state that this segment read stays until the next one is through: a killed run needs it
            run_segment(module, stream, ctx.store, sums.visit, index, forget=False)
            if index:
                stream.forget(index - 1)
            return sums.put_all(ctx)

        grams.update(ctx.cache.record(key_of(key, str(index)), compute))
    return grams


def _restore(module: Module, ctx: Context, stream: Stream, key: str) -> None:
    """Have ready what the first unfinished segment reads: as a killed run left it, or made again."""
    keys = [key_of(key, str(index)) for index in range(len(stream.segments))]
    unfinished = next((i for i, k in enumerate(keys) if not ctx.cache.has_record(k)), None)
    if unfinished is None or stream.has(unfinished):
        return
    stream.start()
    for index in range(unfinished):
        run_segment(module, stream, ctx.store, lambda *_: None, index)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder. Raises CompileError when one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "pid"
    holder = lock.read_text() if lock.exists() else ""
    if holder.isdigit() and int(holder) != os.getpid() and psutil.pid_exists(int(holder)):
        raise CompileError(
            f"process {holder} is calibrating the same model on the same text",
            hint="wait, or use another --cache",
        )
    lock.write_text(str(os.getpid()))
    yield


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


class GramSums:
    """Sums of x xᵀ for the linears of a segment, one for each distinct input."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.sums: dict[Operand, Tensor] = {}
        self.counts: dict[Operand, int] = {}
        self.readers: dict[str, Operand] = {}

    def visit(self, segment: Segment, weights: SegmentWeights, op: Op, tensors: list[Tensor]) -> None:
        """Add one batch of one linear's input."""
        ref, value = op.weight(), op.operands[0]
        if (
            not isinstance(ref, WeightRef)
            or op.name != "linear"
            or "role" not in self.module.weights[ref.name].attrs
        ):
            return
        first = self.readers.setdefault(ref.name, value) is value and self._owner(value) == ref.name
        if not first:
            return
        x = tensors[0].flatten(0, -2).float()
        if value not in self.sums:
            self.sums[value] = torch.zeros(x.shape[1], x.shape[1])
            self.counts[value] = 0
        self.sums[value].addmm_(x.t(), x)
        self.counts[value] += len(x)

    def _owner(self, value: Operand) -> str:
        return next(name for name, v in self.readers.items() if v is value)

    def mean(self, weight: str) -> Tensor:
        """The Gram matrix of a weight's input."""
        value = self.readers[weight]
        return self.sums[value] / self.counts[value]

    def put_all(self, ctx: Context) -> dict[str, str]:
        """Store every matrix; weight name → digest."""
        digests = {value: ctx.store.put({"data": s / self.counts[value]}) for value, s in self.sums.items()}
        return {name: digests[value] for name, value in self.readers.items()}
