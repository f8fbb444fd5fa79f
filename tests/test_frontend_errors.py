"""What can't be captured is explained: the file, what is wrong with it, and what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import make, message
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gammac.diagnostics import CompileError
from gammac.frontend.export import capture, capture_model, load_source
from gammac.weights import WeightStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model in several files."""
    place = tmp_path_factory.mktemp("models") / "qwen3"
    make("qwen3").save_pretrained(place, max_shard_size="20KB")
    return place


def spoil(folder: Path, place: Path, **changes: object) -> Path:
    """A copy of a model folder with another config."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **changes}))
    return place


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").touch()
    assert f"{tmp_path} is no model: it has no config.json" in message(tmp_path)
    assert f"give the file {tmp_path / 'model-q4.gguf'}" in message(tmp_path)


def test_a_name_that_nobody_knows() -> None:
    assert "nobody/nothing is not in the Hugging Face cache" in message("nobody/nothing")
    assert "give a folder, a .gguf file, or a hub name" in message("nobody/nothing")
    assert "is neither a folder nor a hub name" in message("not a/model/name")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "is a file" in message(tmp_path / "notes.txt")
    assert "there is no file" in message(tmp_path / "absent.gguf")
    (tmp_path / "empty.gguf").touch()
    assert "empty.gguf" in message(tmp_path / "empty.gguf")


def test_a_truncated_file(folder: Path, tmp_path: Path) -> None:
    place = spoil(folder, tmp_path / "cut")
    path = sorted(place.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is damaged or not whole" in message(place)


def test_a_missing_shard(folder: Path, tmp_path: Path) -> None:
    place = spoil(folder, tmp_path / "half")
    path = sorted(place.glob("*.safetensors"))[1]
    path.unlink()
    assert path.name in message(place)


def test_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    place = spoil(folder, tmp_path / "pickle")
    for path in place.glob("*.safetensors"):
        path.unlink()
    (place / "pytorch_model.bin").touch()
    assert "only pickled weights, which can run code" in message(place)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "frobnicator"}, "frobnicator"),
        ({"architectures": ["FrobForCausalLM"]}, "no class FrobForCausalLM"),
        ({"num_attention_heads": 0}, "num_attention_heads|ZeroDivisionError"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 48}, r"is \[50, 32\], the config wants \[50, 48\]"),
        ({"num_hidden_layers": 3}, r"`num_hidden_layers` \(3\) must be equal"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized already"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configs_that_make_no_sense(
    folder: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    place = spoil(folder, tmp_path / "odd", **changes)
    with pytest.raises(CompileError, match=words):
        capture(load_source(str(place)), WeightStore())


def test_half_a_config(folder: Path, tmp_path: Path) -> None:
    place = spoil(folder, tmp_path / "torn")
    (place / "config.json").write_text('{"model_type": "qwen3", ')
    assert str(place) in message(place)


class SpectralMlp(nn.Module):
    """A module with an op that the IR has no counterpart for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


def tiny_llama(**options: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9, **options))


def test_an_unknown_op_is_named_with_its_module() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp = SpectralMlp()
    with pytest.raises(CompileError) as caught:
        capture_model(model, WeightStore())
    assert str(caught.value).startswith(
        "model.layers.0.mlp: PyTorch's aten.fft_fft.default, in a SpectralMlp"
    )
    assert "add a row" in str(caught.value)


class Branching(nn.Module):
    """A module whose path depends on the numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_branches_on_data_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp = Branching()
    with pytest.raises(CompileError, match=r"torch\.export can't trace LlamaForCausalLM"):
        capture_model(model, WeightStore())


def test_half_precision_models_are_refused() -> None:
    with pytest.raises(CompileError, match=r"the parameters are torch\.float16"):
        capture_model(tiny_llama().half(), WeightStore())


def test_frequencies_that_follow_the_length_are_refused() -> None:
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(CompileError, match=r"^model\.rotary_emb: the rotary frequencies depend"):
        capture_model(model, WeightStore())
