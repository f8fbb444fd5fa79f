"""CUDA artifacts on a GPU: `pytest -m gpu` on a machine that has one. Elsewhere all of it is skipped."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx_models import Shape, decoder, quantized
from test_tvm import MIXED, differences, legal

from gammac.cli import main
from gammac.ir import parse
from gammac.runtime.generate import encode_prompt, load_tokenizer
from gammac.runtime.reference import InterpreterSession
from gammac.runtime.session import open_session
from gammac.weights import WeightStore

pytest.importorskip("tvm", reason="needs the extra tvm")

from gammac.runtime.tvm_cuda import compute_version, lacking_gpu
from gammac.runtime.tvm_session import TvmSession
from gammac.targets.tvm.cuda.emit import emit, emulate
from gammac.targets.tvm.cuda.toolkit import find_nvcc
from gammac.targets.tvm.toolchain import find_linker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(compute_version() is None, reason="there is no NVIDIA GPU"),
    pytest.mark.skipif(find_nvcc() is None or find_linker() is None, reason="needs nvcc and a linker"),
]

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "compute_90")
# sums in another order than the interpreter's, in deviations of the logits
BOUND = 1e-4
SHAPES = {
    "mixed": (Shape(bias=True), MIXED),
    "softcap": (Shape(window=4, softcap=5.0, qk_norm=True), {"": "w3g16"}),
    "odd heads": (Shape(dim=12, rotary=10, bias=True, tied=False), {}),
    "long": (Shape(hidden=1152, ffn=2080, dim=64, heads=18, kv_heads=6, rotary=64), {"": "w4g32"}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parity_with_the_interpreter(name: str, tmp_path: Path) -> None:
    shape, formats = SHAPES[name]
    store = WeightStore()
    module = legal(quantized(decoder(shape, store), store, formats), store)
    emit(module, store, tmp_path, ARCHS)
    session = TvmSession(tmp_path)
    assert max(differences(session, InterpreterSession(module, store))) < BOUND


def test_the_loops_on_the_cpu_are_the_kernels_on_the_gpu(tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(quantized(decoder(Shape(bias=True), store), store, {"": "w5g32"}), store)
    twin = tmp_path / "twin"
    twin.mkdir()
    emit(module, store, tmp_path, ARCHS)
    emulate(module, store, tmp_path, twin)
    assert max(differences(TvmSession(tmp_path), TvmSession(twin, threads=1))) < BOUND


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` at 3 bits; its store is the cache beside it."""
    folder = tmp_path_factory.mktemp("gpu")
    quick = ["--strategy", "weight_mse", "--quantizer", "rtn", "--calibration-windows", "4"]
    wanted = ["--target", "cuda", "--budget", "3", "--context", "512", "--cache", str(folder / "cache")]
    said = CliRunner().invoke(main, ["compile", "tiny", "-o", str(folder / "out"), *wanted, *quick])
    assert said.exit_code == 0, said.output
    # with a GPU that fits, the closing check has run the device code itself
    assert "was not run" not in said.output or lacking_gpu(("sm_80", "sm_90", "compute_90"))
    return folder / "out"


def test_greedy_text_is_the_interpreters(artifact: Path) -> None:
    tokens = encode_prompt(load_tokenizer(artifact), "The history of")
    module = parse((artifact / "module.gir").read_text())
    sessions = (
        open_session(artifact),
        InterpreterSession(module, WeightStore(artifact.parent / "cache" / "weights"), context=512),
    )
    texts = []
    for session in sessions:
        session.reset(len(tokens) + 32)
        logits, found = session.prefill(tokens), []
        for _ in range(32):
            found.append(int(logits.argmax()))
            logits = session.decode(found[-1])
        texts.append(found)
    assert texts[0] == texts[1]


def test_it_runs_and_is_timed(artifact: Path) -> None:
    said = CliRunner().invoke(main, ["run", str(artifact), "--prompt", "The", "--max-new-tokens", "8"])
    assert said.exit_code == 0 and said.output.strip()
    said = CliRunner().invoke(main, ["bench", str(artifact), "--rounds", "1"])
    assert said.exit_code == 0 and "decode tokens/s" in said.output


def test_what_was_decoded_before_is_not_overwritten(artifact: Path) -> None:
    session = open_session(artifact)
    session.prefill(np.arange(3, 12))
    before = session.decode(5)
    session.logits(np.arange(40)[None] + 3)
    session.reset()
    session.prefill(np.arange(3, 12))
    np.testing.assert_array_equal(session.decode(5), before)
