"""Gram matrices in which a token counts by how much the loss depends on what a linear makes of it.

    weight @model.layers.0.mlp.up_proj.weight : f32[512,192] = sha256:… {role = "block"}
->
    weight @model.layers.0.mlp.up_proj.weight : f32[512,192] = sha256:… {role = "block", gram = "sha256:…"}

The matrix is Σ_t γ_t x_t x_tᵀ / Σ_t γ_t with γ_t the mean over the outputs of (∂L/∂y_t)², L the next-token
cross entropy: the second-order expansion of the end-to-end loss where `collect_grams` has that of the
layer's own output (GuidedQuant, arXiv 2505.07004, section 3, with one group of output channels). Linears
that read the same value share one matrix: the sum of theirs.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gammac.calibration import LinearGradient, Stream, backward_segments, run_up_to_last
from gammac.ir import Module, Operand
from gammac.passes.collect_grams import weights_have_grams
from gammac.passes.sensitivity.scores import scoring_tokens
from gammac.pipeline import Context, Invariant


@dataclass(frozen=True)
class CollectGuidedGrams:
    """All calibration windows are used; the states of all blocks lie on disk meanwhile."""

    name: ClassVar[str] = "collect_guided_grams"
    reads: ClassVar[tuple[str, ...]] = ("calibration",)
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_grams,)

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError without calibration text, or for an encoder, which has no next token."""
        windows = len(ctx.calibration.tokens) if ctx.calibration else 0
        tokens = scoring_tokens(self.name, windows, module, ctx)
        stream = Stream(module.functions["forward"], tokens)
        run_up_to_last(module, stream, ctx.store, ctx.progress, "calibrating (forward)")
        digests: dict[str, str] = {}
        for _, _, gradients in backward_segments(
            module, stream, ctx.store, ctx.progress, "calibrating (backward)"
        ):
            sums = _GuidedSums(module)
            for gradient in gradients:
                sums.add(gradient)
            digests |= sums.put_all(ctx)
        return module.with_weights(*(module.weights[n].with_attrs(gram=d) for n, d in digests.items()))


@dataclass
class _GuidedSums:
    """Sums for the linears of a segment, one for each distinct input."""

    module: Module
    sums: dict[Operand, Tensor] = field(default_factory=dict)
    weighed: dict[Operand, float] = field(default_factory=dict)
    readers: dict[str, Operand] = field(default_factory=dict)

    def add(self, gradient: LinearGradient) -> None:
        """One linear in one batch."""
        ref, value = gradient.op.weight(), gradient.op.operands[0]
        assert ref is not None
        if gradient.op.name != "linear" or "role" not in self.module.weights[ref.name].attrs:
            return
        if self.readers.setdefault(ref.name, value) is not value:
            return
        weight = gradient.gradient.flatten(0, -2).square().mean(-1)
        x = gradient.input.flatten(0, -2) * weight.sqrt()[:, None]
        if value not in self.sums:
            self.sums[value] = torch.zeros(x.shape[1], x.shape[1])
            self.weighed[value] = 0.0
        self.sums[value].addmm_(x.T, x)
        self.weighed[value] += float(weight.double().sum())

    def put_all(self, ctx: Context) -> dict[str, str]:
        """Store every matrix; weight name → digest."""
        digests = {v: ctx.store.put({"data": s / max(self.weighed[v], 1e-30)}) for v, s in self.sums.items()}
        return {name: digests[value] for name, value in self.readers.items()}
