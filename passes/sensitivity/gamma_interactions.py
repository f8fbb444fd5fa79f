"""What modules do to each other's losses across blocks: allocations drawn by preference, run end to end.

Teacher forcing learns ℓ(b), what a module loses in a block whose input is exact. Here whole models are
drawn, each runs on a few calibration windows, and one gradient of its KL divergence gives for every module
and format the slope ⟨∂KL/∂W, W_b − W⟩ from the full-precision W. The module's own curvature, 2 ℓ(b)
where b is in place, is known; the rest is what the errors of all others make of its own:

    I(b) = mean over draws z of ⟨∂KL/∂W, W_b − W⟩ − 2 ℓ(b) [z = b]

Among the others a module loses ℓ(b) + ½ I(b): ½, because what two modules do to each other stands in the
I of both (Shapley's value of a quadratic loss). I grows with the errors around a module, so scores that
serve all budgets take the share that suits an average of the budgets: SHARE, chosen on held-out text. An
I(b) counts as far as it stands out of its noise: it is multiplied by 1 − (its standard error / itself)²,
or by 0 (James and Stein's estimator, positive part).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from gammac.cache import key_of
from gammac.calibration import BATCH_WINDOWS
from gammac.formats import candidates_of
from gammac.ir import Module
from gammac.passes.kl_gradient import FULL, KlGradient
from gammac.passes.sensitivity.gamma_preferences import Preferences
from gammac.passes.sensitivity.scores import scoring_tokens
from gammac.pipeline import Context
from gammac.progress import no_progress

Losses = Mapping[str, Mapping[str, float]]

# ½ would suit models as far from full precision as those that are drawn; most budgets are nearer
SHARE: Final = 0.25
# a loss keeps so much of itself, however much the others make up for
LEAST: Final = 0.1
# draws run together: what a killed run loses at most
GROUP: Final = 8


def with_interactions(
    losses: Losses, module: Module, preferences: Preferences, draws: int, temperature: float, key: str,
    ctx: Context,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Weight name → format name → ℓ + share of I. Each finished group of draws is remembered under `key`."""
    tokens = scoring_tokens("gamma", draws * BATCH_WINDOWS, module, ctx)
    windows = torch.split(tokens, BATCH_WINDOWS)
    generator = torch.Generator().manual_seed(ctx.seed)
    drawn = [_drawn(module, preferences, temperature, generator) for _ in range(draws)]
    found: dict[str, dict[str, list[float]]] = {n: {f: [] for f in own} for n, own in losses.items()}
    quiet = replace(ctx, progress=no_progress)
    for start in ctx.progress(range(0, draws, GROUP), "gamma (drawn models)"):
        group = drawn[start : start + GROUP]

        def measure(start: int = start, group: list[dict[str, str]] = group) -> dict[str, Any]:
            own = torch.cat([windows[(start + i) % len(windows)] for i in range(len(group))])
            return {"slopes": [s for _, s in KlGradient(module, own, quiet).measure_each(group, "")]}

        slopes = ctx.cache.record(key_of(key, "draws", f"{start} of {draws}"), measure)["slopes"]
        for formats, slope in zip(group, slopes, strict=True):
            for name, own in found.items():
                for format_, values in own.items():
                    known = 2 * losses[name][format_] if formats[name] == format_ else 0.0
                    values.append(slope[name][format_] - slope[name][FULL] - known)
    return {
        n: {f: max(LEAST * losses[n][f], losses[n][f] + SHARE * shrunk(values)) for f, values in own.items()}
        for n, own in found.items()
    }


def _drawn(
    module: Module, preferences: Preferences, temperature: float, generator: torch.Generator
) -> dict[str, str]:
    """Weight name → format, by chance."""
    found = {}
    for name in preferences.bits:
        mix = preferences.sample(name, temperature, generator, hard=True)
        found[name] = list(candidates_of(module.weights[name]))[int(mix.argmax())]
    return found


def shrunk(values: list[float]) -> float:
    """The mean, as far as it stands out of its noise; nothing where there are less than two values."""
    count = len(values)
    mean = math.fsum(values) / max(count, 1)
    if count < 2 or not mean:
        return 0.0
    noise = math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count
    return mean * max(0.0, 1 - noise / mean**2)
