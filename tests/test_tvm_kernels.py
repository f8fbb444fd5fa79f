"""Kernels of the TVM backend: each equals `dequantize(q) @ x`, over formats, shapes and instruction sets."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gammac.diagnostics import CompileError
from gammac.formats import IntegerFormat, parse_format
from gammac.targets.target import load_target

tvm = pytest.importorskip("tvm", reason="the extra tvm is not installed")

from kernel_inputs import (  # noqa: E402
    EPSILON,
    build,
    call,
    error,
    inputs,
    numbered,
    quantized_inputs,
    random_weight,
)

from gammac.targets.tvm.kernels import (  # noqa: E402
    ISAS,
    Isa,
    Kernel,
    Layout,
    decode_linear,
    gated_linear,
    isa_of,
    leaves,
    pack,
    packed_bytes,
    prefill_linear,
    quantize_activations,
    rms_norm_quantize,
    stacked_linear,
)
from gammac.targets.tvm.kernels.isa import host_flags  # noqa: E402
from gammac.targets.tvm.tir.vectors import T, splat_int  # noqa: E402

HOST = isa_of("cpu")
# the leaf of AVX-VNNI is tested with the same instructions of AVX-512, that of NEON and RVV with AVX2's
HERE = {
    **ISAS,
    "words": replace(ISAS["avx2"], name="words", leaf="words"),
    "avxvnni": replace(ISAS["avxvnni"], llvm=ISAS["avx512vnni"].llvm, cpu_flags=ISAS["avx512vnni"].cpu_flags),
}
FORMATS = [
    "w1g32", "w2g16", "w2g128-sym", "w3g64", "w3g96-sym", "w3g16", "w4g64", "w4g32-sym", "w4channel", "w5g64",
    "w5g48", "w6g32", "w6channel-sym", "w7g64", "w7g16-sym", "w8g128", "w8channel-sym", "w3g256", "w2g20",
    "nf2g64", "nf3g32", "nf4g64", "nf4channel", "nf4g64-offset", "nf3channel-offset",
]  # fmt: skip


def runnable(isa: Isa) -> bool:
    return isa.machine == HOST.machine and host_flags().issuperset(isa.cpu_flags)


@cache
def built(make: Any, format_: str, rows: int, columns: int, isa: str, integer: bool) -> tuple[Kernel, Any]:
    kernel = make(parse_format(format_), rows, columns, HERE[isa], integer=integer)
    return kernel, build(kernel, HERE[isa])


def check(format_: str, rows: int, columns: int, isa: Isa, integer: bool, tokens: int) -> None:
    weight = random_weight(parse_format(format_), rows, columns)
    make = decode_linear if tokens == 1 else prefill_linear
    kernel, library = built(make, format_, rows, columns, isa.name, integer)
    x = inputs(tokens, columns)
    given_, meant = quantized_inputs(x, Layout(weight.format, rows, columns)) if integer else ({"x": x}, x)
    y = call(kernel, library, {**given_, **pack(weight, isa)}, tokens)["y"]
    # one rounding for each product and sum of a chain; with int8 inputs only scales are rounded
    chain = 3 * Layout(weight.format, rows, columns).groups + 3 if integer else columns + 4
    bound = EPSILON / 2 * chain
    assert error(y, meant.astype(np.float64), weight, integer) < bound


@pytest.mark.parametrize("format_", FORMATS)
def test_decode_equals_dequantize(format_: str) -> None:
    columns = 320 if "g20" in format_ else 768
    for integer in (False, True):
        check(format_, 40, columns, HOST, integer, 1)


@pytest.mark.parametrize(
    "format_", ["w1g32", "w2g128-sym", "w3g16", "w3g256", "w4channel", "w6g32", "w8g128"]
)
def test_prefill_equals_dequantize_for_any_number_of_tokens(format_: str) -> None:
    for tokens in (2, 9):
        check(format_, 24, 768, HOST, True, tokens)
    check(format_, 24, 768, HOST, False, 9)


@pytest.mark.parametrize("isa", [name for name, isa in HERE.items() if isa.machine == HOST.machine])
@pytest.mark.parametrize("format_", ["w3g32", "w8g64", "w1channel-sym"])
def test_every_instruction_set_of_this_machine(isa: str, format_: str) -> None:
    if not runnable(HERE[isa]):
        pytest.skip(f"this machine has no {isa}")
    for integer in (True, False):
        check(format_, 20, 64, HERE[isa], integer, 1)
    check(format_, 20, 64, HERE[isa], True, 5)


@pytest.mark.parametrize("isa", [name for name, isa in HERE.items() if isa.machine == HOST.machine])
def test_levels_are_looked_up(isa: str) -> None:
    if not runnable(HERE[isa]):
        pytest.skip(f"this machine has no {isa}")
    check("nf3g32", 20, 64, HERE[isa], False, 1)
    if HERE[isa].leaf in ("pmaddwd", "words"):
        with pytest.raises(CompileError, match="looks no bytes up"):
            decode_linear(parse_format("nf3g32"), 20, 64, HERE[isa], integer=True)
        return
    for tokens in (1, 5):
        check("nf3g32", 20, 64, HERE[isa], True, tokens)


@pytest.mark.parametrize("shape", [(1, 4), (5, 50), (16, 97), (17, 130), (33, 300)])
@pytest.mark.parametrize("format_", ["w3channel", "w4channel-sym"])
def test_rows_and_inputs_that_fill_no_vector(format_: str, shape: tuple[int, int]) -> None:
    for integer in (True, False):
        check(format_, *shape, HOST, integer, 1)
    check(format_, *shape, HOST, True, 3)


def test_large_prompts_are_cut_into_portions() -> None:
    check("w4g32", 16, 64, HOST, True, 521)


@pytest.mark.parametrize("isa", ["avx2", "words", "avx512vnni"])
def test_extreme_codes_and_inputs_do_not_overflow(isa: str) -> None:
    """255 * 127 twice is more than 16 bits hold: the case that vpmaddubsw saturates."""
    if not runnable(HERE[isa]):
        pytest.skip(f"this machine has no {isa}")
    for name in ("w8g64-sym", "w7g64-sym", "w4g64-sym"):
        format_ = parse_format(name)
        for code in (0, format_.levels):
            codes = torch.full((16, 64), code, dtype=torch.uint8)
            weight = format_.quantized(codes, torch.ones(16, 1, dtype=torch.float16))
            kernel, library = built(decode_linear, name, 16, 64, isa, True)
            for sign in (1, -1):
                given_, meant = quantized_inputs(np.full((1, 64), sign, np.float32), Layout(format_, 16, 64))
                y = call(kernel, library, {**given_, **pack(weight, HERE[isa])}, 1)["y"]
                assert error(y, meant, weight, True) < 4 * EPSILON


@pytest.mark.parametrize("format_", ["w3g32", "w8g64-sym"])
def test_sdot_by_its_definition(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NEON's instruction replaced by what it is said to do, so that the leaf around it runs here."""

    def sdot(_: str, name: str, total: Any, codes: Any, spread: Any) -> Any:
        assert name == "llvm.aarch64.neon.sdot.v4i32.v16i8"
        words = [T.Bind(T.reinterpret("int32x4", operand)) for operand in (codes, spread)]
        for j in range(4):
            left, right = ((w << splat_int(24 - 8 * j, 4)) >> splat_int(24, 4) for w in words)
            total = total + left * right
        return total

    monkeypatch.setattr(leaves.tirx, "call_llvm_pure_intrin", sdot)
    isa = replace(ISAS["generic"], name="sdot here", leaf="sdot")
    monkeypatch.setitem(HERE, isa.name, isa)
    check(format_, 20, 64, isa, True, 1)


def test_int8_inputs_cost_little_more_than_the_weights_do() -> None:
    """Rounding to 127 steps of a group's largest input: an error of about a percent of the output's size."""
    format_ = parse_format("w4g64")
    weight = random_weight(format_, 64, 1024)
    x = inputs(4, 1024)
    kernel, library = built(prefill_linear, "w4g64", 64, 1024, HOST.name, True)
    given_, _ = quantized_inputs(x, Layout(format_, 64, 1024))
    y = call(kernel, library, {**given_, **pack(weight, HOST)}, 4)["y"]
    exact = x.astype(np.float64) @ weight.dequantize().double().numpy().T
    relative = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert 1e-4 < relative < 0.012


# ---- layout -------------------------------------------------------------------------------------


@given(
    bits=st.integers(1, 8), group=st.sampled_from([0, 16, 32, 64, 96, 128]), symmetric=st.booleans(),
    rows=st.integers(1, 40), groups=st.integers(1, 3), isa=st.sampled_from(sorted(ISAS)),
)  # fmt: skip
def test_packed_bytes_are_known_before(
    bits: int, group: int, symmetric: bool, rows: int, groups: int, isa: str
) -> None:
    format_, columns = IntegerFormat(bits, group, symmetric), (group or 37) * groups
    arrays = pack(random_weight(format_, rows, columns), ISAS[isa])
    assert packed_bytes(format_, rows, columns, ISAS[isa]) == sum(
        -(-a.nbytes // 64) * 64 for a in arrays.values()
    )
    kernel = decode_linear(format_, rows, columns, ISAS[isa], integer=True)
    shapes = {o.name: o.shape for o in kernel.inputs if not o.name.startswith("x")}
    assert shapes == {name: a.shape for name, a in arrays.items()}


def test_layout_does_not_depend_on_the_vectors() -> None:
    weight = random_weight(parse_format("w3g32"), 20, 64)
    one, two = pack(weight, ISAS["avx512vnni"]), pack(weight, ISAS["neon"])
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_groups_without_a_kernel_are_refused() -> None:
    with pytest.raises(CompileError, match="no kernel for groups of 200"):
        decode_linear(parse_format("w4g200"), 16, 400, HOST, integer=False)


# ---- activations --------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "group"), [(256, 64), (100, 20), (50, 128), (288, 96)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_activations_are_rounded_to_int8(columns: int, group: int, tokens: int) -> None:
    kernel = quantize_activations(columns, group, 1 if tokens == 1 else "m")
    x = inputs(tokens, columns)
    x[0, :group] = 0
    layout = Layout(IntegerFormat(4, group), 1, columns)
    expected, _ = quantized_inputs(x, layout)
    out = call(kernel, build(kernel, HOST), {"x": x}, tokens)
    np.testing.assert_allclose(out["x_scales"], expected["x_scales"], rtol=2 * EPSILON)
    # a product that ends between two codes may go either way
    assert np.abs(out["x_codes"].astype(int) - expected["x_codes"]).max() <= 1
    assert (out["x_codes"] != expected["x_codes"]).mean() < 0.01
    assert not out["x_codes"][:, columns:].any()
    groups = np.arange(0, columns, group)
    np.testing.assert_array_equal(
        out["x_sums"], np.add.reduceat(out["x_codes"][:, :columns].astype(int), groups, 1)
    )


@pytest.mark.parametrize("tokens", [1, 3])
def test_norm_and_rounding_in_one(tokens: int) -> None:
    columns, group = 192, 64
    kernel = rms_norm_quantize(columns, group, 1 if tokens == 1 else "m", 1e-5)
    x, weight = inputs(tokens, columns), inputs(1, columns, 2)[0]
    out = call(kernel, build(kernel, HOST), {"x": x, "weight": weight}, tokens)
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * weight
    scales = np.repeat(out["x_scales"], group, 1)
    assert (np.abs(out["x_codes"] * scales - normed) <= scales * 0.501).all()


# ---- instruction sets ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isa", "instruction"),
    [
        ("avx512vnni", "vpdpbusd"), ("avxvnni", "vpdpbusd"), ("avx2", "vpmaddubsw"), ("generic", "pmaddwd"),
        ("neon-dotprod", "sdot"), ("neon", "smlal"), ("rvv", "vwmacc"), ("armv7", "vmla.i16"),
    ],
)  # fmt: skip
def test_kernels_use_the_instructions(isa: str, instruction: str) -> None:
    kernel = decode_linear(parse_format("w4g32"), 16, 64, ISAS[isa], integer=True)
    assert instruction in build(kernel, ISAS[isa]).mod.inspect_source("asm")


@pytest.mark.parametrize("isa", ["avx512vnni", "avx2"])
def test_sums_stay_in_registers(isa: str) -> None:
    """No buffer of ours becomes a call for memory; with 32 registers, decoding spills none of them."""
    kernel = decode_linear(parse_format("w3g64"), 64, 256, ISAS[isa], integer=True)
    assembly = build(kernel, ISAS[isa]).mod.inspect_source("asm")
    assert "AllocWorkspace" not in assembly
    assert not [line for line in assembly.splitlines() if "%zmm" in line and "(%rsp)" in line]


def test_isa_of_names_and_targets() -> None:
    assert isa_of("avx2") is ISAS["avx2"]
    assert isa_of(load_target("cpu-x86-avx512")) is ISAS["avx512vnni"]
    with pytest.raises(CompileError, match="no TVM kernels for 'z80'"):
        isa_of("z80")


# ---- several in one -----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("integer", [True, False])
def test_bias_and_residual(tokens: int, integer: bool) -> None:
    weight = random_weight(parse_format("w4g32"), 21, 64)
    make = decode_linear if tokens == 1 else prefill_linear
    kernel = make(weight.format, 21, 64, HOST, integer=integer, bias=True, residual=True)
    x, bias, residual = inputs(tokens, 64), inputs(1, 21, 2)[0], inputs(tokens, 21, 3)
    given_, meant = quantized_inputs(x, Layout(weight.format, 21, 64)) if integer else ({"x": x}, x)
    arrays = {**given_, **pack(weight, HOST), "bias": bias, "residual": residual}
    y = call(kernel, build(kernel, HOST), arrays, tokens)["y"]
    expected = meant @ weight.dequantize().numpy().T + bias + residual
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("integer", [True, False])
def test_gate_and_up_in_one(tokens: int, integer: bool) -> None:
    formats = (parse_format("w3g32"), parse_format("w4g32-sym"))
    gate, up = (random_weight(f, 37, 64, seed) for seed, f in enumerate(formats))
    kernel = gated_linear(formats, 37, 64, HOST, integer=integer, tokens=1 if tokens == 1 else "m")
    x = inputs(tokens, 64)
    given_, meant = quantized_inputs(x, Layout(formats[0], 37, 64)) if integer else ({"x": x}, x)
    y = call(kernel, build(kernel, HOST), {**given_, **numbered([gate, up], HOST)}, tokens)["y"]
    g, u = (meant @ w.dequantize().double().numpy().T for w in (gate, up))
    np.testing.assert_allclose(y, g / (1 + np.exp(-g)) * u, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_weights_of_several_formats_in_one_launch(tokens: int) -> None:
    formats, rows = tuple(map(parse_format, ("w3g32", "w4g32-sym", "w8g32"))), (40, 17, 16)
    weights = [random_weight(f, n, 64, n) for f, n in zip(formats, rows, strict=True)]
    kernel = stacked_linear(formats, rows, 64, HOST, integer=True, tokens=1 if tokens == 1 else "m")
    given_, meant = quantized_inputs(inputs(tokens, 64), Layout(formats[0], 40, 64))
    y = call(kernel, build(kernel, HOST), {**given_, **numbered(weights, HOST)}, tokens)["y"]
    for part, weight in zip(np.split(y, np.cumsum(rows)[:-1], 1), weights, strict=True):
        assert error(part, meant, weight, True) < 10 * EPSILON


def test_weights_that_share_inputs_share_their_groups() -> None:
    formats = (parse_format("w4g32"), parse_format("w4g64"))
    with pytest.raises(CompileError, match="activation groups of 32 and 64"):
        gated_linear(formats, 16, 64, HOST, integer=True, tokens=1)
    assert gated_linear(formats, 16, 64, HOST, integer=False, tokens=1)
