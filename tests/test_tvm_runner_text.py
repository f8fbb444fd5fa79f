"""The C++ runner's tokenizer against the tokenizers library, and its text against Python's."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as cuts
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from gammac.models_zoo.fetch import fetch
from gammac.models_zoo.texts import default_calibration_text

pytest.importorskip("tvm", reason="needs the extra tvm")

from gammac.targets.tvm.runner import build_runner
from gammac.targets.tvm.toolchain import CXX, find_linker

pytestmark = pytest.mark.skipif(find_linker(language=CXX) is None, reason="no C++ compiler")

MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "The history of", "it's we'LL they'Re o'clock  ", " two  spaces\n\n  a line\r\n\ttab \n", "   ", "\n",
    "x", "x = 12345.678e9; y=½²٣", "<|end|>a<|user|>b<|end|>", "über naïve ñandú ßtraße", "日本語、中文。",
    "кириллица ʰǅ", "🙂👍🏽!?…", "non\u00a0breaking\u2003spaces\u3000", "#include <x>\n\n\n//  y\n",
)  # fmt: skip


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_runner(tmp_path_factory.mktemp("runner"))


def said(runner: Path, *arguments: object) -> tuple[str, str]:
    command = [str(runner), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, env={})
    return done.stdout.decode(errors="surrogateescape"), done.stderr.decode()


def trained(pre: Any, normalizer: Any = None, **model: Any) -> Tokenizer:
    """A small tokenizer of the calibration text with two added tokens."""
    made = Tokenizer(models.BPE(**model))
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = cuts.ByteLevel.alphabet()
    made.train_from_iterator(
        [default_calibration_text()[:40_000]], BpeTrainer(vocab_size=600, initial_alphabet=alphabet)
    )
    made.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<|user|>", special=False)])
    return made


def byte_level(regex: bool = True) -> Any:
    return cuts.ByteLevel(add_prefix_space=False, use_regex=regex)


def split(digits: str) -> Any:
    return cuts.Sequence([cuts.Split(Regex(MODERN.replace("DIGITS", digits)), "isolated"), byte_level(False)])


def with_frame(made: Tokenizer) -> Tokenizer:
    made.post_processor = TemplateProcessing(
        single="<|end|> $A", pair="$A $B", special_tokens=[("<|end|>", made.token_to_id("<|end|>"))]
    )
    return made


KINDS = {
    "gpt2": lambda: trained(byte_level()),
    "digits": lambda: trained(cuts.Sequence([cuts.Digits(individual_digits=True), byte_level()])),
    "llama3": lambda: with_frame(trained(split("{1,3}"), ignore_merges=True)),
    "qwen": lambda: trained(split(""), normalizers.NFC()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_library(runner: Path, kind: str, tmp_path: Path) -> None:
    made = KINDS[kind]()
    made.save(str(tmp_path / "tokenizer.json"))
    for text in (*TEXTS, default_calibration_text()[40_000:42_000]):
        out, err = said(runner, tmp_path, "--tokenize", text)
        assert err == "" and [int(line) for line in out.split()] == made.encode(text).ids, text


def test_a_text_that_may_have_to_be_composed_is_refused(runner: Path, tmp_path: Path) -> None:
    KINDS["qwen"]().save(str(tmp_path / "tokenizer.json"))
    for text in ("e\u0301", "\u212b", "\u1100\u1161", "a\u0327\u0301"):
        assert "normal form C" in said(runner, tmp_path, "--tokenize", text)[1]


def test_another_kind_of_tokenizer_is_named(runner: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    assert "tokenizer.json can't be read" in said(runner, tmp_path, "--tokenize", "x")[1]
    path.write_text("{")
    assert "is damaged" in said(runner, tmp_path, "--tokenize", "x")[1]
    Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).save(str(path))
    assert "its model is WordLevel" in said(runner, tmp_path, "--tokenize", "x")[1]
    trained(cuts.Metaspace()).save(str(path))
    assert "it cuts by Metaspace" in said(runner, tmp_path, "--tokenize", "x")[1]
    made = json.loads(KINDS["gpt2"]().to_str())
    made["model"]["merges"].append(["zzz", "y"])
    path.write_text(json.dumps(made))
    assert "names a token that it lacks" in said(runner, tmp_path, "--tokenize", "x")[1]


def test_text_is_what_python_writes(runner: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from gammac.cli import main

    out = tmp_path / "out"
    compiled = CliRunner().invoke(
        main,
        ["compile", "tiny", "--backend", "tvm", "--strategy", "uniform", "--quantizer", "rtn", "--formats",
         "w4g64", "--budget", "4", "--context", "64", "-o", str(out)],
        env={"GAMMAC_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert compiled.exit_code == 0, compiled.output
    shutil.copy(fetch("tiny") / "tokenizer.json", out)
    prompt = "The history of"
    python = CliRunner().invoke(
        main, ["run", str(out), "--prompt", prompt, "--max-new-tokens", "24", "--no-chat", "--threads", "1"]
    )
    assert said(runner, out, "--prompt", prompt, "--new", 24, "--threads", 1) == (python.output, "")
