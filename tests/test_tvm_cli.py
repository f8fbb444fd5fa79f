"""TVM artifacts from the command line: the main job on the embedded model, as a user types it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from gammac.cli import main
from gammac.ir import parse
from gammac.models_zoo.fetch import fetch
from gammac.runtime.generate import encode_prompt, load_tokenizer
from gammac.runtime.reference import InterpreterSession
from gammac.runtime.session import Session, open_session
from gammac.weights import WeightStore

pytest.importorskip("tvm", reason="needs the extra tvm")

from gammac.targets.tvm.toolchain import find_linker

pytestmark = pytest.mark.skipif(find_linker() is None, reason="nothing links a shared library")

QUICK = ["--calibration-windows", "4", "--calibration-length", "64", "--strategy", "weight_mse"]
QUICK += ["--quantizer", "rtn"]
GREEDY = 64

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def gammac(cache: Path) -> Iterator[Run]:
    """Run the command line; no exception but an exit may come out of it."""

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAMMAC_CACHE", str(cache))
        yield run


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, gammac: Run) -> Path:
    """`tiny` at 3 bits, in floats, with room for 128 tokens."""
    folder = tmp_path_factory.mktemp("out") / "tiny"
    wanted = ["--backend", "tvm", "--product-inputs", "float", "--context", 128, "--budget", 3]
    said = gammac("compile", "tiny", "-o", folder, *wanted, *QUICK)
    assert said.exit_code == 0, said.output
    assert "payload 3.000 bits" in said.output and "next: gammac run" in said.output
    assert "activations in int8" not in said.output
    return folder


def greedy(session: Session, tokens: np.ndarray, count: int) -> list[int]:
    session.reset(len(tokens) + count)
    logits, found = session.prefill(tokens), []
    for _ in range(count):
        found.append(int(logits.argmax()))
        logits = session.decode(found[-1])
    return found


def test_greedy_text_is_the_interpreters(artifact: Path, cache: Path) -> None:
    tokens = encode_prompt(load_tokenizer(artifact), "The history of")
    module = parse((artifact / "module.gir").read_text())
    reference = InterpreterSession(module, WeightStore(cache / "weights"), context=128)
    session = open_session(artifact, 1)
    assert greedy(session, tokens, GREEDY) == greedy(reference, tokens, GREEDY)
    assert session.context == 128


def test_the_manifest_says_what_it_is(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert (manifest["emitter"], manifest["activations"]) == ("tvm", "float")
    assert manifest["context"] == 128 and manifest["tools"]["apache-tvm"]
    assert set(manifest["files"]) >= {"model.so", "model.params", "model.json", "tokenizer.json"}
    # every width is allowed, and the artifact takes what the allocation says
    assert any(format_.startswith("w3") for format_ in manifest["allocation"].values())
    size = (artifact / "model.params").stat().st_size
    module = parse((artifact / "module.gir").read_text())
    floats = sum(w.type.numel() * 4 for w in module.weights.values() if "stored" not in w.attrs)
    block = sum(w.type.numel() for w in module.weights.values() if w.attrs.get("role") == "block")
    table = next(w for w in module.weights.values() if w.attrs.get("role") == "table")
    expected = block * manifest["true_bits"] / 8 + table.type.numel() * (8 + 24 / 64) / 8 + floats
    assert size == pytest.approx(expected, rel=0.03)


def test_it_runs_is_evaluated_and_timed(gammac: Run, artifact: Path, tmp_path: Path) -> None:
    said = gammac("run", artifact, "--prompt", "The history of", "--max-new-tokens", 8, "--threads", 2)
    assert said.exit_code == 0 and len(said.stdout.strip()) > 5
    text = tmp_path / "text.txt"
    text.write_text((Path(fetch("tiny")).parent / "calibration.txt").read_text()[:4000])
    said = gammac("eval", artifact, "--text", text, "--windows", 2, "--reference", "tiny", "--json")
    found = json.loads(said.stdout)
    assert found["activations"] == "float" and found["length"] == 128
    assert found["ppl"] < 2 * found["ppl reference"] and 0 < found["kl"] < 1
    said = gammac("inspect", artifact)
    assert said.exit_code == 0 and "@decode" in said.stdout


def test_bench_counts_what_a_step_reads(artifact: Path) -> None:
    from gammac.runtime.bench import Work, bench

    found = bench(artifact, threads=1, work=Work(prompt=4, new=4, prefill=8, rounds=1))
    about = json.loads((artifact / "model.json").read_text())
    rows = sum(4 * np.prod(shape) for shape in about["caches"]) / about["capacity"]
    assert found.bytes_per_token == about["read_per_token"] + round(rows * (4 + 5 / 2))
    assert found.decode.median > 0 and found.load.first_token_seconds > 0


def test_damage_is_noticed(gammac: Run, artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    with (copy / "model.params").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    said = gammac("run", copy, "--prompt", "x")
    assert said.exit_code == 1 and "model.params has changed: its sha256" in said.stderr
    (copy / "model.so").unlink()
    said = gammac("run", copy, "--prompt", "x")
    assert said.exit_code == 1 and "model.so is missing" in said.stderr


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["--backend", "tvm", "--portable"], "a TVM artifact is native code"),
        (["--backend", "tvm", "--context", 100_000], "a context of 100000 tokens is more than"),
        (["--product-inputs", "float"], "--backend tvm has float ones"),
    ],
)
def test_mistakes_are_told_before_any_work(
    gammac: Run, tmp_path: Path, wanted: list[object], said: str
) -> None:
    result = gammac("compile", "tiny", "-o", tmp_path / "out", *wanted)
    assert result.exit_code == 1 and said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_knows_the_backend(gammac: Run, tmp_path: Path) -> None:
    said = gammac("compile", "tiny", "-o", tmp_path / "out", "--backend", "tvm", "--dry-run", *QUICK)
    assert said.exit_code == 0 and "predicted decode" in said.stdout
    assert "predicted energy" in said.stdout and "mJ/token" in said.stdout


def test_an_artifact_for_another_processor_is_not_run_but_its_module_is(
    gammac: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gammac.runtime import tvm_session
    from gammac.targets.tvm.kernels import isa

    for module in (tvm_session, isa):
        monkeypatch.setattr(module, "host_flags", lambda: frozenset({"sse2"}))
    wanted = ["--backend", "tvm", "--target", "cpu-x86-avx2", "--formats", "w4g64"]
    wanted += ["--budget", 4, "--context", 32]
    said = gammac("compile", "tiny", "-o", tmp_path / "out", *wanted, *QUICK)
    assert said.exit_code == 0, said.output
    found = said.stdout.replace("\n", " ")
    assert "note: the artifact was not run: the artifact uses avx2, this processor lacks" in found
    # SSE2 alone is left of this machine
    assert "checked on" in found and "Checked is its module, compiled for this machine" in found
    assert "next, on the device: gammac run" in found
    result = gammac("run", tmp_path / "out", "--prompt", "x")
    assert result.exit_code == 1 and "this processor lacks" in result.stderr
