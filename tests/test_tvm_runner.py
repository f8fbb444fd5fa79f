"""The C++ runner: the same tokens as Python's session, and messages for what it can't run."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_models import Shape, adapted, decoder, quantized

from gammac.formats import load_float
from gammac.passes.add_adapters import keys_of
from gammac.passes.legalize_tvm import LegalizeTvm
from gammac.passes.training.adapters import Adapters, Factors, write_adapters
from gammac.pipeline import Context
from gammac.runtime.adapters import factors_for
from gammac.runtime.manifest import Manifest
from gammac.targets.target import load_target
from gammac.weights import WeightStore

pytest.importorskip("tvm", reason="needs the extra tvm")

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


def in_python(model: Path, count: int, factors: Any = None) -> list[int]:
    session, found = TvmSession(model, 1, factors=factors), []
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


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Adapters]:
    """A model with adapters, its manifest, and other adapters for it."""
    folder, store = tmp_path_factory.mktemp("tuned"), WeightStore()
    module = adapted(store, Shape(layers=1, heads=8, tied=False), {"": "w4g32"})
    others = adapted(store, Shape(layers=1, heads=8, tied=False), {"": "w4g32"}, seed=2)
    factors = {key: load_float(w, store) for w in others.weights.values() for key in keys_of(w)}
    names = dict.fromkeys(key.rpartition("/")[0] for key in factors)
    module = LegalizeTvm(CONTEXT).run(module, Context(load_target("cpu-x86"), store))
    emit(module, store, folder, isa_of(), "int8")
    keys = {n: keys_of(w) for n, w in module.weights.items() if keys_of(w)}
    manifest = Manifest(
        "toy", "", "cpu-x86", "decoder", "tvm", CONTEXT, 4, 4, 4, adapters=keys, adapter_base="base"
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    pairs = {n: (factors[f"{n}/a"], factors[f"{n}/b"]) for n in names}
    return folder, manifest, Adapters("qlora", "base", pairs)


def test_it_runs_adapters_and_takes_others(
    runner: Path, tuned: tuple[Path, Manifest, Adapters], tmp_path: Path
) -> None:
    folder, manifest, others = tuned
    write_adapters(tmp_path / "others", others)
    expected = in_python(folder, 20), in_python(folder, 20, factors_for(manifest, tmp_path / "others"))
    assert len(set(expected[0])) > 3 and expected[0] != expected[1]
    for tokens, more in zip(expected, ([], ["--adapters", tmp_path / "others"]), strict=True):
        code, out, err = said(runner, folder, "--new", 20, *more, *PROMPT)
        assert (code, err) == (0, "") and [int(line) for line in out.split()] == tokens


CHANGES: dict[str, Callable[[dict[str, Factors]], dict[str, Factors]]] = {
    "another rank": lambda f: {n: (a[:1], b[:, :1]) for n, (a, b) in f.items()},
    "lacks ": lambda f: dict(list(f.items())[1:]),
    "has weights that the artifact has not": lambda f: {**f, "else": (torch.ones(1, 1), torch.ones(1, 1))},
}


def test_adapters_that_do_not_fit_are_refused(
    runner: Path, model: Path, tuned: tuple[Path, Manifest, Adapters], tmp_path: Path
) -> None:
    folder, _, others = tuned

    def refused(where: Path, wrong: str) -> None:
        code, out, err = said(runner, where, "--adapters", tmp_path / "file", *PROMPT)
        assert code == 1 and out == "" and wrong in err, err

    refused(folder, "file can't be read")
    for wrong, change in CHANGES.items():
        write_adapters(tmp_path / "file", replace(others, factors=change(dict(others.factors))))
        refused(folder, wrong)
    write_adapters(tmp_path / "file", replace(others, base="another"))
    refused(folder, "was trained on another base")
    write_adapters(tmp_path / "file", others)
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-4])
    refused(folder, "is damaged")
    (tmp_path / "file").write_bytes(b"not one")
    refused(folder, "is damaged")
    (model / "manifest.json").write_text("{}")
    refused(model, "the artifact has no adapters")


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
