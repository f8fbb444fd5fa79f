"""An ONNX graph under construction: nodes, small constants, and weights that go straight to the data file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from gammac.formats import load_float
from gammac.ir import Dim, Module, Operand, Sym, TensorType, Value, WeightRef
from gammac.processor import CUDA
from gammac.targets.target import Target
from gammac.weights import WeightStore

Array = npt.NDArray[Any]

# RMSNormalization entered the standard at 23; ONNX Runtime 1.31 reads up to 26, IR up to 13.
OPSET: Final = 23
IR_VERSION: Final = 10
MICROSOFT: Final = "com.microsoft"
DATA_NAME: Final = "model.onnx.data"
ALIGNMENT: Final = 64
INT32: Final = ir.DataType.INT32

DTYPES: Final = {
    "f32": ir.DataType.FLOAT, "f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16,
    "i64": ir.DataType.INT64, "i32": INT32, "i8": ir.DataType.INT8,
    "u8": ir.DataType.UINT8, "u32": ir.DataType.UINT32, "bool": ir.DataType.BOOL,
}  # fmt: skip


class DataFile:
    """The weights' bytes, written one array after the other at aligned offsets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, name: str, array: Array) -> ir.ExternalTensor:
        """Write an array; what comes back points at its bytes."""
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        array = np.ascontiguousarray(array)
        self._file.write(array.reshape(-1).view(np.uint8).data)
        return ir.ExternalTensor(
            self.path.name, offset, array.nbytes, ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape), name=name, base_dir=self.path.parent,
        )  # fmt: skip


def dim_name(dim: Dim) -> int | str:
    """A size as ONNX writes it; the length of a cache with the new rows in it goes by `total`."""
    return dim if isinstance(dim, int) else {"past+seq": "total"}.get(str(dim), str(dim))


@dataclass(frozen=True)
class Rounded:
    """A value as integers: codes f32 of its shape, and the step that they count."""

    codes: ir.Value
    step: ir.Value


class GraphWriter:
    """Collects nodes. `at` is the PyTorch module that is being lowered; nodes are named after it."""

    def __init__(
        self, module: Module, store: WeightStore, data: DataFile, target: Target | None, compiler: bool
    ) -> None:
        self.module, self.store, self.data = module, store, data
        self.target, self.compiler = target, compiler
        self.tape = Tape()
        self.values: dict[Value, ir.Value] = {}
        self.rounded: dict[Value, Rounded] = {}
        self.sizes: dict[str, ir.Value] = {}
        self.by_name: dict[str, ir.Value] = {}
        self.library_ops: set[str] = set()
        self.halves: set[Operand] = set()  # values that are f16 here, whatever the module says
        self.at = ""
        self._initializers: dict[str, ir.Value] = {}
        self._shared: dict[str, ir.Value] = {}
        self._named: dict[str, int] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether CUDA's operators run it."""
        return self.target is not None and self.target.provider == CUDA

    # ---- nodes ----

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attrs: Any) -> ir.Value:
        """Append a node with one output."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, **attrs)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attrs: Any
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs."""
        name = self._unique(f"{self.at}/{kind}" if self.at else kind)
        made = [ir.Value(name=f"{name}:{i}" if i else name) for i in range(outputs)]
        return self.tape.op_multi_out(
            kind,
            inputs,
            {k: v for k, v in attrs.items() if v is not None},
            outputs=made,
            domain=domain,
            name=name,
        )

    def shared(self, key: str, kind: str, *inputs: ir.Value, **attrs: Any) -> ir.Value:
        """The output of a node that is made once, at its first use."""
        if key not in self._shared:
            self._shared[key] = self.op(kind, *inputs, **attrs)
        return self._shared[key]

    def _unique(self, name: str) -> str:
        count = self._named[name] = self._named.get(name, -1) + 1
        return f"{name}.{count}" if count else name

    # ---- operands ----

    def operand(self, operand: Operand) -> ir.Value:
        """The ONNX value of an operand; a weight becomes a float initializer."""
        if isinstance(operand, Value) and operand in self.rounded:
            x = self.rounded[operand]
            return self.shared(f"{x.codes.name} in steps", "Mul", x.codes, x.step)
        if isinstance(operand, Value):
            return self.values[operand]
        return self.float_weight(operand)

    def float_weight(self, ref: WeightRef) -> ir.Value:
        """A weight as floats, as it is shaped in the module."""
        if ref.name not in self._initializers:
            array = load_float(self.module.weights[ref.name], self.store).numpy()
            return self.stored(ref.name, array)
        return self._initializers[ref.name]

    def is_stored(self, name: str) -> bool:
        """Whether `stored` has seen this name."""
        return name in self._initializers

    def stored(self, name: str, array: Array | None = None) -> ir.Value:
        """An initializer in the data file, written at the first mention of its name."""
        if name not in self._initializers:
            assert array is not None
            tensor = self.data.append(name, array)
            self._initializers[name] = self.tape.initializer(tensor, name)
        return self._initializers[name]

    def const(self, value: Array | float | Sequence[int], dtype: str = "i64") -> ir.Value:
        """A small constant, kept in the graph itself."""
        numpy = DTYPES[dtype].numpy()
        array = np.asarray(value, dtype=numpy)
        text = "_".join(map(str, array.reshape(-1).tolist())) or "none"
        name = f"{dtype}[{'x'.join(map(str, array.shape))}]={text}"
        if name not in self._initializers:
            self._initializers[name] = self.tape.initializer(ir.Tensor(array, name=name), name)
        return self._initializers[name]

    # ---- shapes ----

    def type_of(self, operand: Operand) -> TensorType:
        """The type that a value has in the graph."""
        return replace(operand.type, dtype="f16") if operand in self.halves else operand.type

    def set_type(self, value: ir.Value, type_: TensorType) -> None:
        """Declare the element type and shape of a value."""
        value.type = ir.TensorType(DTYPES[type_.dtype])
        value.shape = ir.Shape([dim_name(d) for d in type_.shape])

    def size(self, dim: Dim) -> ir.Value:
        """A size as i64[1]."""
        if isinstance(dim, int):
            return self.const([dim])
        total: ir.Value | None = None
        for names, count in dim.terms:
            term = self.const([count])
            for name in names:
                term = self.sizes[name] if term is self.const([1]) else self.op("Mul", term, self.sizes[name])
            total = term if total is None else self.op("Add", total, term)
        assert total is not None
        return total

    def shape(self, dims: Sequence[Dim], like: Sequence[Dim] = ()) -> ir.Value:
        """A shape as i64[rank], constant where `like`, the shape before a Reshape, allows it."""
        kept = [0 if i < len(like) and d == like[i] and isinstance(d, Sym) else d for i, d in enumerate(dims)]
        if like and sum(isinstance(d, Sym) for d in kept) == 1:
            kept = [-1 if isinstance(d, Sym) else d for d in kept]
        if all(isinstance(d, int) for d in kept):
            return self.const([d for d in kept if isinstance(d, int)])
        return self.op("Concat", *map(self.size, kept), axis=0)

    def finish(
        self,
        name: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        functions: Sequence[ir.Function],
    ) -> ir.Model:
        """The model around everything collected."""
        domains: Mapping[str, int] = {"": OPSET, MICROSOFT: 1, "gammac": 1}
        graph = ir.Graph(
            inputs, outputs, nodes=self.tape.nodes, initializers=self.tape.initializers, name=name,
            opset_imports=dict(domains),
        )  # fmt: skip
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="gammac", functions=functions)
