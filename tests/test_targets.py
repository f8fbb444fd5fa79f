"""Targets and the cost model: files load, no slow path is allowed, bytes are what the emitter writes."""

import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from gammac.diagnostics import CompileError
from gammac.formats import IntegerFormat, parse_format
from gammac.ir import Module, parse
from gammac.targets import cost
from gammac.targets.onnx import any_bits
from gammac.targets.target import (
    BLOCK,
    TABLE,
    Kernel,
    Target,
    load_target,
    parse_target,
    target_names,
)

NAMES = target_names()

# What ONNX Runtime 1.31 runs with packed kernels; elsewhere MatMulNBits expands the weight at every call.
FAST = {
    "MatMulNBits": {2: {32, 64, 128}, 4: {16, 32, 64, 128, 256}, 8: {16, 32, 64, 128, 256}},
    "MatMulAnyBits": {bits: {0, *range(32, 257, 32)} for bits in range(1, 9)},
    "GatherBlockQuantized": {4: {16, 32, 64, 128, 256}, 8: {16, 32, 64, 128, 256}},
}

MODEL = """
module @tiny {
  weight @embed : f32[256,64] = sha256:aa {role = "table", format = "w8g64"}
  weight @up : f32[128,64] = sha256:bb {role = "block", format = "w4g64"}
  weight @down : f32[64,128] = sha256:cc {role = "block", format = "w2g64"}
  weight @norm : f16[64] = sha256:dd
  func @forward(%ids: i64[batch,seq]) {
    %0 = embedding %ids, @embed : f32[batch,seq,64]
    %1 = rms_norm %0, @norm {eps = 1e-5} : f32[batch,seq,64]
    %2 = linear %1, @up : f32[batch,seq,128]
    %3 = linear %2, @down : f32[batch,seq,64]
    %4 = linear %3, @embed : f32[batch,seq,256]
    return logits = %4
  }
}
"""


def module() -> Module:
    return parse(MODEL.replace("f16[64]", "f32[64]"))


# `reference` takes everything, see test_reference_target.py; for GPUs, see test_cuda.py; what TVM writes for
# has kernels of every width
ONNX = [name for name in NAMES if load_target(name).emitter == "onnx"]
EDGE = [name for name in NAMES if load_target(name).emitter == "tvm" and not load_target(name).archs]


@pytest.fixture(params=ONNX)
def target(request: pytest.FixtureRequest) -> Target:
    return load_target(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_loads(name: str) -> None:
    target = load_target(name)
    assert f"{target.name}.toml" in [f.name for f in resources.files("gammac.targets").iterdir()]
    assert target.description and target.sources and target.digest.startswith("sha256:")
    assert target.kernels and target.bandwidth > 0


def test_no_kernel_row_is_on_a_slow_path(target: Target) -> None:
    for kernel in target.kernels:
        for bits in kernel.bits:
            assert set(kernel.groups) <= FAST[kernel.op].get(bits, set()), f"{kernel.op} {bits} bits"
        assert kernel.role == (TABLE if kernel.op == "GatherBlockQuantized" else BLOCK)
        assert kernel.needs_compiler == (kernel.op == "MatMulAnyBits")


@pytest.mark.parametrize("in_features", [64, 96, 100, 192, 576, 1536, 4096])
@pytest.mark.parametrize("role", [BLOCK, TABLE])
def test_formats_are_those_that_kernels_run(target: Target, role: str, in_features: int) -> None:
    everything = [
        IntegerFormat(b, g, s) for b in range(1, 9) for g in range(0, 513, 16) for s in (False, True)
    ]
    fitting = [f for f in everything if f.fit(in_features) == f]
    for compiler in (False, True):
        found = target.formats(role, in_features, compiler=compiler)
        assert list(found) == sorted(found)
        runs = [f for f in fitting if target.kernel_for(f, role, in_features, compiler=compiler)]
        assert set(found) == set(runs)
        assert all(target.fit(f, role, in_features, compiler=compiler) == f for f in found)


def test_stock_runtime_has_no_odd_widths(target: Target) -> None:
    stock = {f.bits for f in target.formats(BLOCK, 4096, compiler=False)}
    assert stock <= {2, 4, 8}
    assert {f.bits for f in target.formats(BLOCK, 4096, compiler=True)} == set(range(1, 9))
    assert {f.bits for f in target.formats(TABLE, 4096, compiler=True)} == {4, 8}


def test_two_bits_need_the_own_kernel_without_avx512() -> None:
    for name, op in {
        "cpu-x86-avx512": "MatMulNBits",
        "cpu-x86-avx2": "MatMulAnyBits",
        "cpu-x86": "MatMulAnyBits",
    }.items():
        kernel = load_target(name).kernel_for(parse_format("w2g64"), BLOCK, 576)
        assert kernel is not None and kernel.op == op


def test_fit_takes_a_smaller_group_that_runs() -> None:
    cpu = load_target("cpu-x86")
    assert cpu.fit(parse_format("w4g128"), TABLE, 576) == parse_format(
        "w4g64"
    )  # 96 divides, but not for tables
    assert cpu.fit(parse_format("w4g128"), BLOCK, 576) == parse_format("w4g96")
    assert cpu.fit(parse_format("w4g128"), BLOCK, 576, compiler=False) == parse_format("w4g64")
    assert cpu.fit(parse_format("w3g64"), BLOCK, 100) == parse_format("w3channel")
    assert cpu.fit(parse_format("w3g64"), TABLE, 576) is None


@pytest.mark.parametrize("name", EDGE)
def test_a_cross_target_says_where_its_figures_come_from(name: str) -> None:
    target = load_target(name)
    assert target.cpu and target.ghz and not target.measured
    kinds = {source.partition(":")[0] for source in target.sources}
    assert kinds <= {"data sheet, not measured", "analysed", "counted", "assumed", "energy"}
    assert {a.bits for a in target.analysed} == set(range(1, 9))
    assert all("for 1024 weights" in a.source for a in target.analysed if a.group == 64)


def test_analysed_rates_come_before_those_of_kernels() -> None:
    pi, kernel = load_target("edge"), load_target("edge").kernels[0]
    assert pi.name == "edge-aarch64-rpi5"
    rates = {(a.bits, a.group): (a.gweights, a.gflops) for a in pi.analysed}
    assert pi.rates(parse_format("w4g96"), kernel) == rates[4, 64]
    assert pi.rates(parse_format("w4g16"), kernel) == rates[4, 32]
    assert pi.rates(parse_format("w4channel"), kernel) == rates[4, 64]
    bare = Target(**{**vars(pi), "analysed": ()})
    assert bare.rates(parse_format("w4g64"), kernel) == (kernel.gweights[0][1], kernel.gflops[0][1])


def test_unknown_target_lists_the_names() -> None:
    with pytest.raises(CompileError, match="no target 'tpu'") as caught:
        load_target("tpu")
    assert all(name in str(caught.value) for name in NAMES)
    with pytest.raises(CompileError, match="no target file"):
        load_target("missing.toml")


def test_own_file(tmp_path: Path) -> None:
    text = (resources.files("gammac.targets") / "cpu-x86.toml").read_text()
    row = '[[measured]]\nop = "linear"\nformat = "w4g64"\nrows = 64\ncolumns = 64\nthreads = 2\nseconds = 1\n'
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('name = "cpu-x86"', 'name = "mine"') + "\n" + row)
    mine = load_target(str(path))
    assert mine.name == "mine" and mine.digest != load_target("cpu-x86").digest
    assert cost.linear_seconds(64, 64, parse_format("w4g64"), mine) == 1.0
    assert cost.linear_seconds(64, 64, parse_format("w8g64"), mine) < 1.0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("threads = 2", "thread = 2", "does not know thread\n  hint: did you mean threads?"),
        (
            "dram_gbps = ",
            "dram_gpbs = ",
            "mine.toml does not know dram_gpbs\n  hint: did you mean dram_",
        ),
        ("overhead_us]", "overheads]", "does not know overheads\n  hint: did you mean overhead_us?"),
        ("gweights", "gweight", "mine.toml: kernel does not know gweight\n  hint: did you mean gweights?"),
        ("threads = 2", "", "lacks threads"),
        ("threads = 2", 'threads = "two"', "threads is a int"),
        ("tie = true", "tie = 1", "tie is a bool"),
        ("default = 2.0", "", "lacks default"),
        ("gweights = {", "gweights = 3 # {", "gweights is a list or a table"),
        ("[[kernel]]", "[kernel]", "kernel"),
        ('op = "MatMulNBits"', "", "lacks op"),
        ("name =", "name", "is not TOML"),
    ],
)
def test_mistakes_in_a_file_are_named(old: str, new: str, said: str) -> None:
    text = (resources.files("gammac.targets") / "cpu-x86.toml").read_text()
    with pytest.raises(CompileError, match=re.escape(said)):
        parse_target(text.replace(old, new), "mine.toml")


# ---- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w3g64", "w3g64-sym", "w5g96", "w1channel", "w3channel-sym", "w6g32"])
@pytest.mark.parametrize("shape", [(7, 576), (64, 96), (1, 64), (130, 160)])
def test_any_bits_bytes_are_what_is_packed(name: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    format_ = parse_format(name).fit(columns)
    group = format_.inputs_per_scale(columns)
    packed = any_bits.packed_bytes(rows, columns, format_.bits, group, not format_.symmetric)
    assert cost.stored_bytes(rows, columns, format_, load_target("cpu-x86")) == packed


def test_nbits_bytes() -> None:
    cpu = load_target("cpu-x86")
    # codes, f16 scales of 3 groups, zeros of 3 groups at 4 bits in 2 bytes a row
    assert cost.stored_bytes(10, 192, parse_format("w4g64"), cpu) == 10 * (96 + 6 + 2)
    assert cost.stored_bytes(10, 192, parse_format("w8g64-sym"), cpu) == 10 * (192 + 6)
    with pytest.raises(CompileError, match="does not run w3g64 on table"):
        cost.stored_bytes(10, 192, parse_format("w3g64"), cpu, TABLE)


def test_stored_bytes_hold_the_storage_bits(target: Target) -> None:
    for role in (BLOCK, TABLE):
        for format_ in target.formats(role, 576, compiler=True):
            stored = cost.stored_bytes(192, 576, format_, target, role)
            assert format_.storage_bits(192, 576) <= 8 * stored


def test_seconds_grow_with_everything(target: Target) -> None:
    bits = [cost.linear_seconds(4096, 4096, IntegerFormat(b, 128), target) for b in range(1, 9)]
    # up to 3 bits decoding bounds MatMulAnyBits, above it memory; MatMulNBits is slower at 4 and 8 bits
    assert bits[0] <= bits[2] <= bits[4] <= bits[5] <= bits[6]
    one, many = (cost.linear_seconds(4096, 4096, IntegerFormat(4, 64), target, t) for t in (1, 512))
    assert one < many
    assert cost.linear_seconds(64, 64, None, target) < cost.linear_seconds(4096, 4096, None, target)
    assert one < cost.linear_seconds(4096, 4096, None, target)


def test_seconds_are_near_what_was_measured() -> None:
    """One thread, 4096x4096, microseconds on the machine that the figures are from; bound 25 %."""
    one = {"threads": 1}
    avx512 = load_target("cpu-x86-avx512")
    one_thread = Target(**{**vars(avx512), **one})
    measured = {
        "w2g64": 196,
        "w2g128": 157,
        "w4g64": 283,
        "w4g128": 275,
        "w8g64": 460,
        "w8g128": 400,
        "w3g128": 196,
    }
    for name, microseconds in measured.items():
        found = 1e6 * cost.linear_seconds(4096, 4096, parse_format(name), one_thread)
        assert np.isclose(found, microseconds, rtol=0.25), name


def test_module_cost() -> None:
    cpu, m = load_target("cpu-x86"), module()
    found = cost.module_cost(m, cpu, extra_bytes=1000)
    assert found.payload_bits == 3.0
    assert found.true_bits == (2 * 8192 * 3 + 128 * 1 * 20 + 64 * 2 * 18) / (2 * 8192)
    rows = {r.name: r for r in cost.weight_costs(m, cpu)}
    assert found.bytes == sum(r.bytes for r in rows.values()) + 1000
    assert rows["norm"].bytes == 256 and rows["norm"].format == "" and rows["norm"].decode_seconds == 0
    assert rows["embed"].decode_seconds > 0, "the head reads the table"
    assert 0 < sum(r.decode_seconds for r in rows.values()) < found.decode_seconds < found.prefill_seconds
    assert found.peak_bytes > found.bytes
    other = cost.module_cost(m, cpu, {"up": "w8g64"}, extra_bytes=1000)
    assert other.payload_bits == 5.0 and other.bytes > found.bytes


def test_float_modules_have_a_cost() -> None:
    bare = parse(
        MODEL.replace(', format = "w8g64"', "")
        .replace(', format = "w4g64"', "")
        .replace(', format = "w2g64"', "")
        .replace("f16[64]", "f32[64]")
    )
    found = cost.module_cost(bare, load_target("cpu-x86"))
    assert found.payload_bits == found.true_bits == found.whole_model_bits == 32


def test_attention_reads_the_cache() -> None:
    text = """
    module @m {
      func @decode(%q: f32[1,8,seq,64], %k: f32[1,2,past+seq,64], %v: f32[1,2,past+seq,64]) {
        %0 = attention %q, %k, %v {scale = 0.125, causal = true} : f32[1,8,seq,64]
        return y = %0
      }
    }
    """
    cpu = load_target("cpu-x86")
    found = cost.module_cost(parse(text), cpu).decode_seconds
    cache = 2 * 2 * (cost.CONTEXT + 1) * 64 * 4
    assert found == pytest.approx(2e-6 + cache / (cpu.attention_gbps * cpu.threads * 1e9))


def test_a_rate_is_that_of_the_largest_group_below() -> None:
    kernel = Kernel("op", (4,), (0, 16, 96, 128), ((32, 1.0), (64, 2.0)), ((32, 1.0),))
    rates = [kernel.rate(kernel.gweights, IntegerFormat(4, group)) for group in (16, 96, 128, 0)]
    assert rates == [1.0, 2.0, 2.0, 2.0]
