"""The C++ runner: the same tokens as Python's session, and messages for what it can't run."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from onnx_models import Shape, adapted, decoder, quantized

from gammac.passes.legalize_tvm import LegalizeTvm
from gammac.pipeline import Context
from gammac.targets.target import load_target
from gammac.weights import WeightStore

pytest.importorskip("tvm", reason="needs the extra tvm")

from test_tvm import legal

from gammac.runtime.tvm_session import TvmSession
from gammac.targets.tvm.emit import emit
from gammac.targets.tvm.kernels import isa_of
from gammac.targets.tvm.runner import build_runner
from gammac.targets.tvm.toolchain import CXX, find_linker

pytestmark = pytest.mark.skipif(find_linker(language=CXX) is None, reason="no C++ compiler")

PROMPT = (3, 14, 15, 9, 26, 5)
CONTEXT = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, store = tmp_path_factory.mktemp("model"), WeightStore()
    # eight heads: with fewer, this random model writes one token again and again
    module = quantized(decoder(Shape(heads=8, tied=False), store), store, {"": "w4g32"})
    module = LegalizeTvm(CONTEXT).run(module, Context(load_target("cpu-x86"), store))
    emit(module, store, folder, isa_of(), "int8")
    return folder


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_runner(tmp_path_factory.mktemp("runner"))


def said(runner: Path, *arguments: object) -> tuple[int, str, str]:
    command = [str(runner), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    return done.returncode, done.stdout, done.stderr


def in_python(model: Path, count: int) -> list[int]:
    session, found = TvmSession(model, 1), []
    logits = session.prefill(np.array(PROMPT))
    for _ in range(count):
        found.append(int(logits.argmax()))
        logits = session.decode(found[-1])
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_it_writes_what_python_writes(runner: Path, model: Path, threads: int) -> None:
    expected = in_python(model, 20)
    assert len(set(expected)) > 3
    code, out, err = said(runner, model, "--new", 20, "--threads", threads, *PROMPT)
    assert (code, err) == (0, "") and [int(line) for line in out.split()] == expected
    # it ends at a token that ends, and where the context is full
    first = expected[0]
    assert said(runner, model, "--end", first, *PROMPT)[1] == ""
    assert len(said(runner, model, "--new", 99, *PROMPT)[1].split()) == CONTEXT - len(PROMPT)


def test_it_runs_adapters(runner: Path, tmp_path: Path) -> None:
    store = WeightStore()
    module = adapted(store, Shape(layers=1, heads=8, tied=False), {"": "w4g32"})
    emit(legal(module, store, CONTEXT), store, tmp_path, isa_of(), "int8")
    expected = in_python(tmp_path, 20)
    assert len(set(expected)) > 3
    code, out, err = said(runner, tmp_path, "--new", 20, *PROMPT)
    assert (code, err) == (0, "") and [int(line) for line in out.split()] == expected


def test_it_says_what_is_wrong(runner: Path, model: Path, tmp_path: Path) -> None:
    assert said(runner, model)[2].startswith("error: give either --prompt or token ids")
    assert "is no number" in said(runner, model, "seven")[2]
    assert "there is no option --promt" in said(runner, model, "--promt", "x")[2]
    assert "model.json can't be read" in said(runner, tmp_path, 1)[2]
    assert "the context is full" in said(runner, model, *range(CONTEXT + 1))[2]
    # an id that the table lacks reads no foreign memory
    assert said(runner, model, "--new", 1, 10**9)[0] == 0


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"abi": 9}, "its ABI is 9"),
        ({"tvm": "0.1"}, "built by TVM 0.1"),
        ({"arch": "riscv64"}, "the artifact is for riscv64"),
        ({"cpu_flags": ["amx_fp128"]}, "this processor lacks amx_fp128"),
        ({"gpus": ["sm_80"]}, "the artifact is for GPUs"),
        ({"params": [{"name": "w", "dtype": "float32", "shape": [1 << 40], "offset": 0}]}, "is too short"),
    ],
)
def test_what_does_not_fit_here_is_not_run(
    runner: Path, model: Path, tmp_path: Path, changes: dict[str, object], wrong: str
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    about = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps({**about, **changes}))
    code, out, err = said(runner, copy, *PROMPT)
    assert code == 1 and out == "" and wrong in err
