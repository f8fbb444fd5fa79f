"""Which weights of an ONNX graph a decode step reads."""

from pathlib import Path
from typing import Final

import numpy as np
import onnx

READS_A_ROW: Final = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")
"""Operators that look a few rows up in a table (embedding, rotary) rather than read it."""


def weight_bytes_per_token(model: Path) -> int:
    """Bytes of the weights that one decode step of an ONNX file reads; tables are not read whole."""
    graph = onnx.load(str(model), load_external_data=False).graph
    read = {name for node in graph.node if node.op_type not in READS_A_ROW for name in node.input}
    return sum(_bytes_of(tensor) for tensor in graph.initializer if tensor.name in read)


def _bytes_of(tensor: onnx.TensorProto) -> int:
    # onnx knows types narrower than a byte, two or four to a byte
    size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    length = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
    return length or int(np.prod(tensor.dims, dtype=np.int64)) * size
