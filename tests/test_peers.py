"""Peers of the bench: how they are named, the .gguf file that is written, and their numbers if installed."""

import importlib.util
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gammac.diagnostics import CompileError
from gammac.driver import resolve
from gammac.models_zoo.fetch import fetch
from gammac.models_zoo.gguf_llama import read_tensors
from gammac.models_zoo.texts import default_calibration_text
from gammac.peers import RECIPES, peers_of
from gammac.peers import openvino as openvino_peer
from gammac.peers.gguf_model import write_gguf
from gammac.peers.source_model import load_model, parameters_of
from gammac.runtime import peers as runtimes
from gammac.runtime.bench import Work, bench_together, size_of
from gammac.runtime.peers import Contestant, runtime_of
from gammac.runtime.runners import StepRunner
from gammac.runtime.session import Logits, Tokens

TOKENS = np.arange(11, 43)


def original() -> Any:
    return AutoModelForCausalLM.from_pretrained(fetch("tiny"), dtype=torch.float32).eval()


def test_the_model_of_a_source_is_the_original() -> None:
    with torch.no_grad():
        logits = [m(torch.tensor(TOKENS)[None]).logits for m in (original(), load_model(resolve("tiny")))]
    assert torch.equal(*logits)


def test_a_gguf_file_holds_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    source = resolve("tiny")
    write_gguf(source, path)
    found = read_tensors(path, source.config)
    expected = dict(parameters_of(source))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert torch.equal(values, expected[name].half().float() if values.dim() > 1 else expected[name])
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "none"
    assert fields["llama.rope.freq_base"].contents() == source.config.rope_parameters["rope_theta"]


def test_another_architecture_is_no_gguf_file_here(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)).save_pretrained(tmp_path)
    with pytest.raises(CompileError, match="its architecture is gpt2"):
        write_gguf(resolve(str(tmp_path)), tmp_path / "x.gguf")


def absent() -> NoReturn:
    raise CompileError("it is not installed", hint="pip install it")


def test_a_missing_peer_is_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gammac.peers.IMPORTS", dict.fromkeys(RECIPES, absent))
    there = tmp_path / "there.gguf"
    there.write_bytes(b"GGUF")
    said: list[str] = []
    found = peers_of(f"openvino,{there}", "tiny", tmp_path, said.append)
    assert found == [Contestant(str(there), "llama.cpp", there)]
    assert said == [f"skipped: {CompileError('it is not installed', hint='pip install it')}"]
    with pytest.raises(CompileError, match="it is not installed"):
        peers_of("openvino,llama.cpp", "tiny", tmp_path, said.append)


def test_a_peer_needs_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gammac.peers.IMPORTS", {"openvino": lambda: None})
    with pytest.raises(CompileError, match="openvino needs the model"):
        peers_of("openvino", None, tmp_path)
    with pytest.raises(CompileError, match="openvino has no type 'int3'"):
        peers_of("openvino:int3", "tiny", tmp_path)
    assert not list((tmp_path / "peers").iterdir()), "a failed build leaves nothing"


def test_a_built_peer_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(source: Any, type_: str, folder: Path) -> None:
        built.append(type_)
        (folder / "genai_config.json").write_text("{}")

    recipe = RECIPES["onnxruntime"]
    monkeypatch.setattr("gammac.peers.IMPORTS", {"onnxruntime": lambda: None})
    monkeypatch.setattr(
        "gammac.peers.RECIPES",
        {"onnxruntime": type(recipe)(recipe.packages, recipe.default, recipe.opens, build)},
    )
    first, again = (peers_of("onnxruntime", "tiny", tmp_path) for _ in range(2))
    assert first == again and built == ["int4"]
    assert runtime_of(first[0].path) == "onnxruntime" and first[0].label == "onnxruntime int4"


class Counting(StepRunner):
    """Remembers what it was asked."""

    vocab_size = 50

    def __init__(self) -> None:
        self.asked: list[int] = []

    def reset(self, capacity: int) -> None:
        self.asked.append(-capacity)

    def step(self, tokens: Tokens) -> Logits:
        self.asked.append(len(tokens))
        return np.zeros(self.vocab_size, np.float32)


def test_contestants_do_the_same_work_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runners = {"a": Counting(), "b": Counting()}
    monkeypatch.setattr(runtimes, "RUNTIMES", {"fake": lambda path, threads, spinning: runners[path.name]})
    monkeypatch.setattr("gammac.runtime.bench.load_in_process", lambda path, threads, runtime: None)
    contestants = [Contestant(name, "fake", tmp_path / name) for name in runners]
    found = bench_together(contestants, threads=1, work=Work(prompt=4, new=3, prefill=8, rounds=2))
    assert [t.contestant for t in found] == contestants
    assert runners["a"].asked == runners["b"].asked == [-7, 4, 1, 1, 1, -8, 8] * 3
    assert all(len(t.decode.values) == len(t.prefill.values) == 2 for t in found)


def test_the_size_of_a_graph_counts_its_weights(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_bytes(b"12")
    (tmp_path / "model.bin").write_bytes(b"12345")
    (tmp_path / "other.bin").write_bytes(b"1")
    assert size_of(tmp_path / "model.xml") == 7 and size_of(tmp_path) == 8


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(name) for name in packages)


@pytest.mark.parametrize(
    ("peer", "packages", "worst"),
    [
        ("llama.cpp:F16", ["llama_cpp"], 1e-5),
        ("llama.cpp:Q4_0", ["llama_cpp"], 1e-2),
        ("llama.cpp:IQ3_XXS", ["llama_cpp"], 1e-1),
        ("openvino:fp16", ["openvino", "nncf"], 1e-3),
        ("openvino", ["openvino", "nncf"], 1e-2),
    ],
)
def test_a_peer_runs_the_same_model(peer: str, packages: list[str], worst: float, tmp_path: Path) -> None:
    if not installed(*packages):
        pytest.skip(f"{' and '.join(packages)} not installed (extra: peers)")
    with torch.no_grad():
        expected = original()(torch.tensor(TOKENS)[None]).logits[0].log_softmax(-1)
    runner: Any = peers_of(peer, "tiny", tmp_path)[0].open(1)
    for _ in range(2):
        runner.reset(64)
        rows = [runner.step(TOKENS[:20]).copy(), runner.step(TOKENS[20:21]).copy()]
    rows += list(runner.logits(TOKENS[None, :21])[0, 19:])
    for row, wanted in zip(rows, [*expected[19:21]] * 2, strict=True):
        found = torch.tensor(row).log_softmax(-1)
        assert float((wanted.exp() * (wanted - found)).sum()) < worst


def test_openvino_types_are_of_its_own_names() -> None:
    pytest.importorskip("nncf")
    import nncf  # type: ignore[import-not-found]

    assert all(
        mode is None or hasattr(nncf.CompressWeightsMode, mode) for mode in openvino_peer.TYPES.values()
    )


def test_a_peer_is_evaluated_with_the_tokenizer_of_its_model(tmp_path: Path) -> None:
    from gammac.evaluation import evaluate_artifact
    from gammac.progress import no_progress

    if not installed("llama_cpp"):
        pytest.skip("llama_cpp not installed (extra: peers)")
    text = tmp_path / "text.txt"
    text.write_text(default_calibration_text()[:8000])
    peer = peers_of("llama.cpp:Q8_0", "tiny", tmp_path)[0].path
    found = evaluate_artifact(peer, text, 1, "tiny", (), None, 1, no_progress)
    assert isinstance(found["kl"], float) and 0 < found["kl"] < 1e-3
    with pytest.raises(CompileError, match="has no tokenizer beside it"):
        evaluate_artifact(peer, text, 1, None, (), None, 1, no_progress)
