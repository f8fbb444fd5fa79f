"""Low-rank branches beside packed weights: kernels, and whole models against the interpreter."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import Shape, adapted, decoder, quantized

from gammac.runtime.reference import InterpreterSession
from gammac.targets.tvm.names import FLOAT, INT8
from gammac.weights import WeightStore

tvm = pytest.importorskip("tvm", reason="needs the extra tvm")

from kernel_inputs import EPSILON, build, call, inputs, numbered, quantized_inputs, random_weight  # noqa: E402
from test_tvm import EXACT, ROUNDED, differences, emitted, legal  # noqa: E402

from gammac.formats import parse_format  # noqa: E402
from gammac.runtime.tvm_session import TvmSession  # noqa: E402
from gammac.targets.tvm.cuda.kernels import CudaDevice  # noqa: E402
from gammac.targets.tvm.description import Description  # noqa: E402
from gammac.targets.tvm.kernels import (  # noqa: E402
    Branch,
    Layout,
    decode_linear,
    gated_linear,
    isa_of,
    low_rank,
    prefill_linear,
    stacked_linear,
)
from gammac.targets.tvm.panels import pack_panels  # noqa: E402
from gammac.targets.tvm.toolchain import find_linker  # noqa: E402

pytestmark = pytest.mark.skipif(find_linker() is None, reason="nothing links a shared library")

HOST = isa_of("cpu")


# ---- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_the_first_factor_reads_what_a_norm_makes(tokens: int, eps: float | None) -> None:
    # neither ranks nor inputs fill a block
    rank, columns = 7, 77
    x, norm, a = inputs(tokens, columns), inputs(1, columns, 2)[0], inputs(rank, columns, 3)
    func = low_rank(1 if tokens == 1 else None, rank, columns, eps)
    with tvm.transform.PassContext():
        library = tvm.compile(
            tvm.IRModule({"low": func.with_attr("global_symbol", "low")}),
            target=tvm.target.Target(HOST.llvm_target()),
        )
    y = tvm.runtime.tensor(np.full((tokens, rank), np.nan, np.float32))
    given_ = [x, a] if eps is None else [x, norm, a]
    library["low"](*map(tvm.runtime.tensor, given_), y)
    x = x.astype(np.float64)
    read = x if eps is None else x / np.sqrt((x**2).mean(1, keepdims=True) + eps) * norm
    assert np.abs(y.numpy() - read @ a.T).max() < 8 * EPSILON * (np.abs(read) @ np.abs(a).T).max()


def expected(x: Any, weight: Any, low: Any, b: Any) -> Any:
    return x @ weight.dequantize().double().numpy().T + low.astype(np.float64) @ b.T


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("integer", [True, False])
def test_a_branch_is_added_to_a_product(tokens: int, integer: bool) -> None:
    rows, columns, branch = 37, 64, Branch(6, 2, 9)
    weight, b = random_weight(parse_format("w4g32"), rows, columns), inputs(rows, 6, 4)
    make = decode_linear if tokens == 1 else prefill_linear
    kernel = make(
        weight.format, rows, columns, HOST, integer=integer, bias=True, residual=True, branch=branch
    )
    x, low, bias, residual = (inputs(tokens, n, n) for n in (columns, 9, rows, rows))
    given_, meant = quantized_inputs(x, Layout(weight.format, rows, columns)) if integer else ({"x": x}, x)
    arrays = {**given_, "x_low": low, **numbered_plain(weight), "b": pack_panels(b)}
    y = call(kernel, build(kernel, HOST), {**arrays, "bias": bias[0], "residual": residual}, tokens)["y"]
    wanted = expected(meant, weight, low[:, 2:8], b) + bias[0] + residual
    np.testing.assert_allclose(y, wanted, atol=5e-5)


def numbered_plain(weight: Any) -> dict[str, Any]:
    return {name.removesuffix("0"): array for name, array in numbered([weight], HOST).items()}


@pytest.mark.parametrize("tokens", [1, 5])
def test_weights_of_one_kernel_read_their_own_columns(tokens: int) -> None:
    columns, rows, ranks = 64, (20, 33), (3, 4)
    many = 1 if tokens == 1 else "m"
    formats = (parse_format("w3g32"), parse_format("w4g32-sym"))
    branches = (Branch(3, 0, 7), Branch(4, 3, 7))
    x, low = inputs(tokens, columns), inputs(tokens, 7, 5)
    bs = [inputs(n, rank, n) for n, rank in zip(rows, ranks, strict=True)]
    weights = [random_weight(f, n, columns, n) for f, n in zip(formats, rows, strict=True)]
    packed = {f"b{i}": pack_panels(b) for i, b in enumerate(bs)}
    kernel = stacked_linear(
        formats, rows, columns, HOST, integer=False, tokens=many, branches=branches, biased=(False, True)
    )
    bias = inputs(1, rows[1], 6)[0]
    arrays = {"x": x, "x_low": low, **numbered(weights, HOST), **packed, "bias1": bias}
    y = call(kernel, build(kernel, HOST), arrays, tokens)["y"]
    first, second = (expected(x, w, part, b) for w, part, b in zip(
        weights, np.split(low, [3], 1), bs, strict=True))  # fmt: skip
    np.testing.assert_allclose(y, np.hstack([first, second + bias]), atol=5e-5)
    # a gate whose branch is there, an up that has none
    gate, up = weights[0], random_weight(formats[1], 20, columns, 9)
    kernel = gated_linear(
        formats, 20, columns, HOST, integer=False, tokens=many, branches=(branches[0], None)
    )
    arrays = {"x": x, "x_low": low, **numbered([gate, up], HOST), "b0": packed["b0"]}
    y = call(kernel, build(kernel, HOST), arrays, tokens)["y"]
    wanted = first / (1 + np.exp(-first)) * (x @ up.dequantize().double().numpy().T)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)


# ---- models ---------------------------------------------------------------------------------------


MIXED = {"embed": "w8g32", "k_proj": "w3g32-sym", "up": "w2g32", "": "w4g32"}


@pytest.mark.parametrize(
    ("shape", "formats"),
    [(Shape(layers=1, bias=True), MIXED), (Shape(layers=1, qk_norm=True), {"": "w4g32"})],
    ids=["biased", "norms of heads"],
)
def test_models_compute_what_the_interpreter_computes(
    shape: Shape, formats: dict[str, str], tmp_path: Path
) -> None:
    store = WeightStore()
    module = legal(adapted(store, shape, formats), store)
    reference = InterpreterSession(module, store)
    assert max(differences(emitted(module, store, tmp_path, FLOAT), reference)) < EXACT
    bare = InterpreterSession(legal(quantized(decoder(shape, store), store, formats), store), store)
    assert differences(bare, reference)[0] > 0.1


def test_adapters_take_no_launch_more(tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(adapted(store, Shape(layers=1), MIXED), store)
    session = emitted(module, store, tmp_path, INT8)
    assert max(differences(session, InterpreterSession(module, store))) < 5 * ROUNDED
    kernels = set(re.findall(rb"[a-z]+(?:_[a-z0-9]+)*_\d+(?=\x00)", (tmp_path / "model.so").read_bytes()))
    decode = {n.decode() for n in kernels if b"many" not in n and not n.startswith(b"tvm_")}
    # q, k and v; gate and up; o; down
    assert {n for n in decode if "_low_" in n} == {
        "rms_norm_quantize_low_0", "rms_norm_quantize_low_1", "quantize_low_0", "quantize_low_1",
    }  # fmt: skip
    assert not [n for n in decode if n.startswith("low_rank")]
    assert {"stacked_0", "gated_w4g32_0"} < decode
    assert not [n for n in decode if n.startswith(("float_linear", "elementwise"))]
    floats = [w.type.numel() for w in module.weights.values() if "adapter" in w.attrs]
    about: Description = session._about
    written = [e for e in about.params if ".lora_" in e.name]
    assert sum(e.nbytes for e in written) == 4 * sum(floats) and len(written) == len(floats)
    assert about.read_per_token >= sum(e.nbytes for e in written)


def test_gpus_run_them_as_products_of_floats(tmp_path: Path) -> None:
    from test_cuda import emulated

    store = WeightStore()
    small = Shape(layers=1, hidden=32, heads=2, kv_heads=1, ffn=64)
    module = legal(adapted(store, small, {"": "w4g32"}), store)
    session: TvmSession = emulated(module, store, tmp_path)
    assert CudaDevice(gpu=False).low_rank is None
    assert max(differences(session, InterpreterSession(module, store))) < EXACT
