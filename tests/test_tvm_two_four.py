"""2:4 weights in TVM: kernels that read the packed form equal `dequantize(q) @ x`; artifacts run from it."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from gammac.cli import main
from gammac.formats import is_two_four, load_quantized, parse_format
from gammac.ir import parse
from gammac.targets.cost import stored_bytes
from gammac.targets.target import load_target
from gammac.weights import WeightStore

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from test_tvm_kernels import HERE, HOST, check, random_weight, runnable

from gammac.targets.tvm.kernels import ISAS, Layout, Packable, pack, packed_bytes
from gammac.targets.tvm.toolchain import find_linker

FORMATS = ["s24w2g64", "s24w3g64", "s24w4g64", "s24w5g32-hw", "s24w8g64", "s24w4g64-hw", "s24w3channel-hw"]


@pytest.mark.parametrize("format_", [*FORMATS, "s24w4g16", "s24w6g128", "s24w4g256-hw", "s24w7g96"])
def test_decode_equals_dequantize(format_: str) -> None:
    for integer in (False, True):
        check(format_, 40, 768, HOST, integer, 1)


@pytest.mark.parametrize("format_", ["s24w2g64", "s24w3g32", "s24w4g64-hw", "s24w8channel"])
def test_prefill_equals_dequantize_for_any_number_of_tokens(format_: str) -> None:
    for integer, tokens in ((True, 2), (True, 9), (False, 9)):
        check(format_, 24, 576, HOST, integer, tokens)


@pytest.mark.parametrize("isa", [name for name, isa in HERE.items() if isa.machine == HOST.machine])
@pytest.mark.parametrize("format_", ["s24w4g32", "s24w3g64-hw"])
def test_every_instruction_set_of_this_machine(isa: str, format_: str) -> None:
    if not runnable(HERE[isa]):
        pytest.skip(f"this machine has no {isa}")
    for integer in (True, False):
        check(format_, 20, 64, HERE[isa], integer, 1)
    check(format_, 20, 64, HERE[isa], True, 5)


@pytest.mark.parametrize("shape", [(1, 4), (5, 52), (17, 132), (33, 300)])
@pytest.mark.parametrize("format_", ["s24w3channel", "s24w4channel-hw"])
def test_rows_and_inputs_that_fill_no_vector(format_: str, shape: tuple[int, int]) -> None:
    for integer in (True, False):
        check(format_, *shape, HOST, integer, 1)
    check(format_, *shape, HOST, True, 3)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_packed_is_the_packed_form(name: str) -> None:
    """No more than the format stores, where nothing fills up panels and supersteps."""
    format_ = parse_format(name)
    assert isinstance(format_, Packable)
    weight = random_weight(format_, 32, 768)
    arrays = pack(weight, HOST)
    assert 8 * sum(a.nbytes for a in arrays.values()) == format_.storage_bits(32, 768)
    assert sum(-(-a.nbytes // 64) * 64 for a in arrays.values()) == packed_bytes(format_, 32, 768, HOST)
    assert Layout(format_, 32, 768).panel_bytes == arrays["codes"].shape[1]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(32, 768), (40, 576), (7, 100)])
def test_the_cost_model_knows_the_packed_bytes(name: str, shape: tuple[int, int]) -> None:
    format_, target = parse_format(name).fit(shape[1]), load_target("cpu-x86-avx512", "tvm")
    assert isinstance(format_, Packable)
    isa = ISAS["avx512vnni"]
    assert stored_bytes(*shape, format_, target) == packed_bytes(format_, *shape, isa)


@pytest.mark.skipif(find_linker() is None, reason="nothing links a shared library")
def test_compile_to_two_four_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model: refused nowhere, checked against the original, two of four in what was written."""
    monkeypatch.setenv("GAMMAC_CACHE", str(tmp_path / "cache"))
    wanted = ["--backend", "tvm", "--sparsity", "2:4", "--formats", "w4g64,w8g64", "--budget", "3.5"]
    quick = ["--calibration-windows", "4", "--calibration-length", "64", "--strategy", "weight_mse"]
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["compile", "tiny", "-o", str(out), *wanted, *quick])
    assert result.exit_code == 0, result.output
    module = parse((out / "module.gir").read_text())
    store, seen = WeightStore(tmp_path / "cache" / "weights"), set()
    for weight in module.weights.values():
        if weight.attrs.get("role") == "block":
            seen.add(str(weight.attrs["stored"]))
            assert is_two_four(load_quantized(weight, store).dequantize()).all()
    assert seen == {"s24w4g64", "s24w8g64"}
    said = CliRunner().invoke(main, ["run", str(out), "--prompt", "The", "--max-new-tokens", "4"])
    assert said.exit_code == 0, said.output
