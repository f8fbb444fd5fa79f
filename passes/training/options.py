"""What a user chooses about DSA-QAT."""

from dataclasses import dataclass
from typing import Final

from gammac.diagnostics import CompileError
from gammac.formats import parse_formats
from gammac.passes.quantize_activations import parse_activations
from gammac.passes.sensitivity.scores import check_range
from gammac.passes.training.fake_quantize import TRAINABLE

CONTROLLERS: Final = ("bisection", "milp")
COSTS: Final = ("bits", "seconds", "bytes")
RTN, GPTQ = "rtn", "gptq"
STARTS: Final = (RTN, GPTQ)
AS_WEIGHTS: Final = "weights"  # for `activations`: as many bits as the weight that reads them


@dataclass(frozen=True)
class DsaQatOptions:
    """`formats` of the blocks' linears and the `table` format; `average_bits` is the budget in payload bits,
    kept at every step. α, β, κ weigh gradient variance, activation error and attention distortion; γ the
    penalty on noise. The controller looks every `every` steps, sensitivities are smoothed by `keep`, and
    widths are frozen for the last `freeze` of the steps. `cost`: what C_b counts. A `trade_off` of λ > 0
    takes the place of the bisection: λ then follows the loss, and the budget is a ceiling. `reverse` turns
    the ranking of layers around: an ablation. For `float_share` of the steps nothing is rounded; rounding
    then starts from the nearest codes, or from GPTQ's (`start`)."""

    average_bits: float = 4.0
    formats: str = "w2g64+w3g64+w4g64+w6g64+w8g64"
    table: str = "w8g64"
    activations: str = ""
    clip: str = "mse"
    controller: str = "bisection"
    cost: str = "bits"
    alpha: float = 0.5
    beta: float = 0.5
    kappa: float = 0.0
    gamma: float = 0.0
    every: int = 50
    keep: float = 0.9
    freeze: float = 0.2
    trade_off: float = 0.0
    reverse: bool = False
    float_share: float = 0.0
    start: str = RTN

    @property
    def weights(self) -> tuple[float, float, float]:
        """α, β and κ."""
        return self.alpha, self.beta, self.kappa

    def __post_init__(self) -> None:
        """Raises CompileError for options that make no sense."""
        for name, least, most in (
            ("average_bits", 1, 8), ("alpha", 0, 1e6), ("beta", 0, 1e6), ("kappa", 0, 1e6), ("gamma", 0, 1e6),
            ("trade_off", 0, 1e9), ("every", 1, 1e9), ("keep", 0, 1), ("freeze", 0, 1),
            ("float_share", 0, 0.99),
        ):  # fmt: skip
            check_range("dsa-qat", name, getattr(self, name), least, most)
        for option, known in (
            ("controller", CONTROLLERS),
            ("cost", COSTS),
            ("clip", ("mse", "none")),
            ("start", STARTS),
        ):
            if getattr(self, option) not in known:
                raise CompileError(
                    f"dsa-qat: no {option} {getattr(self, option)!r}", hint=f"there are {', '.join(known)}"
                )
        foreign = [f.name for f in parse_formats(f"{self.formats}+{self.table}") if f.kind not in TRAINABLE]
        if foreign:
            raise CompileError(
                f"dsa-qat does not train {', '.join(foreign)}", hint="integer and nf formats, such as w4g64"
            )
        if self.activations not in ("", AS_WEIGHTS):
            parse_activations(self.activations)
