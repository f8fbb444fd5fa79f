"""A whole model for a Raspberry Pi 5, compiled as a user does it, run under qemu-user: the host's tokens."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.ir import parse
from gammac.models_zoo.fetch import default_cache
from gammac.weights import WeightStore

pytest.importorskip("tvm", reason="needs the extra tvm")

from gammac.runtime.emulated import EmulatedSession
from gammac.runtime.tvm_session import TvmSession
from gammac.targets.tvm.emit import emit
from gammac.targets.tvm.kernels import isa_of
from gammac.targets.tvm.runner import find_wheel
from gammac.targets.tvm.toolchain import CXX, MACHINES, elf_machine, find_emulator, find_linker

WHEELS = default_cache() / "wheels"
QUICK = ["--calibration-windows", "4", "--calibration-length", "64", "--strategy", "weight_mse"]
QUICK += ["--quantizer", "rtn", "--budget", "3", "--context", "64", "--formats", "w3g64"]
QUICK += ["--table-formats", "w4g64"]
PROMPT = (423, 14, 155)
NEW = 32

pytestmark = [
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is the target"),
    pytest.mark.skipif(find_linker("aarch64") is None, reason="no cross compiler for aarch64"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    if WHEELS.is_dir():
        (folder / "wheels").symlink_to(WHEELS)
    return folder


@pytest.fixture(scope="module")
def compiled(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The artifact, and what the compile said."""
    folder = tmp_path_factory.mktemp("out") / "tiny"
    command = ["compile", "tiny", "--target", "edge", "-o", str(folder), "--cache", str(cache), *QUICK]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.fixture
def runs() -> None:
    if find_emulator("aarch64") is None:
        pytest.skip("no qemu-aarch64: apt-get install qemu-user-static")
    if find_linker("aarch64", CXX) is None:
        pytest.skip(f"no C++ compiler for aarch64: apt-get install {MACHINES['aarch64'].package}")
    try:
        find_wheel("apache-tvm", "aarch64", WHEELS)
    except CompileError as error:
        pytest.skip(f"no runtime of TVM for aarch64: {error}")


def test_the_artifact_says_what_it_is_for(compiled: tuple[Path, str]) -> None:
    folder, said = compiled
    assert elf_machine(folder / "model.so") == MACHINES["aarch64"].elf
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = {"triple": "aarch64-linux-gnu", "cpu": "cortex-a76", "features": ""}
    assert manifest["code"] == json.loads((folder / "model.json").read_text())["code"] == expected
    assert manifest["target"] == "edge-aarch64-rpi5" and manifest["activations"] == "int8"
    assert "checked on" in said
    # either it was run, or the summary says what was run in its place
    assert "not run on this machine but under qemu-aarch64" in said or "the artifact was not run" in said
    with pytest.raises(CompileError, match="the artifact is for aarch64, this machine is"):
        TvmSession(folder)


def test_the_device_writes_the_hosts_tokens(
    compiled: tuple[Path, str], cache: Path, tmp_path: Path, runs: None
) -> None:
    folder, said = compiled
    assert "under qemu-aarch64" in said.replace("\n", " ")
    session = EmulatedSession(folder, cache)
    module, store = parse((folder / "module.gir").read_text()), WeightStore(cache / "weights")
    emit(module, store, tmp_path, isa_of("cpu"), "int8")
    host = TvmSession(tmp_path, 1)
    logits, expected = host.prefill(np.array(PROMPT)), []
    for _ in range(NEW):
        expected.append(int(logits.argmax()))
        logits = host.decode(expected[-1])
    assert len(set(expected)) > 3
    assert session.greedy(list(PROMPT), NEW) == expected
    # logits differ by the order of sums alone, whole or token by token
    tokens = np.array([[*PROMPT, *expected[:5]]])
    near = host.logits(tokens)
    assert np.abs(session.logits(tokens) - near).max() < 1e-3 * near.std()
    session.prefill(tokens[0, :4])
    assert np.abs(session.decode(int(tokens[0, 4])) - near[0, 4]).max() < 1e-3 * near.std()


def test_another_core_of_the_same_machine_is_refused(
    compiled: tuple[Path, str], cache: Path, runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = compiled
    session = EmulatedSession(folder, cache)
    monkeypatch.setattr(
        session, "_command", [a.replace("cortex-a76", "cortex-a72") for a in session._command]
    )
    with pytest.raises(CompileError, match="this processor lacks asimddp"):
        session.logits(np.array([PROMPT]))
