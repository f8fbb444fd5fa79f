"""Quantizers: how codes are chosen. What codes mean is a Format's business."""

from collections.abc import Sequence
from typing import ClassVar, Final, Protocol

from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import Format, Quantized
from gammac.passes.options import options_of
from gammac.passes.quantizers.awq import Awq
from gammac.passes.quantizers.billm import BiLlm
from gammac.passes.quantizers.db_llm import DbLlm
from gammac.passes.quantizers.gptq import Gptq
from gammac.passes.quantizers.icq import Icq
from gammac.passes.quantizers.nf import Nf
from gammac.passes.quantizers.pb_llm import PbLlm
from gammac.passes.quantizers.quip import Quip
from gammac.passes.quantizers.rtn import Rtn
from gammac.passes.quantizers.tcq import Tcq


class Quantizer(Protocol):
    """A way to choose codes for a weight."""

    name: ClassVar[str]
    needs_gram: ClassVar[bool]
    kinds: ClassVar[tuple[str, ...]]  # of formats that it writes
    stacks: ClassVar[bool]  # rows are independent: weights that read the same input may be stacked

    def quantize(self, weight: Tensor, gram: Tensor | None, formats: Sequence[Format]) -> list[Quantized]:
        """The weight f32 [rows, columns] in each of the formats.

        `gram` f32 [columns, columns] is the mean of x xᵀ over the weight's inputs.
        """
        ...


QUANTIZERS: Final[dict[str, type[Quantizer]]] = {
    q.name: q for q in (Rtn, Gptq, Awq, Quip, Nf, Icq, DbLlm, PbLlm, BiLlm, Tcq)
}


def make_quantizer(name: str, **options: object) -> Quantizer:
    """A quantizer by name, its own options behind colons: `quip:rho=2:greedy=5`.

    Of `options` those that it doesn't have are left out. Raises CompileError.
    """
    name, *own = name.split(":")
    if name not in QUANTIZERS:
        raise CompileError(f"no quantizer {name!r}", hint=f"there are {', '.join(QUANTIZERS)}")
    kind = QUANTIZERS[name]
    known = getattr(kind, "__dataclass_fields__", {})
    given = {k: v for k, v in options.items() if k in known}
    return kind(**given | options_of(f"quantizer {name}", kind, own))


def for_tables(quantizer: Quantizer, formats: Sequence[Format]) -> Quantizer:
    """What quantizes embedding and head in these formats where `quantizer` does the blocks."""
    if not {f.kind for f in formats} <= set(quantizer.kinds):
        return Rtn()
    if isinstance(quantizer, Quip):
        # nobody makes tables incoherent, and quip's range would cut off what stands out there
        return Gptq(act_order=quantizer.act_order, damping=quantizer.damping)
    return quantizer


def output_error(weight: Tensor, quantized: Tensor, gram: Tensor | None) -> float:
    """Relative output error tr(Δ G Δᵀ) / tr(W G Wᵀ); without a Gram matrix |Δ|² / |W|²."""
    delta = quantized - weight
    if gram is None:
        return float(delta.square().sum() / weight.square().sum().clamp(min=1e-30))
    lost = ((delta @ gram) * delta).sum().clamp(min=0)
    return float(lost / ((weight @ gram) * weight).sum().clamp(min=1e-30))


__all__ = [
    "QUANTIZERS",
    "Awq",
    "BiLlm",
    "DbLlm",
    "Gptq",
    "Icq",
    "Nf",
    "PbLlm",
    "Quantizer",
    "Quip",
    "Rtn",
    "Tcq",
    "for_tables",
    "make_quantizer",
    "output_error",
]
