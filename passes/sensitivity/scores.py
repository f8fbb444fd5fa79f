"""What strategies share: reading candidates and calibration text, and the invariant that scores are there."""

import math
from collections.abc import Iterator, Mapping
from typing import Final

from torch import Tensor

from gammac.diagnostics import CompileError, Diagnostic
from gammac.formats import candidates_of, load_candidate, load_float, parse_format
from gammac.ir import Module, Weight
from gammac.pipeline import Context

LONG_ROW: Final = 4096  # columns; to compare what formats store


def weights_have_scores(module: Module) -> Iterator[Diagnostic]:
    """Every weight with a role has a score in each of its candidate formats."""
    for weight in module.weights.values():
        if "role" in weight.attrs and not weight.attrs.keys() & {"scores", "stored"}:
            yield Diagnostic("has no scores", weight.name, "run a sensitivity pass first, for example fisher")


def candidate(weight: Weight, name: str, ctx: Context) -> Tensor:
    """W_b: what a candidate's codes stand for, f32 [rows, columns]."""
    return load_candidate(weight, name, ctx.store).dequantize()


def differences(weight: Weight, full: Tensor, ctx: Context) -> dict[str, Tensor]:
    """Format name → W_b − W for each candidate, f32 [rows, columns]; `full` is W."""
    return {name: candidate(weight, name, ctx) - full for name in candidates_of(weight)}


def squared_errors(weight: Weight, ctx: Context) -> dict[str, float]:
    """Format name → Σ (W_b − W)²."""
    original = load_float(weight, ctx.store)
    return {n: float((candidate(weight, n, ctx) - original).square().sum()) for n in candidates_of(weight)}


def grid_noise(weight: Weight, name: str) -> float:
    """What a format loses if nothing is known: n · 4^−bits. Halving the step of a grid quarters its error."""
    return float(weight.type.numel() * 4.0 ** -parse_format(name).bits)


def scoring_tokens(strategy: str, windows: int, module: Module, ctx: Context) -> Tensor:
    """Calibration windows, evenly spaced, i64 [windows, length], for a strategy with a next-token loss.

    Raises CompileError without calibration text, or for an encoder, which has no next token.
    """
    if ctx.calibration is None or module.attrs.get("kind") == "encoder":
        raise CompileError(
            f"{strategy} needs calibration text and a model that predicts the next token",
            hint="use --strategy weight_mse",
        )
    return ctx.calibration.spread(windows).tokens


def check_range(strategy: str, option: str, value: float, least: float, most: float = math.inf) -> None:
    """Raises CompileError for an option's value that is out of range, before any work."""
    if not least <= value <= most:
        limits = f"at least {least:g}" + (f" and at most {most:g}" if math.isfinite(most) else "")
        raise CompileError(f"{strategy}: {option}={value}", hint=f"{option} is {limits}")


def falling(scores: Mapping[str, float]) -> dict[str, float]:
    """The scores nearest to these (least squares) that do not rise with the bits that a format stores.

    More bits lose no more than less do: where an estimate says so, it is noise, and the formats
    concerned share their mean (isotonic regression by pooling adjacent violators).
    """
    pools: list[tuple[list[str], float]] = []
    for name in sorted(scores, key=lambda f: parse_format(f).storage_bits(1, LONG_ROW)):
        names, mean = [name], scores[name]
        while pools and pools[-1][1] < mean:
            before, other = pools.pop()
            mean = (mean * len(names) + other * len(before)) / (len(names) + len(before))
            names = before + names
        pools.append((names, mean))
    found = {name: mean for names, mean in pools for name in names}
    return {name: found[name] for name in scores}


def rounded(score: float) -> float:
    """Six significant digits: enough for any decision, and a dump that can be read."""
    return float(f"{score:.6g}")
