"""Recipes: options of a compile that go well together, by what they cost."""

from collections.abc import Mapping
from typing import Final

# recipe → fields of Choices that differ from the defaults; docs/results.md has what each step gains
RECIPES: Final[Mapping[str, Mapping[str, object]]] = {
    "fast": {"strategy": "fisher"},
    "balanced": {},
    "best": {"guided": True, "learn_rounding": True, "distill": True},
}
