"""A static library is the model: the host's numbers on every machine, and no foreign parameters."""

import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from families import captured
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import Shape, decoder, quantized

from gammac.backends import backend_of
from gammac.diagnostics import CompileError
from gammac.passes.legalize_tvm import LegalizeTvm
from gammac.pipeline import Context
from gammac.runtime.program_session import NotEmulated, ProgramSession
from gammac.targets.target import load_target
from gammac.weights import WeightStore

pytest.importorskip("tvm", reason="needs the extra tvm")

from gammac.runtime.static_session import StaticSession
from gammac.runtime.tvm_session import TvmSession
from gammac.targets.tvm import toolchain
from gammac.targets.tvm.emit import emit
from gammac.targets.tvm.kernels import isa_of
from gammac.targets.tvm.kernels.isa import ISAS
from gammac.targets.tvm.static import CHUNK, demand_static
from gammac.targets.tvm.static.plan import _Arena
from gammac.targets.tvm.static.source import FEATURES
from gammac.targets.tvm.toolchain import CXX, MACHINES, demand_archiver, find_emulator, find_linker

PROMPT = [3, 14, 15, 9, 26, 5]
NEW = 20
CONTEXT = CHUNK + 32
HERE = "cpu"
TARGETS = (HERE, "edge-aarch64-rpi5", "edge-riscv64-k1", "edge-armv7-rpi2")
PROGRAM = Path(__file__).with_name("static_program.c")
STRICT = ("-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror")

pytestmark = pytest.mark.skipif(find_linker() is None, reason="no C compiler")

Build = Callable[[str], Path]


def write(target_name: str, folder: Path) -> Path:
    """The artifact of a toy decoder that writes several tokens."""
    store, target = WeightStore(), load_target(target_name)
    module = quantized(decoder(Shape(heads=8, tied=False), store), store, {"": "w4g32"})
    module = replace(module, attrs={**module.attrs, "max_positions": CONTEXT})
    module = LegalizeTvm(CONTEXT).run(module, Context(target, store))
    emit(module, store, folder, isa_of(target), "int8", static_library=True)
    return folder


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Artifacts by target, each written once; skips what can't be linked or run here."""
    made: dict[str, Path] = {}

    def find(target: str) -> Path:
        machine = isa_of(load_target(target)).machine
        if find_linker(machine) is None:
            pytest.skip(f"nothing here links for {machine}: apt-get install {MACHINES[machine].package}")
        if machine != platform.machine() and find_emulator(machine) is None:
            pytest.skip(f"nothing here runs code for {machine}: apt-get install qemu-user-static")
        if target not in made:
            made[target] = write(target, tmp_path_factory.mktemp(target))
        return made[target]

    return find


def in_python(session: TvmSession, prompt: list[int], count: int) -> list[int]:
    session.reset()
    logits, found = session.prefill(np.array(prompt)), []
    for _ in range(count):
        found.append(int(logits.argmax()))
        logits = session.decode(found[-1])
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_machine_gives_the_hosts_numbers(build: Build, tmp_path: Path, target: str) -> None:
    host = TvmSession(build(HERE), 1)
    expected = in_python(host, PROMPT, NEW)
    assert len(set(expected)) > 3
    session = StaticSession(build(target), tmp_path)
    assert session.greedy(PROMPT, NEW) == expected
    tokens = np.array([PROMPT + expected[:5]])
    near = host.logits(tokens)
    assert np.abs(session.logits(tokens) - near).max() < 1e-3 * near.std()


def test_kernels_of_another_family_are_called_in_order(tmp_path: Path) -> None:
    """GPT-2's positions, layer norms, biases and float products."""
    c, target = captured("gpt2"), load_target(HERE)
    module = LegalizeTvm(CHUNK).run(c.module, Context(target, c.store))
    emit(module, c.store, tmp_path, isa_of(target), "float", static_library=True)
    tokens = np.array([[*PROMPT, 1, 2, 40]])
    near = TvmSession(tmp_path, 1).logits(tokens)
    assert np.abs(StaticSession(tmp_path, tmp_path).logits(tokens) - near).max() < 1e-4 * near.std()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_long_prompt_is_read_in_parts(build: Build, tmp_path: Path, threads: int) -> None:
    prompt = [(7 * i + i * i) % 64 for i in range(CHUNK + 11)]
    expected = in_python(TvmSession(build(HERE), 1), prompt, NEW)
    assert StaticSession(build(HERE), tmp_path, threads).greedy(prompt, NEW) == expected
    # a part of one token is a decode
    expected = in_python(TvmSession(build(HERE), 1), prompt[: CHUNK + 1], 3)
    assert StaticSession(build(HERE), tmp_path, threads).greedy(prompt[: CHUNK + 1], 3) == expected


def test_equal_modules_are_equal_bytes(build: Build, tmp_path: Path) -> None:
    again = write(HERE, tmp_path)
    for name in ("libmodel.a", "gammac_model.h", "example.c"):
        assert (again / name).read_bytes() == (build(HERE) / name).read_bytes(), name
    library = (again / "libmodel.a").read_bytes()
    for place in (tmp_path, Path(toolchain.__file__).parent, "/tmp/"):
        assert str(place).encode() not in library


def said(session: ProgramSession, params: Path, *arguments: object) -> str:
    """What the example says of its mistake."""
    program = [str(params) if a.endswith("model.params") else a for a in session._command]
    done = subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done.stdout
    return done.stderr


def test_foreign_parameters_are_refused(build: Build, tmp_path: Path) -> None:
    session, params = StaticSession(build(HERE), tmp_path), tmp_path / "model.params"
    assert "can't be read" in said(session, params, 1)
    whole = (build(HERE) / "model.params").read_bytes()
    for other in (whole[:-1], whole + b"\0", b"", whole[:20000] + bytes(20000) + whole[40000:]):
        params.write_bytes(other)
        assert "not those of this library" in said(session, params, 1)


def test_the_context_and_the_vocabulary_are_kept(build: Build, tmp_path: Path) -> None:
    session, params = StaticSession(build(HERE), tmp_path), build(HERE) / "model.params"
    assert "the context is full" in said(session, params, *[1] * (CONTEXT + 1))
    for token in (64, -1, 10**9):
        assert "there is no such token" in said(session, params, 1, token)
    for wrong in (["--new", 3], ["--fast", 3]):
        assert "usage" in said(session, params, *wrong)
    with pytest.raises(CompileError, match="there is no such token"):
        session.greedy([64], 1)


def test_a_program_has_several_models(build: Build, tmp_path: Path) -> None:
    linker = find_linker()
    assert linker is not None
    told = [f"-I{build(HERE)}", str(PROGRAM), str(build(HERE) / "libmodel.a"), "-lm", "-pthread"]
    subprocess.run([*linker, *STRICT, "-o", str(tmp_path / "program"), *told], check=True)
    done = subprocess.run(
        [str(tmp_path / "program"), str(build(HERE) / "model.params")], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_shipped_compiles_without_warnings(build: Build, tmp_path: Path) -> None:
    linker, folder, object_ = find_linker(), build(HERE), str(tmp_path / "o")
    assert linker is not None
    subprocess.run([*linker, *STRICT, "-c", str(folder / "example.c"), "-o", object_], check=True)
    compiler = find_linker(language=CXX)
    if compiler is None:
        pytest.skip("no C++ compiler for the header")
    source = tmp_path / "one.cc"
    source.write_text('#include "gammac_model.h"\nint main() { gammac_close(nullptr); }\n')
    command = [*compiler, "-Wall", "-Werror", f"-I{folder}", str(source), str(folder / "libmodel.a")]
    subprocess.run([*command, "-lm", "-pthread", "-o", object_], check=True)


def test_a_core_without_the_instructions_is_told(build: Build, tmp_path: Path) -> None:
    session = StaticSession(build("edge-aarch64-rpi5"), tmp_path)
    command = [a.replace("cortex-a76", "cortex-a72") for a in session._command]
    if command == session._command:
        command = [a.replace("max", "cortex-a72") for a in command]
    session._command = command
    with pytest.raises(CompileError, match="this processor lacks instructions"):
        session.greedy(PROMPT, 1)


def test_another_processor_of_this_machine_is_not_tried(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(HERE)
    if not isa_of(HERE).cpu_flags:
        pytest.skip("the kernels for this machine run on all of its processors")
    monkeypatch.setattr("gammac.runtime.tvm_session.host_flags", lambda: frozenset({"none"}))
    with pytest.raises(NotEmulated, match="this processor lacks"):
        StaticSession(folder, tmp_path)


def test_a_prefill_that_differs_from_decode_is_noticed(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = StaticSession(build(HERE), tmp_path)
    rows = ProgramSession._run(session, PROMPT)
    assert rows.shape == (len(PROMPT) + 1, 64) and np.abs(rows[-1] - rows[-2]).max() < 1e-3 * rows.std()
    monkeypatch.setattr(ProgramSession, "_run", lambda self, tokens: [*rows[:-1], rows[0]])
    with pytest.raises(CompileError, match="prefill and decode are"):
        session.logits(np.array([PROMPT]))


# ---- what it is made with -----------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES)
def test_a_missing_archiver_is_named_with_its_package(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("AR", raising=False)
    with pytest.raises(CompileError, match=f"static library for {machine}[^$]*apt-get install binutils"):
        demand_archiver(machine)


def test_an_archiver_that_knows_no_such_machine_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host's own writes archives that no linker reads."""
    fake = tmp_path / "ar"
    fake.write_text("#!/bin/sh\nprintf '!<arch>\\nmodel.o/' > \"$2\"\n")
    fake.chmod(0o755)
    monkeypatch.setenv("AR", str(fake))
    with pytest.raises(CompileError, match="finds no symbols in objects"):
        demand_static(platform.machine())


def test_processors_are_asked_for_all_that_kernels_use() -> None:
    assert {flag for isa in ISAS.values() for flag in isa.cpu_flags} <= FEATURES.keys()


def test_other_backends_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="--backend tvm writes one"):
        backend_of(load_target(HERE, "onnx"), tmp_path, static_library=True)
    with pytest.raises(CompileError, match="leave --static-library out"):
        backend_of(load_target("cuda"), tmp_path, static_library=True)


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 5)), max_size=30))
def test_tensors_that_live_together_never_overlap(tensors: list[tuple[int, int]]) -> None:
    arena, alive = _Arena(), list[tuple[int, int, int]]()
    for step, (size, span) in enumerate(tensors):
        start = arena.take(size, step + span)
        assert start % 64 == 0 and start + size <= arena.size
        assert all(start + size <= a or b <= start for a, b, _ in alive)
        alive.append((start, start + size, step + span))
        arena.release(step)
        alive = [t for t in alive if t[2] > step]


def test_what_nobody_reads_any_more_is_used_again() -> None:
    arena = _Arena()
    for step in range(10):
        arena.take(100, step + 1)
        arena.release(step)
    assert arena.size == 2 * 128
