"""Code for machines that are not here: built with cross compilers, run under qemu-user."""

import platform
import subprocess
import sysconfig
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import Shape, decoder, quantized

from gammac.backends import TvmBackend
from gammac.closing_check import closing_check
from gammac.diagnostics import CompileError
from gammac.formats import parse_format
from gammac.passes.legalize_tvm import LegalizeTvm
from gammac.pipeline import Context
from gammac.runtime.manifest import Manifest
from gammac.targets.target import Target, load_target
from gammac.weights import WeightStore

tvm = pytest.importorskip("tvm", reason="needs the extra tvm")

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

from gammac.runtime import program_session  # noqa: E402
from gammac.targets.tvm import toolchain  # noqa: E402
from gammac.targets.tvm.build import demand_core  # noqa: E402
from gammac.targets.tvm.kernels import (  # noqa: E402
    Isa,
    Kernel,
    Layout,
    decode_linear,
    gated_linear,
    isa_of,
    lowering,
    pack,
    prefill_linear,
    quantize_activations,
    rms_norm_quantize,
)
from gammac.targets.tvm.kernels.layout import PANEL  # noqa: E402
from gammac.targets.tvm.kernels.packed import layout_of  # noqa: E402
from gammac.targets.tvm.runner import find_wheel  # noqa: E402
from gammac.targets.tvm.toolchain import (  # noqa: E402
    MACHINES,
    demand_linker,
    find_emulator,
    find_linker,
)

HARNESS = Path(__file__).with_name("kernel_harness.c")
HEADERS = Path(sysconfig.get_path("platlib")) / "tvm_ffi" / "include"
# what qemu 7.2 has of the cores that the targets name
CORES = {
    "edge-aarch64-rpi5": "cortex-a76", "edge-aarch64-rpi4": "cortex-a72", "edge-aarch64-phone": "max",
    "edge-armv7-rpi2": "cortex-a7",
    "edge-riscv64-k1": "rv64,v=true,vlen=256,elen=64,vext_spec=v1.0",
}  # fmt: skip
# enough codes that they are shared out between threads, and a last panel that is not full
ROWS, COLUMNS = 520, 256
CASES = (("w3g32", 1, True), ("w8g64-sym", 1, True), ("w4channel", 5, True), ("w2g64", 1, False))
LEVELS = ("nf3g32", 1, True)
TRELLIS = (("tcq2", 1, True), ("tcq4", 5, True), ("tcq3", 1, False))  # in whole panels
DTYPES = {"f": 2, "i": 0, "u": 1}  # DLPack's codes by numpy's kinds


def skip_without_toolchain(machine: str) -> None:
    if find_linker(machine) is None:
        pytest.skip(f"nothing here links for {machine}: apt-get install {MACHINES[machine].package}")
    if find_emulator(machine) is None:
        pytest.skip(f"nothing here runs code for {machine}: apt-get install qemu-user-static")


class Emulated:
    """Kernels of a target, compiled and linked with the harness."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.isa, self.folder, self.core = isa_of(target), folder, CORES[target.name]
        cases = (*CASES, *((LEVELS,) * looks_up(self.isa)), *(TRELLIS * runs_trellis(target)))
        self.products = {name: product(name, tokens, integer, self.isa) for name, tokens, integer in cases}
        kernels = [*self.products.values(), *mlp(self.isa)]
        functions = {k.name: k.func.with_attr("global_symbol", k.name) for k in kernels}
        with lowering():
            built = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(self.isa.llvm_target()))
        built.mod.write_to_file(str(folder / "kernels.o"), "o")
        linker = find_linker(self.isa.machine)
        assert linker is not None
        listed = " ".join(f"X({name})" for name in functions)
        command = [*linker, "-static", "-O1", f"-I{HEADERS}", f"-DKERNELS={listed}", str(HARNESS)]
        command += [str(folder / "kernels.o"), "-lm", "-o", str(folder / "harness")]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def call(self, kernel: Kernel, arrays: dict[str, Any], tokens: int = 1) -> dict[str, Any]:
        """What a kernel writes, by name; before it does, there are bytes of ones."""
        shapes = {o.name: tuple(tokens if s == "m" else s for s in o.shape) for o in kernel.operands}
        told = []
        for operand in kernel.operands:
            written = operand in kernel.outputs
            shape, path = shapes[operand.name], self.folder / operand.name
            array = np.ones(shape, operand.dtype) if written else arrays[operand.name]
            assert (array.shape, array.dtype) == (shape, np.dtype(operand.dtype)), operand
            path.write_bytes(array.tobytes())
            kind = f"{'=' * written}{DTYPES[array.dtype.kind]}:{8 * array.itemsize}"
            told.append(f"{kind}:{'x'.join(map(str, shape))}:{path}")
        emulator = find_emulator(self.isa.machine)
        assert emulator is not None
        command = [emulator, "-cpu", self.core, str(self.folder / "harness"), kernel.name, *told]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr or f"it ended with {done.returncode}"
        read = {o.name: np.fromfile(self.folder / o.name, o.dtype) for o in kernel.outputs}
        return {name: array.reshape(shapes[name]) for name, array in read.items()}


def looks_up(isa: Isa) -> bool:
    return isa.leaf != "words"


def runs_trellis(target: Target) -> bool:
    return target.kernel_for(parse_format("tcq2"), "block", COLUMNS) is not None


def rows_of(name: str) -> int:
    return ROWS - ROWS % PANEL if parse_format(name).kind == "trellis" else ROWS


def product(name: str, tokens: int, integer: bool, isa: Isa) -> Kernel:
    make = decode_linear if tokens == 1 else prefill_linear
    return make(parse_format(name), rows_of(name), COLUMNS, isa, integer=integer)


# ---- what a block's MLP is made of: a norm, gate and up in one, a product that adds the residual ----

HIDDEN, FFN, EPS = 96, 208, 1e-5
GATE, UP, DOWN = (parse_format(name) for name in ("w3g32", "w4g32-sym", "w4g16"))


def mlp(isa: Isa) -> tuple[Kernel, ...]:
    return (
        rms_norm_quantize(HIDDEN, Layout(GATE, FFN, HIDDEN).segment, 1, EPS),
        gated_linear((GATE, UP), FFN, HIDDEN, isa, integer=True, tokens=1, activation="silu"),
        quantize_activations(FFN, Layout(DOWN, HIDDEN, FFN).segment, 1),
        decode_linear(DOWN, HIDDEN, FFN, isa, integer=True, residual=True),
    )


def run_mlp(isa: Isa, run: Callable[[Kernel, dict[str, Any]], dict[str, Any]]) -> Any:
    """The block's output f32 [1, HIDDEN], its kernels called one after the other."""
    norm, gated, rounded, down = mlp(isa)
    gate, up = (random_weight(f, FFN, HIDDEN, seed) for seed, f in enumerate((GATE, UP)))
    x, gain = inputs(1, HIDDEN), np.abs(inputs(1, HIDDEN, 2)[0])
    normed = run(norm, {"x": x, "weight": gain})
    hidden = run(gated, {**normed, **numbered([gate, up], isa)})["y"]
    codes = run(rounded, {"x": hidden})
    last = random_weight(DOWN, HIDDEN, FFN, 3)
    return run(down, {**codes, **pack(last, isa), "residual": x})["y"]


@pytest.fixture(scope="module", params=CORES)
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    target = load_target(request.param)
    skip_without_toolchain(isa_of(target).machine)
    return Emulated(target, tmp_path_factory.mktemp(target.name))


@pytest.mark.parametrize(("name", "tokens", "integer"), (*CASES, LEVELS, *TRELLIS))
def test_kernels_equal_dequantize_on_every_machine(
    emulated: Emulated, name: str, tokens: int, integer: bool
) -> None:
    if name not in emulated.products and (name, tokens, integer) in TRELLIS:
        pytest.skip("its target has no rows for trellis codes")
    if name not in emulated.products:
        assert name == LEVELS[0]
        with pytest.raises(CompileError, match="looks no bytes up"):
            product(*LEVELS, emulated.isa)
        return
    weight = random_weight(parse_format(name), rows_of(name), COLUMNS)
    layout, x = layout_of(weight.format, rows_of(name), COLUMNS), inputs(tokens, COLUMNS)
    given, meant = quantized_inputs(x, layout) if integer else ({"x": x}, x)
    y = emulated.call(emulated.products[name], {**given, **pack(weight, emulated.isa)}, tokens)["y"]
    # as on this machine: a rounding for each product and sum of a chain, or of the scales alone
    chain = 3 * layout.groups + 3 if integer else COLUMNS + 4
    assert error(y, meant.astype(np.float64), weight, integer) < EPSILON / 2 * chain


def test_a_block_gives_the_hosts_output(emulated: Emulated) -> None:
    host = isa_of("cpu")
    expected = run_mlp(host, lambda kernel, arrays: call(kernel, build(kernel, host), arrays, 1))
    found = run_mlp(emulated.isa, emulated.call)
    # sums in another order may round an input of the last product to the next of its 127 steps
    assert np.abs(found - expected).max() < 2e-3 * expected.std()


# ---- what it refuses ----------------------------------------------------------------------------


def own(tmp_path: Path, *changes: tuple[str, str]) -> Target:
    """A user's file, made from a shipped one."""
    text = (resources.files("gammac.targets") / "edge-aarch64-rpi5.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "own.toml").write_text(text)
    return load_target(str(tmp_path / "own.toml"))


def test_an_unknown_core_names_its_neighbours(tmp_path: Path) -> None:
    target = own(tmp_path, ("cortex-a76", "cortex-a76x"))
    with pytest.raises(CompileError, match=r"no core 'cortex-a76x' for aarch64[^$]*LLVM knows cortex-a76"):
        demand_core(isa_of(target))


def test_a_core_without_the_instructions_is_refused(tmp_path: Path) -> None:
    target = own(tmp_path, ('cpu = "cortex-a76"', 'cpu = "cortex-a72"'))
    with pytest.raises(CompileError, match="cortex-a72 lacks dotprod, which the kernels of neon-dotprod use"):
        demand_core(isa_of(target))
    told = ('cpu = "cortex-a76"', 'cpu = "cortex-a72"\nfeatures = ["+dotprod"]')
    demand_core(isa_of(own(tmp_path, told)))


def test_nothing_of_the_host_is_told_to_llvm() -> None:
    assert isa_of(load_target("edge")).llvm_target() == {
        "kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76", "mattr": [],
    }  # fmt: skip


@pytest.mark.parametrize("machine", [m for m in MACHINES if m != platform.machine()])
def test_a_missing_cross_compiler_is_named_with_its_package(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    triple = MACHINES[machine].triple
    with pytest.raises(CompileError) as caught:
        demand_linker(machine)
    assert f"none of {triple}-gcc that works" in str(caught.value)
    assert f"apt-get install {MACHINES[machine].package}" in str(caught.value)
    assert "pip install ziglang" in str(caught.value)


def test_a_host_compiler_is_no_cross_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$CC, or a broken toolchain, under the right name: what it writes is looked at."""
    host = find_linker()
    if host is None:
        pytest.skip("no C compiler")
    wanted = "aarch64" if platform.machine() != "aarch64" else "riscv64"
    fake = tmp_path / f"{MACHINES[wanted].triple}-gcc"
    fake.write_text(f'#!/bin/sh\nexec {" ".join(host)} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CC", host[0])
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: str(fake) if name == fake.name else name)
    assert find_linker(wanted) is None


def test_wheels_are_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"no wheel apache_tvm_ffi-[^$]*pip download --no-deps"):
        find_wheel("apache-tvm-ffi", "aarch64", tmp_path)
    with pytest.raises(CompileError, match="TVM has no runtime for riscv64 on PyPI"):
        find_wheel("apache-tvm-ffi", "riscv64", tmp_path)


# ---- the closing check --------------------------------------------------------------------------


def test_what_can_not_be_run_is_said_and_its_module_is_checked_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_toolchain("riscv64")
    store, target = WeightStore(), load_target("edge-riscv64-k1")
    ctx = Context(target, store)
    original = decoder(Shape(), store)
    module = LegalizeTvm(32).run(quantized(original, store, {"": "w4g32"}), ctx)
    backend = TvmBackend(target, isa_of(target), "int8")
    backend.emit(module, store, tmp_path)
    manifest = Manifest("toy", "", target.name, "decoder", "tvm", 32, 4, 4.5, 4.5)
    found = closing_check(backend, original, module, ctx, tmp_path, manifest, tmp_path)
    assert found.check is not None and 0 < found.check.against_module.kl < 1e-3
    assert found.note.startswith("the artifact was not run: the artifact is for riscv64")
    assert "TVM has no runtime for riscv64" in found.note and "compiled for this machine" in found.note
    monkeypatch.setattr(program_session, "find_emulator", lambda machine: None)
    monkeypatch.setattr(TvmBackend, "stand_in", lambda self: None)
    found = closing_check(backend, original, module, ctx, tmp_path, manifest, tmp_path)
    assert found.check is None and "no emulator of riscv64 is here" in found.note
