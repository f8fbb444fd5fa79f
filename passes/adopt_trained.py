"""Take on formats and codes that training chose, in place of scoring and allocating.

    weight @up : f32[512,192] = sha256:aa {role = "block"}
->
    weight @up : f32[512,192] = sha256:aa {role = "block", format = "w3g64", candidates = {w3g64 = "…bb"},
        errors = {w3g64 = 0.0}}

What `quantize` then stores is the trained code, bit for bit: nothing is rounded again. But where a target
runs nf4g64 and not nf4g64-dq, the same codes are taken on with f16 scales, so that what is counted is what is
stored; `trained_as` keeps the name, and the module the digest of what was trained, which adapters ask for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gammac.budget import PAYLOAD, TRUE
from gammac.diagnostics import CompileError
from gammac.formats import Format, Quantized, in_plain_scales, with_plain_scales
from gammac.ir import Module, Weight
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.quantize import weights_have_formats
from gammac.passes.quantize_activations import Rounding, round_each
from gammac.passes.training.adapters import digest_of_base
from gammac.passes.training.trained import Trained, read_codes, read_trained
from gammac.pipeline import Context, Invariant
from gammac.targets.cost import module_cost


@dataclass(frozen=True)
class AdoptTrained:
    """`folder` is what `gammac finetune` wrote; `digest` that of its files, so that another training
    in the same place is another result. `compiler`: whether formats that need one can be had."""

    name: ClassVar[str] = "adopt_trained"
    reads: ClassVar[tuple[str, ...]] = ("target", "budget")
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates, weights_have_formats)
    folder: str = ""
    digest: str = ""
    compiler: bool = True

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError for a folder of another model, a format that the target does not run, or a
        budget below what was trained."""
        trained = read_trained(Path(self.folder))
        found = read_codes(Path(self.folder), trained, module)
        weights = [self._adopted(module.weights[n], q, ctx) for n, q in found.items()]
        module = module.with_weights(*weights)
        if any("trained_as" in w.attrs for w in weights):
            module = module.with_attrs(trained_base=digest_of_base(found))
        _demand_budget(module, ctx, trained)
        return module

    def _adopted(self, weight: Weight, found: Quantized, ctx: Context) -> Weight:
        if not self._runs(weight, found.format, ctx):
            plain = in_plain_scales(found.format)
            if plain is not None and self._runs(weight, plain, ctx):
                weight = weight.with_attrs(trained_as=found.format.name)
                found = with_plain_scales(found)
        name = found.format.name
        if not self._runs(weight, found.format, ctx):
            raise CompileError(
                f"{ctx.target.name} ({ctx.target.emitter}) does not run {name}"
                + ("" if self.compiler else " without a C++ compiler"),
                loc=weight.name,
                hint="train with --formats that it runs: gammac targets show lists them",
            )
        digest = ctx.store.put(found.parts)
        return weight.with_attrs(format=name, candidates={name: digest}, errors={name: 0.0})

    def _runs(self, weight: Weight, format_: Format, ctx: Context) -> bool:
        role, columns = str(weight.attrs["role"]), weight.type.shape[1]
        assert isinstance(columns, int)
        return ctx.target.kernel_for(format_, role, columns, compiler=self.compiler) is not None


def _demand_budget(module: Module, ctx: Context, trained: Trained) -> None:
    reached = module_cost(module, ctx.target)
    for budget in ctx.budgets:
        bits = {PAYLOAD: reached.payload_bits, TRUE: reached.true_bits}.get(budget.kind)
        if bits is None or bits > float(budget.exact) + 1e-6:
            have = (
                "trained weights are held to bits alone" if bits is None else f"it was trained at {bits:.4g}"
            )
            raise CompileError(
                f"budget {budget}: {have}", hint=f"leave --budget out: it is {trained.budget}, as trained"
            )


@dataclass(frozen=True)
class RoundTrainedInputs:
    """Round what linears read as they read it in training; options as in AdoptTrained."""

    name: ClassVar[str] = "round_trained_inputs"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    folder: str = ""
    digest: str = ""

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError for a module whose inputs are rounded already."""
        trained = read_trained(Path(self.folder))
        rounded = {n: Rounding(int(r["bits"]), r.get("scale")) for n, r in trained.activations.items()}
        return round_each(module, rounded)
