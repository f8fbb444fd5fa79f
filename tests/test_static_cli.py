"""`gammac compile --static-library` as a user types it: machines without a TVM write the host's tokens."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gammac.cli import main
from gammac.ir import parse
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("target", "machine"), [("edge-riscv64-k1", "riscv64"), ("edge-armv7-rpi2", "armv7l")]
)
def test_a_machine_without_tvm_writes_the_hosts_tokens(
    cache: Path, tmp_path: Path, target: str, machine: str
) -> None:
    if platform.machine() == machine or find_linker(machine) is None or find_emulator(machine) is None:
        pytest.skip(f"needs a cross compiler for {machine}, and qemu-user")
    folder = tmp_path / "out"
    result = CliRunner().invoke(main, ["compile", "tiny", "--target", target, "-o", str(folder), *QUICK,
                                       "--cache", str(cache)])  # fmt: skip
    assert result.exit_code == 0, result.output
    said = result.output.replace("\n", " ")
    assert "checked was libmodel.a, not run on this machine but under qemu-" in said
    assert "checked on 31 tokens" in said and "example.c" in said
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"libmodel.a", "gammac_model.h", "example.c", "model.params"} <= files.keys()

    module, store = parse((folder / "module.gir").read_text()), WeightStore(cache / "weights")
    (tmp_path / "host").mkdir()
    emit(module, store, tmp_path / "host", isa_of("cpu"), "int8")
    host = TvmSession(tmp_path / "host", 1)
    logits, expected = host.prefill(np.array(PROMPT)), []
    for _ in range(NEW):
        expected.append(int(logits.argmax()))
        logits = host.decode(expected[-1])
    assert len(set(expected)) > 3
    assert StaticSession(folder, tmp_path).greedy(PROMPT, NEW) == expected


def test_a_backend_without_one_refuses_before_any_work(tmp_path: Path) -> None:
    wanted = ["compile", "tiny", "-o", str(tmp_path / "out"), "--backend", "onnx", "--static-library"]
    result = CliRunner().invoke(main, wanted)
    assert result.exit_code == 1 and "--backend tvm writes one" in result.stderr
    assert not (tmp_path / "out").exists()
