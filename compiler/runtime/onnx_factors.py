"""Adapters' factors in place of those in an ONNX graph."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]

from gammac.runtime.adapters import Factors, demand_shape
from gammac.targets.onnx.names import TRANSPOSED


def replaced_initializers(path: Path, factors: Factors) -> dict[str, ort.OrtValue]:
    """The graph's weights by their names there, which MatMul reads as [inputs, outputs].

    Raises CompileError for a factor of another shape.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    found = {}
    for weight in graph.initializer:
        name = weight.name.removesuffix(TRANSPOSED)
        if name in factors:
            array = factors[name] if name == weight.name else np.ascontiguousarray(factors[name].T)
            demand_shape(name, array, weight.dims)
            found[weight.name] = ort.OrtValue.ortvalue_from_numpy(array)
    return found
