"""What a user chooses about low-rank adapters on a quantized base."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.formats import Format, IntegerFormat, in_plain_scales, parse_formats
from gammac.ir import Module
from gammac.passes.choices import Choices, check_choices
from gammac.passes.quantizers import QUANTIZERS
from gammac.passes.sensitivity.scores import check_range
from gammac.targets.target import ANY, BLOCK, Target

QLORA: Final = "qlora"
IR_QLORA: Final = "ir-qlora"
# method → the format of its paper's base
BASES: Final = {QLORA: "nf4g64-dq", IR_QLORA: "nf4g64-icq"}
# QLoRA's: gradients are cut, the rate rises for a few steps and stays
SCHEDULE: Final[Mapping[str, Any]] = {"clip_norm": 0.3, "warmup": 0.03, "floor": 1.0}


@dataclass(frozen=True)
class LoraOptions:
    """`format` of the frozen blocks' linears (empty: the method's own), of embedding and head `table`;
    `quantizer` chooses their codes (empty: the first that writes the format). `rank` and `alpha` as in LoRA,
    Δ = alpha / rank · B A; `dropout` of what A reads. `merge` adds Δ to the weights and quantizes again, in
    `merge_format` (empty: the base's, or as many bits in integers where the target lacks it).

    QLoRA has a rank of 64 for widths of 4096 and more; here 8 is 0.5 to 4 % of a layer. Its α/rank is ¼ and
    its dropout 0.1, over 10 000 steps; a few hundred want α/rank of 2 and none.
    """

    method: str = QLORA
    format: str = ""
    table: str = "w8g64"
    quantizer: str = ""
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    merge: bool = False
    merge_format: str = ""

    def __post_init__(self) -> None:
        """Raises CompileError for options that make no sense."""
        if self.method not in BASES:
            raise CompileError(f"no method {self.method!r}", hint=f"there are {', '.join(BASES)}")
        for name, least, most in (("rank", 1, 4096), ("alpha", 0, 1e6), ("dropout", 0, 0.95)):
            check_range(self.method, name, getattr(self, name), least, most)
        if self.merge_format and not self.merge:
            raise CompileError("--merge-format without --merge", hint="add --merge")
        for text in (self.format, self.merge_format):
            if len(parse_formats(text)) > 1:
                raise CompileError(
                    f"{self.method} has one format for all blocks' linears, not {text.replace('+', ',')}",
                    hint=f"--formats {BASES[self.method]}, or w4g64",
                )
        check_choices(Choices(self.base.name, self.table, self.quantizer_for(self.base)))

    @property
    def connects(self) -> bool:
        """Whether adapters have IR-QLoRA's shortcuts."""
        return self.method == IR_QLORA

    @property
    def base(self) -> Format:
        """The format of the frozen weights."""
        return parse_formats(self.format or BASES[self.method])[0]

    def quantizer_for(self, format_: Format) -> str:
        """The quantizer asked for if it writes the format; else gptq for integers, for others their own."""
        able = [name for name, q in QUANTIZERS.items() if format_.kind in q.kinds]
        if self.quantizer and (format_ == self.base or self.quantizer.partition(":")[0] in able):
            return self.quantizer
        return "gptq" if isinstance(format_, IntegerFormat) else able[-1]

    def merged(self, target: Target, compiler: bool) -> Format:
        """The format of merged weights."""
        if self.merge_format:
            return parse_formats(self.merge_format)[0]
        if runs(self.base, target, compiler):
            return self.base
        return IntegerFormat(round(self.base.bits), self.base.group)


def demand_divisible(options: LoraOptions, module: Module) -> None:
    """Raises CompileError naming the weight [out, in] whose sizes the rank of shortcuts does not divide."""
    for name, weight in module.weights.items() if options.connects else ():
        if weight.attrs.get("role") == BLOCK and any(int(str(n)) % options.rank for n in weight.type.shape):
            raise CompileError(
                f"a rank of {options.rank} does not divide its sizes {list(weight.type.shape)}, as "
                f"{options.method}'s shortcuts need",
                loc=name,
                hint="another --rank, such as 4 or 8; or --method qlora, which takes any",
            )


def runs(format_: Format, target: Target, compiler: bool) -> bool:
    """Whether the target runs blocks' linears in a format, as it is."""
    return bool({format_.kind, ANY} & target.kinds(BLOCK, compiler=compiler))


def demand_lora(options: LoraOptions, target: Target, compiler: bool) -> None:
    """Raises CompileError for a format that the target's emitter will not run, not even with f16 scales."""
    format_ = options.merged(target, compiler) if options.merge else options.base
    plain = in_plain_scales(format_)
    if not runs(format_, target, compiler) and (plain is None or not runs(plain, target, compiler)):
        raise CompileError(
            f"{target.name} ({target.emitter}) does not run {format_.name} as block weights",
            hint="--merge quantizes the merged weights in a format that it runs; or --formats w4g64; or "
            "--target reference, which trains and measures without an artifact",
        )
