"""Times gammac::MatMulAnyBits against ONNX Runtime's MatMulNBits, interleaved in one process.

Large: several nodes of 4096 x 4096 in a row, more than 160 MB of weights, so that each is read from memory.
Small: the shapes of SmolLM2-135M, one at a time, where the cost of a call counts.
Run: python benchmarks/any_bits_bench.py [--threads 1] [--rows 1 512] [--repeats 12]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from gammac.targets.onnx.any_bits import DOMAIN, build_library, groups_of, pack

Rng = np.random.Generator
Initializers = list[tuple[str, npt.NDArray[np.generic]]]


def any_bits_node(
    rng: Rng, N: int, K: int, bits: int, group: int, i: int
) -> tuple[onnx.NodeProto, Initializers]:
    """One of ours, symmetric, with random weights."""
    codes = rng.integers(0, 2**bits, (N, K), dtype=np.uint8)
    packed = pack(codes, rng.random((N, groups_of(K, group)), dtype=np.float32), None, bits, group)
    inputs = ["x", f"codes{i}", f"scales{i}"]
    node = helper.make_node(packed.op, inputs, [f"y{i}"], domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(*item) for item in packed.attributes.items())
    return node, [(inputs[1], packed.codes), (inputs[2], packed.scales)]


def n_bits_node(
    rng: Rng, N: int, K: int, bits: int, group: int, i: int
) -> tuple[onnx.NodeProto, Initializers]:
    """One of ONNX Runtime's, with int8 activations as ours has."""
    blocks = -(-K // group)
    codes = rng.integers(0, 256, (N, blocks, group * bits // 8), dtype=np.uint8)
    scales = rng.random((N, blocks), dtype=np.float32)
    inputs = ["x", f"codes{i}", f"scales{i}"]
    attributes = {"N": N, "K": K, "bits": bits, "block_size": group, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft")
    node.attribute.extend(helper.make_attribute(*item) for item in attributes.items())
    return node, [(inputs[1], codes), (inputs[2], scales)]


def session(
    kind: str,
    shape: tuple[int, int],
    bits: int,
    group: int,
    count: int,
    threads: int,
    library: Path,
    folder: Path,
) -> ort.InferenceSession:
    """`count` nodes that all read x; saved with external data, as an artifact is."""
    N, K = shape
    make = any_bits_node if kind == "any" else n_bits_node
    made = [make(np.random.default_rng(i), N, K, bits, group, i) for i in range(count)]
    graph = helper.make_graph(
        [node for node, _ in made],
        "bench",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", K])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", N]) for i in range(count)],
        [numpy_helper.from_array(array, name) for _, pairs in made for name, array in pairs],
    )
    opsets = [
        helper.make_opsetid(domain, version)
        for domain, version in (("", 21), ("com.microsoft", 1), (DOMAIN, 1))
    ]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path = folder / f"{kind}_{N}_{K}_{bits}_{group}.onnx"
    onnx.save_model(
        model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=1024
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(sess: ort.InferenceSession, rows: int, K: int, N: int, count: int) -> Callable[[], None]:
    """A call of the session with everything bound, so that Python's copies are not timed."""
    binding = sess.io_binding()
    x = np.random.default_rng(0).standard_normal((rows, K)).astype(np.float32)
    binding.bind_cpu_input("x", x)
    for i in range(count):
        binding.bind_ortvalue_output(
            f"y{i}", ort.OrtValue.ortvalue_from_shape_and_type((rows, N), np.float32)
        )
    return lambda: sess.run_with_iobinding(binding)


def best(runs: list[Callable[[], None]], repeats: int) -> list[float]:
    """The least seconds of each, taken in turn so that a busy minute hits all alike."""
    least = [float("inf")] * len(runs)
    for _ in range(repeats + 1):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            least[i] = min(least[i], time.perf_counter() - start)
    return least


def compare(
    shape: tuple[int, int],
    group: int,
    bits: list[int],
    rows: list[int],
    weights: int,
    args: argparse.Namespace,
    library: Path,
) -> None:
    """Print a row for each width: microseconds a node and the ratio to MatMulNBits of 4 bits."""
    N, K = shape
    for width in bits:
        with tempfile.TemporaryDirectory() as name:
            sizes = [max(1, -(-weights // (N * K * b // 8))) for b in (4, width)]
            pairs = [("nbits", 4, sizes[0]), ("any", width, sizes[1])]
            sessions = [
                session(k, shape, b, group, n, args.threads, library, Path(name)) for k, b, n in pairs
            ]
            for m in rows:
                counts = [1 if m > 16 else n for n in sizes]
                if m > 16:
                    sessions_m = [
                        session(k, shape, b, group, 1, args.threads, library, Path(name)) for k, b, _ in pairs
                    ]
                else:
                    sessions_m = sessions
                runs = [runner(s, m, K, N, n) for s, n in zip(sessions_m, counts, strict=True)]
                many = args.repeats if N * K > 10**7 else args.repeats * 40
                theirs, ours = (t / n * 1e6 for t, n in zip(best(runs, many), counts, strict=True))
                rate = 2 * m * N * K / ours / 1e3
                print(
                    f"{N}x{K} group {group:3} M {m:4} threads {args.threads}: NBits 4b {theirs:9.1f} us   "
                    f"ours {width}b {ours:9.1f} us ({rate:6.1f} GF/s)   {theirs / ours:5.2f}x",
                    flush=True,
                )


def main() -> None:
    """Parse, build, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--only", choices=("large", "small"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        library = build_library(Path(name))
        if args.only != "small":
            compare((4096, 4096), args.group, args.bits, args.rows, 160 * 10**6, args, library)
        if args.only != "large":
            for shape in ((576, 576), (1536, 576), (576, 1536)):
                compare(shape, args.group, args.bits, args.rows, 0, args, library)


if __name__ == "__main__":
    main()
