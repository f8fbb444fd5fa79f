"""Trellis codes in TVM: kernels that read the streams equal `dequantize(q) @ x`; artifacts run from them."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.formats import parse_format
from gammac.ir import parse
from gammac.targets.cost import stored_bytes
from gammac.targets.target import load_target

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from kernel_inputs import EPSILON, build, call, error, inputs, quantized_inputs
from test_tvm_kernels import HERE, HOST, check, random_weight, runnable

from gammac.targets.tvm.kernels import (
    ISAS,
    Packable,
    gated_linear,
    layout_of,
    pack,
    packed_bytes,
    stacked_linear,
)
from gammac.targets.tvm.toolchain import find_linker

FORMATS = ["tcq1", "tcq2", "tcq3", "tcq4", "tcq2g64", "tcq3-l8", "tcq4-l16"]


@pytest.mark.parametrize("format_", FORMATS)
def test_products_equal_dequantize(format_: str) -> None:
    """19 panels are two tiles, of nine and of ten."""
    for integer, tokens in ((True, 1), (True, 19), (False, 1)):
        check(format_, 304, 320, HOST, integer, tokens)


@pytest.mark.parametrize("shape", [(16, 50), (256, 97), (272, 130), (768, 300)])
def test_any_number_of_inputs_and_of_tiles(shape: tuple[int, int]) -> None:
    for format_, integer, tokens in (("tcq2", True, 1), ("tcq3", True, 3), ("tcq4", False, 1)):
        check(format_, *shape, HOST, integer, tokens)


@pytest.mark.parametrize("isa", [name for name, isa in HERE.items() if isa.machine == HOST.machine])
def test_every_instruction_set_of_this_machine(isa: str) -> None:
    if not runnable(HERE[isa]):
        pytest.skip(f"this machine has no {isa}")
    for format_, integer, tokens in (("tcq2", True, 1), ("tcq3", True, 5), ("tcq4g32", False, 1)):
        check(format_, 272, 64, HERE[isa], integer, tokens)


@pytest.mark.parametrize("integer", [True, False])
def test_weights_that_share_their_inputs(integer: bool) -> None:
    """q, k and v of different widths in one launch, gate and up in another."""
    x = inputs(1, 96)
    given, meant = {"x": x}, x.astype(np.float64)
    named = [parse_format(name) for name in ("tcq2", "tcq4", "tcq3")]
    weights = [random_weight(format_, 32, 96, seed) for seed, format_ in enumerate(named)]
    formats = tuple(weight.format for weight in weights)
    if integer:
        given, meant = quantized_inputs(x, layout_of(formats[0], 32, 96))
    kernel = stacked_linear(formats, (32,) * 3, 96, HOST, integer=integer, tokens=1)
    arrays = {f"{kind}{i}": a for i, w in enumerate(weights) for kind, a in pack(w, HOST).items()}
    y = call(kernel, build(kernel, HOST), {**given, **arrays}, 1)["y"]
    for i, weight in enumerate(weights):
        assert error(y[:, 32 * i : 32 * i + 32], meant, weight) < 50 * EPSILON
    gated = gated_linear(formats[:2], 32, 96, HOST, integer=integer, tokens=1)
    found = call(gated, build(gated, HOST), {**given, **arrays}, 1)["y"]
    gate, up = (meant @ weight.dequantize().numpy().T for weight in weights[:2])
    np.testing.assert_allclose(found, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-4)


def test_the_target_knows_which_rows_have_a_kernel() -> None:
    target, format_ = load_target("cpu-x86-avx512", "tvm"), parse_format("tcq2")
    assert target.fit(format_, "block", 64, rows=48) == format_
    assert target.fit(format_, "block", 64, rows=40) is None
    assert target.fit(parse_format("w2g64"), "block", 64, rows=40) is not None


def test_other_numbers_of_rows_are_refused() -> None:
    format_ = parse_format("tcq2")
    assert isinstance(format_, Packable)
    with pytest.raises(CompileError, match="tcq2 has a TVM kernel for multiples of 16 rows, not for 40"):
        layout_of(format_, 40, 64)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(64, 768), (304, 576), (16, 100), (32, 98)])
def test_what_is_packed_is_what_the_format_stores(name: str, shape: tuple[int, int]) -> None:
    format_, target = parse_format(name).fit(shape[1]), load_target("cpu-x86-avx512", "tvm")
    assert isinstance(format_, Packable)
    arrays = pack(random_weight(format_, *shape), ISAS["avx512vnni"])
    if shape[1] % 4 == 0:
        assert 8 * sum(a.nbytes for a in arrays.values()) == format_.storage_bits(*shape)
    padded = sum(-(-a.nbytes // 64) * 64 for a in arrays.values())
    assert packed_bytes(format_, *shape, ISAS["avx512vnni"]) == padded
    assert stored_bytes(*shape, format_, target) == padded


@pytest.mark.skipif(find_linker() is None, reason="nothing links a shared library")
def test_compile_to_trellises_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model, with tables in integers."""
    monkeypatch.setenv("GAMMAC_CACHE", str(tmp_path / "cache"))
    wanted = ["--backend", "tvm", "--formats", "tcq2-l8,tcq4-l8", "--quantizer", "tcq", "--budget", "3"]
    quick = ["--calibration-windows", "4", "--calibration-length", "64", "--strategy", "weight_mse"]
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["compile", "tiny", "-o", str(out), *wanted, *quick])
    assert result.exit_code == 0, result.output
    module = parse((out / "module.gir").read_text())
    stored = {str(w.attrs["stored"]) for w in module.weights.values() if w.attrs.get("role") == "block"}
    assert stored == {"tcq2-l8", "tcq4-l8"}
    said = CliRunner().invoke(main, ["run", str(out), "--prompt", "The", "--max-new-tokens", "4"])
    assert said.exit_code == 0, said.output
