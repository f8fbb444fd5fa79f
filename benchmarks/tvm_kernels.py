"""Times the TVM backend's linear kernels against the memory's own speed and against ONNX Runtime.

Decode: bytes of the packed weight a second, as a share of what a plain loop reads from memory in the same
minute. Every call reads another copy, 192 MB of them, so that none comes from a cache. Prefill: seconds
against ONNX Runtime's MatMulNBits of 4 bits with int8 inputs (accuracy level 4) and the same group.
All are taken in turn and the medians are reported, so that a busy minute hits all alike.

Run: python benchmarks/tvm_kernels.py [--threads 1 2] [--bits 2 3 4] [--float] [--huge-pages] [--cpu-time]
"""

import argparse
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

COPIES_BYTES: Final = 192 << 20
READ_BYTES: Final = 256 << 20
BLOCK: Final = 1 << 16

Run = Callable[[], float]


def build(functions: dict[str, Any], isa: Any) -> Any:
    """A library of PrimFuncs."""
    import tvm

    from gammac.targets.tvm.kernels import lowering

    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    with lowering():
        return tvm.compile(module, target=tvm.target.Target(isa.llvm_target()))


class Memory:
    """Tensors in pages of 2 MB, or of 4 KB as a mapped file has them."""

    def __init__(self, huge: bool) -> None:
        self.advice = mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE
        self.rng = np.random.default_rng(0)

    def tensor(self, values: Any) -> Any:
        """A tensor of TVM's with these values."""
        import tvm

        pages = mmap.mmap(-1, values.nbytes)
        pages.madvise(self.advice)
        array = np.frombuffer(pages, values.dtype).reshape(values.shape)
        array[...] = values
        return tvm.runtime.from_dlpack(array)

    def tensors(self, operands: Any, tokens: int) -> dict[str, Any]:
        """Random contents: the speed does not depend on them."""
        shapes = {o.name: tuple(tokens if size == "m" else size for size in o.shape) for o in operands}
        high = {o.name: 256 if o.dtype == "uint8" else 3 for o in operands}
        return {
            o.name: self.tensor(self.rng.integers(0, high[o.name], shapes[o.name]).astype(o.dtype))
            for o in operands
        }


def timed(body: Callable[[], None], calls: int, clock: Callable[[], float]) -> Run:
    """Seconds of one of `calls` calls that `body` makes."""

    def run() -> float:
        start = clock()
        body()
        return (clock() - start) / calls

    return run


def reader(isa: Any, memory: Memory, clock: Callable[[], float]) -> Run:
    """Seconds a byte of adding up 256 MB, with the same prefetches as the kernels."""
    from gammac.targets.tvm.kernels.panel import PREFETCH
    from gammac.targets.tvm.tir.vectors import T, kernel, load, splat_int, store

    blocks, words = READ_BYTES // BLOCK, BLOCK // 4
    with kernel() as made:
        x, y = made.arg("x", (blocks, words), "int32"), made.arg("y", (blocks, 64), "int32")
        with T.parallel(0, blocks) as block:
            sums = [T.alloc_buffer((16,), "int32") for _ in range(4)]
            for total in sums:
                store(total, splat_int(0, 16), 0)
            with T.serial(0, words // 64) as i:
                for j, total in enumerate(sums):
                    ahead = T.address_of(x[block, i * 64 + j * 16 + PREFETCH // 4])
                    T.evaluate(T.call_intrin("void", "tirx.prefetch", ahead, 0, 3, 1))
                    store(total, load(total, 0) + load(x, block, i * 64 + j * 16), 0)
            for j, total in enumerate(sums):
                store(y, load(total, 0), block, j * 16)
    function = build({"read": made.primfunc}, isa)["read"]
    source = memory.tensor(np.ones((blocks, words), np.int32))
    result = memory.tensor(np.ones((blocks, 64), np.int32))
    return timed(lambda: function(source, result), READ_BYTES, clock)


def decode(
    name: str, shape: tuple[int, int], isa: Any, integer: bool, memory: Memory, clock: Callable[[], float]
) -> Run:
    """Seconds a byte of one token, each call with another copy of the weight."""
    from gammac.formats import parse_format
    from gammac.targets.tvm.kernels import decode_linear, packed_bytes

    format_ = parse_format(name)
    kernel = decode_linear(format_, *shape, isa, integer=integer)
    function = build({kernel.name: kernel.func}, isa)[kernel.name]
    size = packed_bytes(format_, *shape, isa)
    inputs = {n: t for n, t in memory.tensors(kernel.inputs, 1).items() if n.startswith("x")}
    weights = [o for o in kernel.inputs if o.name not in inputs]
    copies = [memory.tensors(weights, 1).values() for _ in range(-(-COPIES_BYTES // size))]
    y = memory.tensors(kernel.outputs, 1)["y"]

    def body() -> None:
        for copy in copies:
            function(*inputs.values(), *copy, y)

    return timed(body, len(copies) * size, clock)


def prefill(
    name: str, shape: tuple[int, int], tokens: int, isa: Any, integer: bool, clock: Callable[[], float]
) -> Run:
    """Seconds of one product, the rounding of its inputs included."""
    from gammac.formats import parse_format
    from gammac.targets.tvm.kernels import activation_group, prefill_linear, quantize_activations

    format_, memory = parse_format(name), Memory(huge=False)
    kernel = prefill_linear(format_, *shape, isa, integer=integer)
    rounding = quantize_activations(shape[1], activation_group(format_, shape[1]), "m")
    library = build({kernel.name: kernel.func, rounding.name: rounding.func}, isa)
    product, quantize = library[kernel.name], library[rounding.name]
    arrays = memory.tensors(kernel.operands, tokens)
    x = memory.tensors(rounding.inputs, tokens)["x"]

    def body() -> None:
        if integer:
            quantize(x, arrays["x_codes"], arrays["x_scales"], arrays["x_sums"])
        product(*arrays.values())

    return timed(body, 1, clock)


def onnxruntime(
    shape: tuple[int, int], group: int, tokens: int, threads: int, clock: Callable[[], float]
) -> Run:
    """Seconds of one MatMulNBits of 4 bits."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    (rows, columns), rng = shape, np.random.default_rng(0)
    arrays = {
        "codes": rng.integers(0, 256, (rows, columns // group, group // 2), dtype=np.uint8),
        "scales": rng.random((rows, columns // group), dtype=np.float32),
    }
    node = helper.make_node("MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft")
    sizes = {"N": rows, "K": columns, "bits": 4, "block_size": group, "accuracy_level": 4}
    node.attribute.extend(helper.make_attribute(*item) for item in sizes.items())
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, rows])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", rng.random((tokens, columns), dtype=np.float32))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_shape_and_type((tokens, rows), np.float32))
    return timed(lambda: session.run_with_iobinding(binding), 1, clock)


def medians(runs: dict[Any, Run], repeats: int) -> dict[Any, float]:
    """Of each, taken in turn; the first round warms up."""
    taken: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(repeats + 1):
        for key, run in runs.items():
            taken[key].append(run())
    return {key: float(np.median(times[1:])) for key, times in taken.items()}


def compare_decode(shape: tuple[int, int], isa: Any, args: argparse.Namespace, clock: Any) -> None:
    """A row for each width."""
    memory, threads = Memory(args.huge_pages), args.threads[0]
    read = reader(isa, memory, clock)
    for bits in args.bits:
        name = f"w{bits}g{args.group}"
        kernel = decode(name, shape, isa, not args.float, memory, clock)
        found = medians({"read": read, "kernel": kernel}, args.repeats)
        ours, plain = (1e-9 / found[key] for key in ("kernel", "read"))
        where = f"decode  {shape[0]}x{shape[1]} {name:8} threads {threads}"
        print(f"{where}: {ours:5.1f} GB/s, {plain:5.1f} read, share {ours / plain:.2f}", flush=True)


def compare_prefill(shape: tuple[int, int], isa: Any, args: argparse.Namespace, clock: Any) -> None:
    """A row for each number of tokens and width."""
    for tokens in args.tokens:
        names = [f"w{bits}g{args.group}" for bits in args.bits]
        runs: dict[str, Run] = {n: prefill(n, shape, tokens, isa, not args.float, clock) for n in names}
        runs["peer"] = onnxruntime(shape, args.group, tokens, args.threads[0], clock)
        found = medians(runs, args.repeats)
        for name in names:
            rate = 2e-9 * shape[0] * shape[1] * tokens / found[name]
            where = f"prefill {shape[0]}x{shape[1]} {name:8} threads {args.threads[0]} M {tokens:4}"
            print(f"{where}: {rate:6.0f} GOPS, {found['peer'] / found[name]:.2f}x MatMulNBits", flush=True)


def main() -> None:
    """One process for each number of threads: TVM's pool is made once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 11008])
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--isa", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--float", action="store_true", help="inputs in f32 instead of int8")
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--huge-pages", action="store_true", help="2 MB; a mapped file has 4 KB")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use; one thread")
    args = parser.parse_args()
    if len(args.threads) > 1:
        for threads in args.threads:
            subprocess.run([sys.executable, *sys.argv, "--threads", str(threads)], check=True)
        return
    os.environ.update(TVM_NUM_THREADS=str(args.threads[0]), TVM_BIND_THREADS="0")
    from gammac.targets.tvm.kernels import isa_of

    clock, isa = time.process_time if args.cpu_time else time.perf_counter, isa_of(args.isa)
    for rows in args.rows:
        if not args.no_decode:
            compare_decode((rows, args.columns), isa, args, clock)
        compare_prefill((rows, args.columns), isa, args, clock)


if __name__ == "__main__":
    main()
