"""CUDA artifacts without a GPU: the kernels as loops on the CPU, device code compiled and read."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import captured
from onnx_models import Shape, decoder, quantized
from test_tvm import EXACT, differences, legal

from gammac.budget import parse_budgets
from gammac.diagnostics import CompileError
from gammac.formats import IntegerFormat, Quantized, TwoFourFormat, parse_format
from gammac.formats.trellis import unpack
from gammac.formats.two_four import PATTERNS
from gammac.ir import Module
from gammac.passes.allocate import Allocate
from gammac.pipeline import Context
from gammac.runtime.reference import InterpreterSession
from gammac.targets.cost import linear_seconds, module_cost, stored_bytes
from gammac.targets.target import BLOCK, TABLE, load_target, target_names
from gammac.weights import WeightStore

pytest.importorskip("tvm", reason="needs the extra tvm")

from kernel_inputs import random_weight

from gammac.runtime import tvm_cuda
from gammac.runtime.tvm_session import TvmSession
from gammac.targets.tvm.build import build_library
from gammac.targets.tvm.cuda import emit as cuda_emit
from gammac.targets.tvm.cuda import products
from gammac.targets.tvm.cuda.kernels import CudaDevice
from gammac.targets.tvm.cuda.layout import Layout, layout_of, pack
from gammac.targets.tvm.cuda.report import parse_reports
from gammac.targets.tvm.cuda.toolkit import check_archs, demand_nvcc, find_nvcc
from gammac.targets.tvm.emit import write_program
from gammac.targets.tvm.kernels import isa_of, lowering
from gammac.targets.tvm.params import ParamFile
from gammac.targets.tvm.toolchain import find_linker

pytestmark = pytest.mark.skipif(find_linker() is None, reason="nothing links a shared library")
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")

BOARDS = [name for name in target_names() if load_target(name).archs]
INTEGERS = ["w1g32", "w2g16", "w3g64-sym", "w4g48", "w5channel", "w6g96", "w7g128-sym", "w8g64"]
LEVELS = ["nf2g64", "nf3g32", "nf4channel", "nf4g64-offset"]
SPARSE = ["s24w2channel-hw", "s24w4g64-hw", "s24w8g32-hw"]
TRELLIS = ["tcq1", "tcq2g64", "tcq3", "tcq3-l8", "tcq4-l16"]


def packed_weight(name: str, rows: int, columns: int) -> tuple[Quantized, dict[str, Any], Layout]:
    """A weight as kernels read it; the arrays are those that the layout promises."""
    weight = random_weight(parse_format(name).fit(columns), rows, columns)
    packed, layout = pack(weight), layout_of(weight.format, rows, columns)
    assert {n: (a.shape, str(a.dtype)) for n, a in packed.items()} == layout.parts
    return weight, packed, layout


# ---- the layout ---------------------------------------------------------------------------------


def chunk_words(words: Any, layout: Layout, four: int, chunk: int) -> Any:
    """The words of 32 inputs of a four, [loads, 4], read as the layout's head says."""
    strip = chunk // 32
    width = min(32, layout.chunks - 32 * strip)
    first = strip * 32 * layout.bits * 4 + chunk % 32 * 4
    return np.stack([words[four, first + load * 4 * width :][:4] for load in range(layout.bits)])


def bits_at(words: Any, first: int, count: int) -> int:
    """Some bits of words that follow one another."""
    return int.from_bytes(words.tobytes(), "little") >> first & ((1 << count) - 1)


def code_at(words: Any, layout: Layout, row: int, column: int) -> int:
    """One code."""
    own = chunk_words(words, layout, row // 4, column // 32)[:, row % 4]
    return bits_at(own, column % 32 * layout.bits, layout.bits)


@pytest.mark.parametrize("name", INTEGERS + LEVELS)
@pytest.mark.parametrize(("rows", "columns"), [(18, 96), (5, 1120), (16, 50)])
def test_codes_lie_as_the_layout_says(name: str, rows: int, columns: int) -> None:
    if parse_format(name).fit(columns).group % 16:
        with pytest.raises(CompileError, match="there is no CUDA kernel for groups of"):
            packed_weight(name, rows, columns)
        return
    weight, packed, layout = packed_weight(name, rows, columns)
    rng = np.random.default_rng(1)
    for row, column in zip(rng.integers(0, rows, 50), rng.integers(0, columns, 50), strict=True):
        assert code_at(packed["codes"], layout, int(row), int(column)) == weight.codes[row, column]
    # what fills up a block has scale 0
    assert not packed["scales"].transpose(0, 2, 1).reshape(-1, layout.groups)[rows:].any()


@pytest.mark.parametrize("name", TRELLIS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 96), (272, 1120), (768, 50)])
def test_the_codes_of_a_column_lie_together(name: str, rows: int, columns: int) -> None:
    weight, packed, layout = packed_weight(name, rows, columns)
    bits = layout.bits
    codes = unpack(weight.parts["packed"], bits, rows).numpy().astype(int)
    rng = np.random.default_rng(1)
    for four, column in zip(rng.integers(0, rows // 4, 50), rng.integers(0, columns, 50), strict=True):
        first, second, third, last = codes[column, 4 * four : 4 * four + 4]
        wanted = ((first << bits | second) << bits | third) << bits | last
        words = chunk_words(packed["codes"], layout, four, int(column) // 32)
        assert bits_at(words, int(column) % 32 * 4 * bits, 4 * bits) == wanted


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(("rows", "columns"), [(18, 96), (5, 1120), (16, 52)])
def test_kept_codes_and_positions_lie_together(name: str, rows: int, columns: int) -> None:
    weight, packed, layout = packed_weight(name, rows, columns)
    assert isinstance(weight.format, TwoFourFormat)
    width = weight.format.width
    rng = np.random.default_rng(1)
    for row, group in zip(rng.integers(0, rows, 50), rng.integers(0, columns // 4, 50), strict=True):
        # a group of four has as many bits as four codes
        own = chunk_words(packed["codes"], layout, row // 4, int(group) // 8)[:, row % 4]
        first = int(group) % 8 * 4 * layout.bits
        kept = [bits_at(own, first + i * width, width) for i in range(2)]
        assert kept == weight.parts["codes"][row, 2 * group : 2 * group + 2].tolist()
        places = tuple(bits_at(own, first + 2 * width + 2 * i, 2) for i in range(2))
        assert places == PATTERNS[weight.parts["patterns"][row, group]]


def test_patterns_and_odd_widths_have_no_kernel() -> None:
    device = CudaDevice(gpu=False)
    taken = {name: device.takes(parse_format(name)) for name in ("s24w4g64-hw", "s24w4g64", "s24w3g64-hw")}
    assert taken == {"s24w4g64-hw": True, "s24w4g64": False, "s24w3g64-hw": False}
    assert not any(device.takes(parse_format(name)) for name in ("s24f16-hw", "nf4g64-dq", "fdb2g64"))
    for name in taken:
        fits = load_target("cuda").fit(parse_format(name), BLOCK, 64) is not None
        assert fits == taken[name]


def test_rows_that_fill_no_block_are_refused() -> None:
    with pytest.raises(CompileError, match="tcq2 has a CUDA kernel for multiples of 16 rows, not for 40"):
        layout_of(parse_format("tcq2"), 40, 64)
    for name in BOARDS:
        target = load_target(name)
        assert target.fit(parse_format("tcq2"), BLOCK, 64, rows=48) == parse_format("tcq2")
        assert target.fit(parse_format("tcq2"), BLOCK, 64, rows=40) is None


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("name", INTEGERS + LEVELS + SPARSE + TRELLIS)
def test_the_cost_model_knows_the_bytes(board: str, name: str) -> None:
    target = load_target(board)
    for rows, columns in ((50, 96), (512, 192)):
        if name in TRELLIS:
            rows = -(-rows // 16) * 16
        format_ = target.fit(parse_format(name), BLOCK, columns)
        assert format_ is not None
        sizes = [a.nbytes for a in pack(random_weight(format_, rows, columns)).values()]
        assert stored_bytes(rows, columns, format_, target) == sum(-(-n // 64) * 64 for n in sizes)


@pytest.mark.parametrize("board", BOARDS)
def test_boards_run_every_width_as_any_weight(board: str) -> None:
    target = load_target(board)
    check_archs(target.archs)
    assert target.emitter == "tvm" and target.arch in target.archs
    for role in (BLOCK, TABLE):
        found = target.formats(role, 576, compiler=False)
        assert {f.bits for f in found} == set(range(1, 9))
        for format_ in found:
            assert layout_of(format_, 64, 576).segment in (16, 32)


# ---- the kernels' mathematics, as loops ---------------------------------------------------------


def run(func: Any, arrays: list[Any], shape: tuple[int, int]) -> Any:
    """A kernel's result, written over NaN."""
    import tvm

    module = tvm.IRModule({"k": func.with_attr("global_symbol", "k")})
    with lowering():
        library = tvm.compile(module, target=tvm.target.Target(isa_of().llvm_target()))
    y = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    library["k"](*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays), y)
    return y.numpy()


def check(y: Any, x: Any, weight: Quantized, *more: Any) -> None:
    """y is x @ w.T + more, to what f32 rounds of |x| @ |w|.T."""
    w = weight.dequantize().double().numpy()
    wanted = x.astype(np.float64) @ w.T + sum(more)
    assert np.abs(y - wanted).max() < 3e-6 * (np.abs(x) @ np.abs(w).T).max()


# rows that fill no block; inputs that fill no strip, no chunk and, in fours, no load
SIZES = [(18, 1120, 1), (35, 50, 3)]
SIZES_OF_FOURS = [(18, 1120, 1), (35, 52, 3)]
# one tile and three; a trellis takes whole blocks
SIZES_OF_TILES = [(32, 1120, 1), (48, 50, 3), (592, 96, 1)]


def sizes(name: str) -> list[tuple[int, int, int]]:
    return SIZES_OF_TILES if name in TRELLIS else SIZES_OF_FOURS if name in SPARSE else SIZES


@pytest.mark.parametrize("name", INTEGERS + LEVELS + SPARSE + TRELLIS)
def test_products(name: str) -> None:
    for rows, columns, tokens in sizes(name):
        format_ = load_target("cuda").fit(parse_format(name), BLOCK, columns)
        assert format_ is not None
        weight, rng = random_weight(format_, rows, columns), np.random.default_rng(2)
        x, residual = (rng.standard_normal((tokens, n)).astype(np.float32) for n in (columns, rows))
        bias = rng.standard_normal(rows).astype(np.float32)
        layout = layout_of(format_, rows, columns)
        func = products.linear(1 if tokens == 1 else None, layout, True, True, device=False)
        y = run(func, [x, *pack(weight).values(), bias, residual], (tokens, rows))
        check(y, x, weight, bias, residual)


@pytest.mark.parametrize(
    "names", [("w3g32", "w4g64-sym"), ("nf4g64", "nf3g32-offset"), ("tcq2", "s24w4g64-hw")]
)
def test_gate_and_up_of_two_formats(names: tuple[str, str]) -> None:
    weights = [random_weight(parse_format(name), 32, 192, seed) for seed, name in enumerate(names)]
    x = np.random.default_rng(3).standard_normal((5, 192)).astype(np.float32)
    device = CudaDevice(gpu=False)
    func = device.gated(None, (weights[0].format, weights[1].format), 32, 192, "silu")  # type: ignore[arg-type]
    y = run(func, [x, *pack(weights[0]).values(), *pack(weights[1]).values()], (5, 32))
    gate, up = (torch.from_numpy(x) @ w.dequantize().float().T for w in weights)
    wanted = (torch.nn.functional.silu(gate) * up).numpy()
    assert np.abs(y - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_rows_of_a_packed_table() -> None:
    weight = random_weight(IntegerFormat(5, 32, False), 40, 96)
    ids = np.array([[3], [39], [999], [-1]])
    func = CudaDevice(gpu=False).packed_rows(None, weight.format, 40, 96)  # type: ignore[arg-type]
    y = run(func, [ids, *pack(weight).values()], (4, 96))
    np.testing.assert_allclose(y, weight.dequantize().float().numpy()[[3, 39, 39, 0]], rtol=1e-6)


def emulated(module: Any, store: WeightStore, folder: Path) -> TvmSession:
    """The kernels of a whole module as loops."""
    isa = isa_of()
    with ParamFile(folder / "model.params") as data:
        written = write_program(module, store, data, CudaDevice(gpu=False))
    build_library(written.module, isa, folder / "model.so")
    about = replace(written.description, isa=isa.name, cpu_flags=isa.cpu_flags, arch=isa.machine)
    (folder / "model.json").write_text(about.to_json())
    return TvmSession(folder, threads=1)


# in floats, which compile fast: packed weights have tests of their own, and the twin below has some
SHAPES = {
    "softcap": Shape(layers=1, window=4, softcap=5.0, qk_norm=True),
    "odd heads": Shape(layers=1, dim=12, rotary=10, bias=True, tied=False),
    "wide heads": Shape(layers=1, heads=2, kv_heads=1, dim=160, rotary=64),
}


@pytest.mark.parametrize("name", SHAPES)
def test_modules_compute_what_the_interpreter_computes(name: str, tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(decoder(SHAPES[name], store), store)
    assert max(differences(emulated(module, store, tmp_path), InterpreterSession(module, store))) < EXACT


def test_layer_norms_and_learnt_positions(tmp_path: Path) -> None:
    c = captured("gpt2")
    module = legal(c.module, c.store)
    found = differences(emulated(module, c.store, tmp_path), InterpreterSession(module, c.store, context=128))
    assert max(found) < EXACT


# ---- device code --------------------------------------------------------------------------------

ARCH = "sm_80"


@pytest.fixture(scope="module", autouse=True)
def _nvcc_once() -> Iterator[None]:
    """It takes seconds: the same source is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_emit, "compile_source", cache(cuda_emit.compile_source))
        yield


@cache
def small() -> tuple[Any, WeightStore]:
    store = WeightStore()
    shape = Shape(layers=1, hidden=128, ffn=256, dim=32, rotary=32)
    return legal(quantized(decoder(shape, store), store, {"v_proj": "w4g64", "": "w3g64"}), store), store


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    cuda_emit.emit(*small(), folder, (ARCH,))
    return folder


@needs_nvcc
def test_the_library_holds_a_fat_binary(artifact: Path) -> None:
    library = (artifact / "model.so").read_bytes()
    assert (0xBA55ED50).to_bytes(4, "little") in library and b"__global__" not in library
    about = json.loads((artifact / "model.json").read_text())
    assert about["gpus"] == [ARCH] and about["activations"] == "float" and about["isa"] == "generic"


@needs_nvcc
def test_nothing_is_spilled_and_weights_are_read_by_16_bytes(artifact: Path) -> None:
    reports = parse_reports((artifact / "kernels.json").read_text())
    assert {r.arch for r in reports} == {ARCH} and all(r.spill_bytes == 0 for r in reports)
    kinds = {r.kernel.rpartition("_")[0] for r in reports}
    assert kinds >= {"attention", "append", "rms_norm", "packed_rows", "linear_w3g64", "gated_w3g64_many"}
    for r in (r for r in reports if r.kernel.startswith("linear_w3g64_") and "many" not in r.kernel):
        # three for the codes, the others for x
        assert r.loads["16"] >= 3 and 0 < r.registers < 100


@needs_nvcc
def test_same_module_same_bytes(artifact: Path, tmp_path: Path) -> None:
    cuda_emit.emit(*small(), tmp_path, (ARCH,))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (artifact / path.name).read_bytes(), path.name


@needs_nvcc
def test_the_twin_runs_on_the_artifacts_own_parameters(artifact: Path, tmp_path: Path) -> None:
    module, store = small()
    cuda_emit.emulate(module, store, artifact, tmp_path)
    session = TvmSession(tmp_path, threads=1)
    assert max(differences(session, InterpreterSession(module, store))) < EXACT


@needs_nvcc
@pytest.mark.skipif(tvm_cuda.compute_version() is not None, reason="there is a GPU")
def test_without_a_gpu_running_says_what_is_missing(artifact: Path) -> None:
    with pytest.raises(CompileError, match=r"NVIDIA GPUs \(sm_80\), and this machine has none"):
        TvmSession(artifact)


# ---- what is missing, and what does not fit -----------------------------------------------------


def test_without_nvcc_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gammac.backends import backend_of
    from gammac.targets.tvm.cuda import toolkit

    monkeypatch.setattr(toolkit, "find_nvcc", lambda: None)
    with pytest.raises(CompileError, match=r"needs nvcc, and there is none[^$]*gammac\[cuda\]"):
        demand_nvcc()
    with pytest.raises(CompileError, match="needs nvcc"):
        backend_of(load_target("cuda"), tmp_path)
    with pytest.raises(CompileError, match="multiply floats"):
        backend_of(load_target("cuda"), tmp_path, product_inputs="int8")


def test_when_nvcc_fails_its_words_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\necho 'kernels.cu(1): it is broken' >&2\nexit 2\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(fake))
    store = WeightStore()
    module = legal(decoder(Shape(layers=1), store), store)
    with pytest.raises(CompileError, match=r"does not compile the kernels:\nkernels\.cu\(1\): it is broken"):
        cuda_emit.emit(module, store, tmp_path, ("sm_90",))


@pytest.mark.parametrize("archs", [("sm80",), ("sm_8",), ("sm_80", "ampere"), ()])
def test_architectures_are_checked(archs: tuple[str, ...]) -> None:
    with pytest.raises(CompileError, match="no GPU architecture"):
        check_archs(archs)


@pytest.mark.parametrize(
    ("arch", "version", "runs"),
    [
        ("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_86", (8, 0), False), ("sm_80", (9, 0), False),
        ("compute_80", (9, 0), True), ("compute_90", (8, 9), False), ("sm_100", (10, 3), True),
    ],
)  # fmt: skip
def test_machine_code_fits_its_generation_and_ptx_any_later(
    arch: str, version: tuple[int, int], runs: bool
) -> None:
    assert tvm_cuda.fits(arch, version) == runs


def test_a_gpu_of_another_generation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_cuda, "compute_version", lambda: (7, 5))
    assert "compute capability 7.5" in tvm_cuda.lacking_gpu(["sm_80"])
    assert tvm_cuda.lacking_gpu(["sm_80", "compute_70"]) == ""


# ---- memory of a device -------------------------------------------------------------------------


def test_tensors_of_a_device_are_copies(artifact: Path) -> None:
    """The calls that a GPU's memory is written and read with, on the memory that is here."""
    import tvm_ffi

    memory = tvm_cuda.GpuMemory(tvm_ffi, (1, 0))
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = memory.tensor(array)
    array[0, 0] = 9
    assert memory.read(tensor)[0, 0] == 0
    memory.write(tensor, array)
    np.testing.assert_array_equal(memory.read(tensor), array)
    assert memory.read(memory.tensor(np.zeros(3, np.float16))).dtype == np.float16


# ---- cost ---------------------------------------------------------------------------------------


CANDIDATES = ("w2g16", "w2g64", "w3g64", "w4g64", "w8g64")


def scored() -> Module:
    """A module whose weights have scores: a quarter a bit, half in small groups, some count more."""
    module = decoder(Shape(layers=3, hidden=1024, ffn=4096, heads=8, dim=128, rotary=128), WeightStore())
    scores = {f: 4.0 ** -float(f[1]) * (0.5 if f.endswith("g16") else 1) for f in CANDIDATES}
    chosen = [w for w in module.weights.values() if "role" in w.attrs]
    for i, w in enumerate(chosen):
        role = BLOCK if w.attrs["role"] == BLOCK else TABLE
        own = {f: s * (1 + i % 5) for f, s in scores.items()}
        module = module.with_weights(w.with_attrs(role=role, scores=own))
    return module


def allocated(name: str, share: float) -> dict[str, str]:
    """Formats within a share of what lies between a target's times of 2 and of 8 bits."""
    target, module = load_target(name, "tvm"), scored()
    names = [w.name for w in module.weights.values() if "role" in w.attrs]
    fast, slow = (module_cost(module, target, dict.fromkeys(names, f)) for f in ("w2g64", "w8g64"))
    budget = fast.decode_seconds + share * (slow.decode_seconds - fast.decode_seconds)
    context = Context(target, WeightStore(), parse_budgets(f"{budget * 1e3:.9f}ms/token"))
    found = Allocate(tie=False).run(module, context)
    assert module_cost(found, target).decode_seconds <= budget
    return {name: str(found.weights[name].attrs["format"]) for name in names}


def test_budgets_in_time_solve_and_gpus_choose_otherwise() -> None:
    of = {name: set(allocated(name, 0.2).values()) for name in ("cuda", "cuda-sm89", "cpu-x86-avx2")}
    # 2 bits save an A100 little, and it spends them elsewhere
    assert "w2g64" not in of["cuda"] and "w2g64" in of["cuda-sm89"] & of["cpu-x86-avx2"]
    # by the table an A100's 2 bits are bound by unpacking them, an L4's by memory, which groups of 16 fill
    a100, l4 = load_target("cuda"), load_target("cuda-sm89")
    small, large = (parse_format(name) for name in ("w2g16", "w2g64"))
    ratios = [
        linear_seconds(8192, 8192, small, target) / linear_seconds(8192, 8192, large, target)
        for target in (a100, l4)
    ]
    assert ratios[0] < ratios[1]


def test_a_faster_gpu_takes_less_time() -> None:
    by_memory = ["cuda-sm89", "cuda-sm86", "cuda-sm80", "cuda-sm90"]
    seconds = [linear_seconds(8192, 8192, parse_format("w8g64"), load_target(name)) for name in by_memory]
    assert seconds == sorted(seconds, reverse=True)
    a100 = load_target("cuda")
    assert a100.name == "cuda-sm80"
    # bytes alone: what the data sheet's bandwidth allows is a lower bound, and eight bits are bound by it
    least = 8192 * 8192 / (a100.dram_gbps_peak * 1e9)
    assert least < seconds[2] < 1.5 * least
