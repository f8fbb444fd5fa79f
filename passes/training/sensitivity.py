"""How much a layer suffers from quantization while it trains: DSA-QAT, "Sensitivity Analysis Module".

S_l = α · Var(∇W_l) + β · E|A_l − Q(A_l)|, and the distortion of attention scores, for which the paper has
no formula. S_l is multiplied by ε, the relative squared error of a layer's weight, and set against the bits
of the whole layer, so its terms are those of whole layers:

- Noise of the relative size ε on W changes the loss by Var(∇W) · ‖W‖² · ε, in the mean of squares.
- The error of activations is relative and squared, so that large activations don't count for more, and
  counts for each weight of the layer.
- Each term is divided by its mean over the layers before they are added. As printed, gradient variances
  near 1e-8 would never count beside activation errors near 1e-2.

As printed, small layers got the bits of large ones, and the allocation lost to one width for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

PROBE_BITS = 4  # activation errors are compared at one width, whatever a layer has at the moment


def gradient_variance(gradient: Tensor) -> float:
    """Var(∇W_l) over the elements of a weight's gradient."""
    return float(gradient.var(unbiased=False))


def attention_distortion(scores: Tensor, quantized: Tensor) -> float:
    """Mean KL(p ‖ q) in nats over queries: p and q are rows of attention probabilities [..., keys] of the
    full-precision and of the quantized layer. Our reading of "attention score distortion"."""
    p, q = scores.clamp(min=1e-30), quantized.clamp(min=1e-30)
    return float((p * (p.log() - q.log())).sum(-1).mean())


def sensitivity(variance: float, error: float, alpha: float = 0.5, beta: float = 0.5) -> float:
    """S_l = α · Var(∇W_l) + β · E|A_l − Q(A_l)|."""
    return alpha * variance + beta * error


def standardised(values: Mapping[str, float]) -> dict[str, float]:
    """The values over their mean; zeros where all of them are zero."""
    mean = sum(values.values()) / max(1, len(values))
    return {name: value / mean if mean > 0 else 0.0 for name, value in values.items()}


@dataclass(frozen=True)
class Layer:
    """What was learnt of one: Var(∇W), ‖W‖², the number of its weights, the relative squared error of its
    activations, and the distortion of attention, which is zero where its output meets no softmax."""

    variance: float
    square: float
    size: int
    error: float
    distortion: float = 0.0


def sensitivities(layers: Mapping[str, Layer], alpha: float, beta: float, kappa: float) -> dict[str, float]:
    """S by layer."""
    v = standardised({n: layer.variance * layer.square for n, layer in layers.items()})
    e = standardised({n: layer.error * layer.size for n, layer in layers.items()})
    d = standardised({n: layer.distortion for n, layer in layers.items() if layer.distortion})
    return {n: sensitivity(v[n], e[n], alpha, beta) + kappa * d.get(n, 0.0) for n in v}


def smoothed(before: Mapping[str, float], now: Mapping[str, float], keep: float) -> dict[str, float]:
    """keep · before + (1 − keep) · now by name; `now` where there is nothing before."""
    return {n: keep * before.get(n, value) + (1 - keep) * value for n, value in now.items()}
