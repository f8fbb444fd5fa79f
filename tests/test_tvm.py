"""The TVM emitter: its artifacts against the interpreter and against transformers, and what it refuses."""

import json
import mmap
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import DECODERS, VOCAB, captured
from onnx_models import Shape, decoder, quantized

from gammac.diagnostics import CompileError
from gammac.ir import Module
from gammac.passes.legalize_tvm import LegalizeTvm
from gammac.pipeline import Context
from gammac.runtime.reference import InterpreterSession
from gammac.runtime.session import Session
from gammac.targets.cost import stored_bytes
from gammac.targets.target import BLOCK, load_target, target_names
from gammac.targets.tvm.description import Entry, parse_description
from gammac.targets.tvm.names import FLOAT, INT8, MODEL_FILES
from gammac.targets.tvm.params import MappedParams
from gammac.weights import WeightStore

pytest.importorskip("tvm", reason="needs the extra tvm")

from gammac.runtime.tvm_session import TvmSession
from gammac.targets.tvm.emit import emit, refuse_unknown
from gammac.targets.tvm.kernels import ISAS, isa_of, packed_bytes
from gammac.targets.tvm.toolchain import find_linker

pytestmark = pytest.mark.skipif(find_linker() is None, reason="nothing links a shared library")

# floats: sums in another order, in units of the logits' deviation. int8: inputs of each product are rounded
# to 1/127 of the largest of their group, which moves these random narrow models by about 1 %
EXACT, ROUNDED = 2e-5, 3e-2
TOKENS = (np.arange(19, dtype=np.int64) * 7) % 47 + 3
MIXED = {
    "embed": "w8g64", "k_proj": "w3g32-sym", "down": "w2g64", "gate": "w6channel", "o_proj": "w8g16",
    "": "w3g32",
}  # fmt: skip
LEVELS = {"embed": "w8g64", "down": "nf3g32", "o_proj": "w4g32", "": "nf4g32"}
HOST = "cpu-x86"


def legal(module: Module, store: WeightStore, context: int = 0) -> Module:
    return LegalizeTvm(context).run(module, Context(load_target(HOST), store))


def emitted(module: Module, store: WeightStore, folder: Path, activations: str = FLOAT) -> TvmSession:
    emit(module, store, folder, isa_of(), activations)
    return TvmSession(folder, threads=2)


def differences(found: Session, expected: Session) -> list[float]:
    """Largest, in deviations of the logits: of a whole sequence, of its parts read one after the other."""
    whole, wanted = found.logits(TOKENS[None]), expected.logits(TOKENS[None])
    apart = [np.abs(whole - wanted).max()]
    for session in (found, expected):
        session.reset()
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 14)):
        pair = [session.prefill(TOKENS[start:end]) for session in (found, expected)]
        apart.append(np.abs(pair[0] - pair[1]).max())
    return [float(difference / wanted.std()) for difference in apart]


@pytest.mark.parametrize("family", DECODERS)
def test_families_compute_what_transformers_computes(family: str, tmp_path: Path) -> None:
    c = captured(family)
    module = legal(c.module, c.store)
    session = emitted(module, c.store, tmp_path)
    assert max(differences(session, InterpreterSession(module, c.store, context=128))) < EXACT
    with torch.inference_mode():
        expected = c.model(torch.from_numpy(TOKENS[None])).logits.numpy()
    assert np.abs(session.logits(TOKENS[None]) - expected).max() < 1e-4 * expected.std()
    assert (session.vocab_size, session.context, session.kind) == (VOCAB, 128, "decoder")


SHAPES = {
    "softcap": Shape(window=4, softcap=5.0, qk_norm=True),
    "odd heads": Shape(dim=12, rotary=10, bias=True, tied=False),
    "long": Shape(layers=1, dim=64, rotary=64),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sizes_that_fill_no_vector(shape: Shape, tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(decoder(shape, store), store)
    assert max(differences(emitted(module, store, tmp_path), InterpreterSession(module, store))) < EXACT


@pytest.mark.parametrize("formats", [MIXED, LEVELS], ids=["integers", "levels"])
@pytest.mark.parametrize(("activations", "least", "most"), [(FLOAT, 0, EXACT), (INT8, 1e-3, 5 * ROUNDED)])
def test_formats_mix(
    formats: dict[str, str], activations: str, least: float, most: float, tmp_path: Path
) -> None:
    store = WeightStore()
    module = legal(quantized(decoder(Shape(bias=True), store), store, formats), store)
    session = emitted(module, store, tmp_path, activations)
    found = differences(session, InterpreterSession(module, store))
    assert least < max(found) < most, found
    assert session.activations == activations


def test_projections_of_different_formats_share_a_launch(tmp_path: Path) -> None:
    store = WeightStore()
    apart = {"embed": "w8g32", "q_proj": "w4g32", "k_proj": "w3g32-sym", "v_proj": "w2g32", "": "w4g32"}
    module = legal(quantized(decoder(Shape(), store), store, apart), store)
    session = emitted(module, store, tmp_path, FLOAT)
    assert max(differences(session, InterpreterSession(module, store))) < EXACT
    library = (tmp_path / "model.so").read_bytes()
    assert b"stacked_0" in library and b"stacked_many" in library and b"linear_w2g32" not in library


def test_the_mean_rounding_of_int8_is_small(tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(quantized(decoder(Shape(), store), store, {"": "w4g32"}), store)
    found, expected = (s.logits(TOKENS[None]) for s in (
        emitted(module, store, tmp_path, INT8), InterpreterSession(module, store)))  # fmt: skip
    assert 1e-3 < (found - expected).std() / expected.std() < ROUNDED


def test_a_batch_is_its_rows_and_the_cache_is_not_touched(tmp_path: Path) -> None:
    store = WeightStore()
    session = emitted(legal(decoder(Shape(), store), store), store, tmp_path)
    first = session.prefill(TOKENS[:5])
    both = session.logits(np.stack([TOKENS, TOKENS[::-1]]))
    assert both.shape == (2, len(TOKENS), 64)
    np.testing.assert_array_equal(both[1], session.logits(TOKENS[None, ::-1])[0])
    then = session.decode(int(TOKENS[5]))
    np.testing.assert_allclose(first, both[0, 4], atol=1e-5)
    np.testing.assert_allclose(then, both[0, 5], atol=1e-5)


def test_a_context_is_as_long_as_asked_for(tmp_path: Path) -> None:
    store = WeightStore()
    whole = decoder(Shape(layers=1), store)
    session = emitted(legal(whole, store, context=24), store, tmp_path)
    assert session.context == 24 and session._about.capacity == 32
    session.prefill(np.arange(20))
    with pytest.raises(CompileError, match="25 tokens are more than the 24 that fit"):
        session.prefill(np.arange(5))
    with pytest.raises(CompileError, match="context of 200 tokens is more than the 128"):
        legal(whole, store, context=200)


# ---- on disk ------------------------------------------------------------------------------------


def test_same_module_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        store, folder = WeightStore(), tmp_path / name
        folder.mkdir()
        module = legal(quantized(decoder(Shape(layers=1), store), store, {"": "w4g32"}), store)
        contents.append([f.read_bytes() for f in emit(module, store, folder, isa_of(), FLOAT)])
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0][0]


def test_weights_are_mapped_and_stored_once(tmp_path: Path) -> None:
    store = WeightStore()
    module = legal(quantized(decoder(Shape(), store), store, {"": "w4g32"}), store)
    emit(module, store, tmp_path, isa_of(), INT8)
    about = parse_description((tmp_path / "model.json").read_text())
    names = [entry.name for entry in about.params]
    assert len(names) == len(set(names)) and "model.embed.weight.codes" in names
    assert all(entry.offset % 64 == 0 for entry in about.params)
    array = next(MappedParams(tmp_path / "model.params", about.params).arrays())
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base.obj, mmap.mmap)
    # an untied table would be looked up in, not read
    assert 0.9 < about.read_per_token / sum(entry.nbytes for entry in about.params) <= 1


OWN = [name for name in target_names() if load_target(name).emitter == "tvm" and not load_target(name).archs]
DEVICES = [name for name in target_names() if load_target(name).emitter == "onnx"] + OWN


@pytest.mark.parametrize("name", ["w1g32", "w2g64-sym", "w3g64", "w5channel", "w8g16", "w4g96"])
def test_the_cost_model_knows_the_bytes(name: str) -> None:
    from gammac.formats import parse_format

    for target in (load_target(t, "tvm") for t in DEVICES):
        for rows, columns in ((512, 192), (50, 96)):
            format_ = parse_format(name).fit(columns)
            packed = packed_bytes(format_, rows, columns, isa_of(target))
            assert stored_bytes(rows, columns, format_, target) == packed


def test_every_target_has_figures_for_every_width() -> None:
    for target in (load_target(name, "tvm") for name in DEVICES):
        assert target.emitter == "tvm"
        assert (target.digest == load_target(target.name).digest) == (target.name in OWN)
        bits = {f.bits for f in target.formats(BLOCK, 576, compiler=False)}
        assert bits == set(range(1, 9)) and isa_of(target).name in ISAS
    with pytest.raises(CompileError, match="no figures for the backend 'tensorrt'"):
        load_target(HOST, "tensorrt")


# ---- what it refuses ----------------------------------------------------------------------------


def test_an_encoder_is_refused() -> None:
    c = captured("bert")
    with pytest.raises(CompileError, match="bert is an encoder"):
        refuse_unknown(legal(c.module, c.store))


def test_ops_without_a_kernel_are_named() -> None:
    c = captured("llama")
    module = legal(c.module, c.store)
    function = module.functions["decode"]
    strange = replace(next(op for op in function.ops if op.name == "silu"), name="cos")
    ops = tuple(strange if op.name == "silu" else op for op in function.ops)
    with pytest.raises(CompileError, match=r"layers\.0\.mlp[^:]*: cos has no TVM kernel"):
        refuse_unknown(module.with_functions(replace(function, ops=ops)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a model that nobody changes."""
    made, store = tmp_path_factory.mktemp("model"), WeightStore()
    emit(legal(decoder(Shape(layers=1), store), store), store, made, isa_of(), FLOAT)
    return made


def changed(folder: Path, to: Path, **changes: object) -> Path:
    for name in MODEL_FILES:
        (to / name).write_bytes((folder / name).read_bytes())
    about = json.loads((to / "model.json").read_text())
    (to / "model.json").write_text(json.dumps({**about, **changes}))
    return to


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"abi": 99}, "its ABI is 99, not 1"),
        ({"tvm": "0.1"}, r"built by apache-tvm 0\.1, here is 0\.27"),
        ({"arch": "riscv64"}, "the artifact is for riscv64, this machine is"),
        ({"cpu_flags": ["amx_fp128"]}, "this processor lacks amx_fp128"),
        ({"params": [{"name": "w", "dtype": "float32", "shape": [1 << 30], "offset": 0}]}, "w is not within"),
    ],
)
def test_what_does_not_fit_here_is_not_run(
    folder: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(CompileError, match=said):
        TvmSession(changed(folder, tmp_path, **changes))


def test_a_library_that_is_none_is_not_run(folder: Path, tmp_path: Path) -> None:
    broken = changed(folder, tmp_path)
    (broken / "model.so").write_bytes(b"no library")
    with pytest.raises(CompileError, match=r"model\.so can't be loaded"):
        TvmSession(broken)


def test_running_needs_neither_the_compiler_nor_torch(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from gammac.runtime.tvm_session import TvmSession\n"
        f"print(TvmSession(Path({str(folder)!r}), 1).decode(3).argmax())\n"
        "print([name for name in ('tvm', 'torch', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "[]"


def test_everything_else_works_without_tvm() -> None:
    script = (
        "import sys; sys.modules['tvm'] = sys.modules['tvm_ffi'] = None\n"
        "import gammac.driver, gammac.evaluation, gammac.passes, gammac.runtime.bench, gammac.sweep"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_entry_counts_its_bytes() -> None:
    assert Entry("w", "float16", (3, 5), 0).nbytes == 30


def test_without_a_linker_one_is_named(
    monkeypatch: pytest.MonkeyPatch, without: Callable[[str], None]
) -> None:
    from gammac.targets.tvm.toolchain import demand_linker

    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    without("ziglang")
    with pytest.raises(CompileError, match=r"none of cc, gcc, clang[^$]*pip install ziglang"):
        demand_linker()
    with pytest.raises(CompileError, match="none of aarch64-linux-gnu-gcc"):
        demand_linker("aarch64")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package look as if it were not installed."""
    import importlib.util

    real = importlib.util.find_spec

    def hide(name: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else real(n, *a))

    return hide


def test_without_tvm_the_extra_is_named(without: Callable[[str], None], tmp_path: Path) -> None:
    from gammac.backends import backend_of

    without("tvm")
    with pytest.raises(CompileError, match=r"pip install 'gammac\[tvm\]'"):
        backend_of(load_target(HOST, "tvm"), tmp_path)
