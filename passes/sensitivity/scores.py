"""What strategies share: reading candidates, and the invariant that scores are there."""

from collections.abc import Iterator

from gammac.diagnostics import Diagnostic
from gammac.ir import Module, Weight


def weights_have_scores(module: Module) -> Iterator[Diagnostic]:
    """Every weight with a role has a score in each of its candidate formats."""
    for weight in module.weights.values():
        if "role" in weight.attrs and not weight.attrs.keys() & {"scores", "stored"}:
            yield Diagnostic("has no scores", weight.name, "run a sensitivity pass first, for example fisher")


def candidates_of(weight: Weight) -> dict[str, str]:
    """Format name → digest of the quantized weight."""
    candidates = weight.attrs["candidates"]
    assert isinstance(candidates, dict)
    return {str(name): str(digest) for name, digest in candidates.items()}


def rounded(score: float) -> float:
    """Six significant digits: enough for any decision, and a dump that can be read."""
    return float(f"{score:.6g}")
