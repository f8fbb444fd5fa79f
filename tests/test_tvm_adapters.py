"""TVM artifacts with adapters beside the codes: against the interpreter and ONNX, in how many launches."""

from pathlib import Path

import pytest
import torch
from onnx_models import Shape, decoder, quantized
from test_tvm import EXACT, ROUNDED, differences, emitted, legal

from gammac.ir import Module
from gammac.passes.add_adapters import with_adapters
from gammac.runtime.reference import InterpreterSession
from gammac.targets.tvm.names import FLOAT, INT8
from gammac.weights import WeightStore


def adapted(store: WeightStore, shape: Shape, formats: dict[str, str], rank: int = 5) -> Module:
    """A quantized decoder with adapters that change its logits."""
    module = quantized(decoder(shape, store), store, formats)
    random, factors = torch.Generator().manual_seed(1), {}
    for name, weight in module.weights.items():
        if weight.attrs.get("role") == "block":
            rows, columns = map(int, weight.type.shape)  # type: ignore[arg-type]
            a = torch.randn(rank, columns, generator=random) / columns**0.5
            factors[name] = (a, torch.randn(rows, rank, generator=random) / rank**0.5)
    return with_adapters(module, factors, store)


SHAPES = {"plain": Shape(layers=1), "biased": Shape(layers=1, bias=True)}
MIXED = {"embed": "w8g32", "k_proj": "w3g32-sym", "up": "w2g32", "": "w4g32"}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("activations", "least", "most"), [(FLOAT, 0, EXACT), (INT8, 1e-3, 5 * ROUNDED)])
def test_adapters_beside_codes_are_what_the_interpreter_computes(
    shape: Shape, activations: str, least: float, most: float, tmp_path: Path
) -> None:
    store = WeightStore()
    module = legal(adapted(store, shape, MIXED), store)
    session = emitted(module, store, tmp_path, activations)
    found = differences(session, InterpreterSession(module, store))
    assert least < max(found) < most, found
