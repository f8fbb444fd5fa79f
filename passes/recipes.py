"""Recipes: options of a compile that go well together, by what they cost."""

from collections.abc import Collection, Mapping
from typing import Final

from gammac.formats.trellis import TRELLIS

BEST: Final = "best"
# recipe → options of `compile` that differ from the defaults; docs/results.md has what each step gains
RECIPES: Final[Mapping[str, Mapping[str, object]]] = {
    "fast": {"strategy": "fisher"},
    "balanced": {},
    BEST: {"guided": True, "learn_rounding": True, "distill": True},
}
# the best where kernels read trellis codes: on smollm2-135m, allocated by fisher, far ahead of GPTQ by gamma
# at equal true bits; distillation takes a quarter off the KL that is left; gamma over them is not measured
BEST_TRELLIS: Final[Mapping[str, object]] = {
    "strategy": "fisher", "rotate": True, "quantizer": "tcq", "formats": "tcq2,tcq3,tcq4", "distill": True,
}  # fmt: skip


def recipe(name: str, kinds: Collection[str]) -> Mapping[str, object]:
    """The options of a recipe on a target that runs these kinds of formats."""
    return BEST_TRELLIS if name == BEST and TRELLIS in kinds else RECIPES[name]
