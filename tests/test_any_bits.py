"""MatMulAnyBits: the packing, the ONNX function and the kernel on every instruction set this machine has."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from gammac.targets.onnx.any_bits import (
    DOMAIN,
    OP,
    OP_ZEROS,
    CompileFailed,
    CompilerMissing,
    PackedAnyBits,
    build_library,
    find_compiler,
    function_proto,
    groups_of,
    pack,
    packed_bytes,
    unpack,
)

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
CPU = ["CPUExecutionProvider"]
ISAS = ("avx512", "avx2", "portable")
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@dataclass(frozen=True)
class Case:
    """A weight, packed and in the open."""

    packed: PackedAnyBits
    weight: F64  # [N, K]
    magnitude: F64  # [N, K], scale * (code + zero): what float32 rounding errors are proportional to


def random_case(seed: int, N: int, K: int, bits: int, group: int, asymmetric: bool) -> Case:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (N, K), dtype=np.uint8)
    scales = rng.uniform(0.01, 2, (N, groups_of(K, group))).astype(np.float16)
    zeros = rng.integers(0, 2**bits, scales.shape, dtype=np.uint8) if asymmetric else None
    column = np.arange(K) // group
    scale = scales.astype(np.float64)[:, column]
    zero = np.float64(2 ** (bits - 1)) if zeros is None else zeros.astype(np.float64)[:, column]
    return Case(pack(codes, scales, zeros, bits, group), scale * (codes - zero), scale * (codes + zero))


def model_of(packs: Sequence[PackedAnyBits], functions: bool, ranked: bool = True) -> onnx.ModelProto:
    """A node for each weight, y0, y1, ... of the one input x."""
    nodes, initializers = [], []
    for i, packed in enumerate(packs):
        operands = {"codes": packed.codes, "scales": packed.scales, "zeros": packed.zeros}
        named = {f"{name}{i}": array for name, array in operands.items() if array is not None}
        initializers += [numpy_helper.from_array(array, name) for name, array in named.items()]
        nodes.append(
            helper.make_node(packed.op, ["x", *named], [f"y{i}"], domain=DOMAIN, **packed.attributes)
        )
    x_dims = [None, None, packs[0].attributes["K"]] if ranked else None
    y_dims = [None, None, packs[0].attributes["N"]] if ranked else None
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_dims)],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, y_dims) for i in range(len(packs))],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    protos = [function_proto(False), function_proto(True)] if functions else []
    return helper.make_model(graph, functions=protos, opset_imports=opsets, ir_version=10)


def open_session(
    model: onnx.ModelProto, library: Path | None, optimized: Path | None = None
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(library))
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model.SerializeToString(), options, providers=CPU)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("op"))


def use_isa(isa: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force an instruction set, or skip where this processor lacks it."""
    monkeypatch.setenv("GAMMAC_ISA", isa)
    try:
        open_session(model_of([random_case(0, 4, 64, 4, 64, False).packed], functions=False), library)
    except Exception as error:
        if "GAMMAC_ISA" not in str(error):
            raise
        pytest.skip(f"no {isa} here")


def representable(rng: np.random.Generator, rows: int, K: int) -> F32:
    """Activations that int8 holds exactly: integers, and each block of 32 reaches 127."""
    x = rng.integers(-127, 128, (1, rows, K)).astype(np.float32)
    x[..., ::32] = 127
    return x


def block_steps(x: F32, block: int) -> F64:
    """The int8 step of each activation's block."""
    K = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-K // block) * block))
    padded[..., :K] = np.abs(x)
    most = padded.reshape(*x.shape[:-1], -1, block).max(axis=-1) / 127
    return np.repeat(most, block, axis=-1)[..., :K]


@needs_compiler
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("isa", ISAS)
def test_kernel_is_dequantize_then_multiply(
    isa: str, bits: int, asymmetric: bool, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(isa, library, monkeypatch)
    rng = np.random.default_rng(bits)
    for N, K in ((21, 200), (37, 576)):
        groups = (32, 64, 96, 128, K)
        cases = [random_case(group, N, K, bits, group, asymmetric) for group in groups]
        session = open_session(model_of([case.packed for case in cases], functions=False), library)
        for rows in (1, 3, 17, 64):
            exact, rough = representable(rng, rows, K), rng.standard_normal((1, rows, K)).astype(np.float32)
            ys, zs = session.run(None, {"x": exact}), session.run(None, {"x": rough})
            for case, group, y, z in zip(cases, groups, ys, zs, strict=True):
                # Nothing is lost to int8, so what is left is the rounding of float32 sums of 18 blocks.
                rounding = 2.0**-20 * (np.abs(exact) @ case.magnitude.T)
                assert (np.abs(y - exact @ case.weight.T) <= rounding).all()
                # Each activation is off by at most half a step of its block.
                step = block_steps(rough, 64 if group == K or group % 64 == 0 else 32)
                bound = step / 2 @ np.abs(case.weight).T + 2.0**-20 * (np.abs(rough) @ case.magnitude.T)
                assert (np.abs(z - rough @ case.weight.T) <= bound).all()


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_kernel_on_many_tasks(isa: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_isa(isa, library, monkeypatch)
    case = random_case(1, 1003, 1160, 3, 64, True)
    session = open_session(model_of([case.packed], functions=False), library)
    for rows in (1, 2, 5, 6, 7, 300):
        x = representable(np.random.default_rng(rows), rows, 1160)
        bound = 2.0**-19 * (np.abs(x) @ case.magnitude.T)
        assert (np.abs(session.run(None, {"x": x})[0] - x @ case.weight.T) <= bound).all()


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_shapes_zeros_and_values_that_are_not_finite(
    isa: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(isa, library, monkeypatch)
    case = random_case(0, 10, 72, 5, 32, True)
    session = open_session(model_of([case.packed], functions=False), library)
    x = np.zeros((2, 3, 72), np.float32)
    y = session.run(None, {"x": x})[0]
    assert y.shape == (2, 3, 10)
    assert not y.any()
    assert session.run(None, {"x": x[:, :0]})[0].shape == (2, 0, 10)
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 1, 70] = bad
        y = session.run(None, {"x": x})[0]
        assert np.isnan(y[1, 1]).all()
        assert np.isfinite(np.delete(y.reshape(6, 10), 4, axis=0)).all()


@needs_compiler
def test_kernel_takes_over_from_the_function(library: Path, tmp_path: Path) -> None:
    cases = [random_case(0, 6, 100, 3, 32, asymmetric) for asymmetric in (False, True)]
    model = model_of([case.packed for case in cases], functions=True)
    for used, expected in ((library, {OP, OP_ZEROS}), (None, {"MatMul"})):
        open_session(model, used, tmp_path / "optimized.onnx")
        graph = onnx.load(tmp_path / "optimized.onnx").graph
        assert {node.op_type for node in graph.node} == expected


@pytest.mark.parametrize("bits", range(1, 9))
def test_function_is_exact_without_the_library(bits: int) -> None:
    K = 200
    cases = [random_case(g, 7, K, bits, g, zeros) for g in (32, 64, 96, 128, K) for zeros in (False, True)]
    model = model_of([case.packed for case in cases], functions=True)
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32)
    runs = [open_session(model, None).run(None, {"x": x}), ReferenceEvaluator(model).run(None, {"x": x})]
    for ys in runs:
        for case, y in zip(cases, ys, strict=True):
            bound = 2.0**-18 * (np.abs(x) @ np.abs(case.weight).T)  # float32 sums of 200 products
            assert (np.abs(y - x @ case.weight.T) <= bound).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 25),
    st.integers(1, 8),
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_pack_round_trip_and_size(
    N: int, eighths: int, bits: int, width: int, asymmetric: bool, seed: int
) -> None:
    rng, K, group = np.random.default_rng(seed), eighths * 8, 32 * width or eighths * 8
    codes = rng.integers(0, 2**bits, (N, K), dtype=np.uint8)
    scales = rng.random((N, groups_of(K, group))).astype(np.float16)
    zeros = rng.integers(0, 2**bits, scales.shape, dtype=np.uint8) if asymmetric else None
    packed = pack(codes, scales, zeros, bits, group)
    assert packed.nbytes == packed_bytes(N, K, bits, group, asymmetric)
    again = unpack(packed)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(again[1], scales)
    if zeros is None:
        assert again[2] is None
    else:
        np.testing.assert_array_equal(again[2], zeros)


def test_pack_refuses_what_does_not_fit() -> None:
    codes, scales = np.zeros((4, 64), np.uint8), np.ones((4, 2), np.float32)
    for arguments, message in (
        ((codes + 8, scales, None, 3, 32), "below 8"),
        ((codes, scales, scales.astype(np.uint8) * 9, 3, 32), "below 8"),
        ((codes, scales[:, :1], None, 3, 32), "shape"),
        ((codes, scales * 1e9, None, 3, 32), "float16"),
        ((codes, scales, None, 9, 32), "bits"),
        ((codes, scales, None, 3, 48), "group"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(*arguments)


def truncated(packed: PackedAnyBits, name: str) -> PackedAnyBits:
    """The same with one row of one operand missing."""
    operands = {"codes": packed.codes, "scales": packed.scales, "zeros": packed.zeros}
    shorter = {name: operands[name][:-1]}
    return replace(packed, **shorter)


@needs_compiler
@pytest.mark.parametrize("name", ["codes", "scales", "zeros"])
def test_operands_of_the_wrong_size_are_an_error(name: str, library: Path) -> None:
    packed = truncated(random_case(0, 8, 64, 3, 32, True).packed, name)
    session = open_session(model_of([packed], functions=False), library)
    with pytest.raises(Exception, match=f"the size of input {name} is"):
        session.run(None, {"x": np.zeros((1, 1, 64), np.float32)})


@needs_compiler
def test_an_input_of_the_wrong_size_is_an_error(library: Path) -> None:
    session = open_session(
        model_of([random_case(0, 8, 64, 3, 32, True).packed], functions=False, ranked=False), library
    )
    with pytest.raises(Exception, match="the last dimension of input x is 63, expected 64"):
        session.run(None, {"x": np.zeros((1, 1, 63), np.float32)})
    with pytest.raises(Exception, match="rank"):
        session.run(None, {"x": np.zeros((), np.float32)})


@needs_compiler
@pytest.mark.parametrize(
    ("name", "value"),
    [("bits", 0), ("bits", 9), ("group", 48), ("group", -32), ("N", 0), ("K", -64), ("K", 2**62)],
)
def test_attributes_out_of_range_are_an_error(name: str, value: int, library: Path) -> None:
    packed = random_case(0, 8, 64, 3, 32, False).packed
    wrong = PackedAnyBits(packed.codes, packed.scales, None, {**packed.attributes, name: value})
    with pytest.raises(Exception, match=f"attribute {name} is {value}"):
        open_session(model_of([wrong], functions=False), library)


@needs_compiler
def test_an_unknown_instruction_set_is_an_error(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAMMAC_ISA", "neon9")
    with pytest.raises(Exception, match="GAMMAC_ISA"):
        open_session(model_of([random_case(0, 8, 64, 3, 32, False).packed], functions=False), library)


@needs_compiler
def test_build_is_deterministic(library: Path, tmp_path: Path) -> None:
    again = build_library(tmp_path)
    assert again.read_bytes() == library.read_bytes()
    assert str(tmp_path).encode() not in again.read_bytes()


def test_build_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerMissing, match="CXX"):
        build_library(tmp_path)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(CompileFailed):
        build_library(tmp_path)
