"""`gammac compile --static-library` as a user types it: machines without a TVM write the host's tokens."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gammac.cli import main
from gammac.ir import Module, parse
from gammac.targets.target import load_target
from gammac.weights import WeightStore

pytest.importorskip("tvm", reason="needs the extra tvm")

from gammac.runtime.static_session import StaticSession
from gammac.runtime.tvm_session import TvmSession
from gammac.targets.tvm.emit import emit
from gammac.targets.tvm.kernels import isa_of
from gammac.targets.tvm.toolchain import find_emulator, find_linker

QUICK = ["--calibration-windows", "4", "--calibration-length", "64", "--strategy", "weight_mse"]
QUICK += ["--quantizer", "rtn", "--budget", "3", "--context", "64", "--formats", "w3g64"]
QUICK += ["--table-formats", "w4g64", "--static-library"]
PROMPT = [423, 14, 155]
NEW = 32
TARGET, OTHER = "edge-armv7-rpi2", "edge-riscv64-k1"


def skip_without_toolchain(target: str) -> None:
    machine = isa_of(load_target(target)).machine
    if platform.machine() == machine or find_linker(machine) is None or find_emulator(machine) is None:
        pytest.skip(f"needs a cross compiler for {machine}, and qemu-user")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def compiled(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The artifact, and what the compile said."""
    skip_without_toolchain(TARGET)
    folder = tmp_path_factory.mktemp("out") / "tiny"
    command = ["compile", "tiny", "--target", TARGET, "-o", str(folder), "--cache", str(cache), *QUICK]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return folder, result.output.replace("\n", " ")


def test_the_library_is_what_was_checked(compiled: tuple[Path, str]) -> None:
    folder, said = compiled
    assert "checked was libmodel.a, not run on this machine but under qemu-arm" in said
    assert "checked on 31 tokens" in said and "cc example.c libmodel.a -lm -pthread" in said
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"libmodel.a", "gammac_model.h", "example.c", "model.params"} <= manifest["files"].keys()
    assert manifest["context"] == 64
    assert "#define GAMMAC_CONTEXT 64 " in (folder / "gammac_model.h").read_text()


@pytest.fixture(scope="module")
def model(compiled: tuple[Path, str], cache: Path) -> tuple[Module, WeightStore]:
    return parse((compiled[0] / "module.gir").read_text()), WeightStore(cache / "weights")


@pytest.fixture(scope="module")
def expected(model: tuple[Module, WeightStore], tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What this machine writes, by model.so."""
    folder = tmp_path_factory.mktemp("host")
    emit(*model, folder, isa_of("cpu"), "int8")
    host, found = TvmSession(folder, 1), list[int]()
    logits = host.prefill(np.array(PROMPT))
    for _ in range(NEW):
        found.append(int(logits.argmax()))
        logits = host.decode(found[-1])
    assert len(set(found)) > 3
    return found


@pytest.mark.parametrize("target", [TARGET, OTHER])
def test_a_machine_without_tvm_writes_the_hosts_tokens(
    compiled: tuple[Path, str], model: tuple[Module, WeightStore], expected: list[int], tmp_path: Path,
    target: str,
) -> None:  # fmt: skip
    skip_without_toolchain(target)
    folder = compiled[0] if target == TARGET else tmp_path
    if target != TARGET:
        emit(*model, folder, isa_of(load_target(target)), "int8", static_library=True)
    assert StaticSession(folder, tmp_path).greedy(PROMPT, NEW) == expected


def test_a_backend_without_one_refuses_before_any_work(tmp_path: Path) -> None:
    wanted = ["compile", "tiny", "-o", str(tmp_path / "out"), "--backend", "onnx", "--static-library"]
    result = CliRunner().invoke(main, wanted)
    assert result.exit_code == 1 and "--backend tvm writes one" in result.stderr
    assert not (tmp_path / "out").exists()
