"""The runtime against direct computations: sessions, generation, evaluation, tasks, bench."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
import torch
from runtime_models import (
    CONTEXT,
    TEXT,
    VOCAB,
    WIDTH,
    llama,
    module,
    tensors,
    tokenizer,
    write_decoder,
    write_encoder,
)  # fmt: skip
from torch.nn.functional import cross_entropy, kl_div

from gammac.diagnostics import CompileError
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.pipeline import Context
from gammac.runtime import bench as bench_module
from gammac.runtime.bench import Work, bench, read_bandwidth
from gammac.runtime.evaluate import compare, compare_outputs, perplexity, windows_for
from gammac.runtime.generate import Sampling, decoded, end_tokens, generate, load_tokenizer, until
from gammac.runtime.onnx_reads import weight_bytes_per_token
from gammac.runtime.reference import InterpreterSession, TransformersSession, load_model
from gammac.runtime.session import OnnxModel, OnnxSession, Session, default_threads, open_session
from gammac.runtime.tasks import Option, accuracy, log_likelihoods, read_task
from gammac.targets.onnx.emit import emit
from gammac.targets.target import load_target
from gammac.weights import WeightStore

TOKENS = np.random.default_rng(1).integers(3, VOCAB, (2, 24))
# f32 sums in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str, folder: Path) -> Session:
    if name == "transformers":
        return TransformersSession(llama())
    if name == "interpreter":
        store = WeightStore()
        return InterpreterSession(module(store), store, context=CONTEXT)
    return open_session(write_decoder(folder, fused=name == "onnx shared"), threads=1)


@pytest.fixture(params=["onnx shared", "onnx growing", "interpreter", "transformers"])
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Session:
    return make(request.param, tmp_path)


def test_decoding_with_a_cache_is_reading_the_whole(session: Session) -> None:
    assert (session.kind, session.vocab_size, session.context) == ("decoder", VOCAB, CONTEXT)
    whole = session.logits(TOKENS)
    assert whole.shape == (2, 24, VOCAB) and whole.dtype == np.float32
    for row, expected in zip(TOKENS, whole, strict=True):
        session.reset(24)
        np.testing.assert_allclose(session.prefill(row[:7]), expected[6], **CLOSE)
        for i in range(7, 20):
            np.testing.assert_allclose(session.decode(int(row[i])), expected[i], **CLOSE)
        np.testing.assert_allclose(session.prefill(row[20:]), expected[23], **CLOSE)


def test_logits_leave_the_cache_alone(session: Session) -> None:
    session.reset()
    session.prefill(TOKENS[0, :5])
    session.logits(TOKENS)
    np.testing.assert_allclose(session.decode(int(TOKENS[0, 5])), session.logits(TOKENS)[0, 5], **CLOSE)


def test_too_many_tokens_are_an_error(session: Session) -> None:
    session.reset(4)
    session.prefill(TOKENS[0, :4])
    with pytest.raises(CompileError, match="5 tokens are more than the 4"):
        session.decode(5)
    with pytest.raises(CompileError, match=f"more than the {CONTEXT}"):
        session.logits(np.zeros((1, CONTEXT + 1), np.int64))


def test_the_graphs_and_the_module_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    fused = make("onnx shared", tmp_path / "a").logits(TOKENS)
    np.testing.assert_allclose(make("onnx growing", tmp_path / "b").logits(TOKENS), fused, **CLOSE)
    np.testing.assert_allclose(make("interpreter", tmp_path).logits(TOKENS), fused, **CLOSE)


def test_a_shared_cache_is_one_buffer(tmp_path: Path) -> None:
    session = open_session(write_decoder(tmp_path, fused=True), threads=1)
    assert isinstance(session, OnnxSession)
    assert session.cache_bytes_per_token == 2 * 2 * 8 * 4
    session.reset(32)
    first = session.prefill(TOKENS[0, :9])
    # emptied, not cleared: what an earlier text left must not be seen
    session.reset(32)
    np.testing.assert_array_equal(session.prefill(TOKENS[0, :9]), first)


def test_an_encoder_takes_token_types(tmp_path: Path) -> None:
    session = open_session(write_encoder(tmp_path))
    assert (session.kind, session.vocab_size) == ("encoder", WIDTH)
    table = tensors()
    np.testing.assert_allclose(
        session.logits(TOKENS), table["table"][TOKENS] + table["positions"][0], **CLOSE
    )
    same = compare_outputs(session, session, torch.from_numpy(TOKENS))
    assert (same.mean_abs, same.tokens) == (0, 48) and same.cosine == pytest.approx(1)
    with pytest.raises(CompileError, match="no perplexity"):
        perplexity(session, torch.from_numpy(TOKENS))


def test_a_model_that_onnxruntime_refuses_is_named(tmp_path: Path) -> None:
    write_decoder(tmp_path, fused=True)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CompileError, match=r"model\.onnx has 8 bytes"):
        open_session(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"]["model.onnx"]["size_bytes"] = 8
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CompileError, match=r"model\.onnx can't be loaded"):
        open_session(tmp_path, verify=False)


def test_an_emitted_graph_says_the_same_with_either_cache(tmp_path: Path) -> None:
    store, target = WeightStore(), load_target("cpu-x86-avx512")
    made = onnx_models.quantized(onnx_models.decoder(onnx_models.Shape(), store), store, {"proj": "w4g32"})
    legal = LegalizeOnnx().run(made, Context(target, store))
    emit(legal, store, tmp_path, target=target)
    tokens = TOKENS[:1] % 64
    # the kernels round activations to 8 bits: 0.08 of logits up to 4 was measured
    whole = InterpreterSession(legal, store).logits(tokens)[0]
    for shares in (True, False):
        session = OnnxSession(OnnxModel(tmp_path / "model.onnx", "decoder", CONTEXT, shares))
        np.testing.assert_allclose(session.logits(tokens)[0], whole, atol=0.3)
        session.reset(24)
        np.testing.assert_allclose(session.prefill(tokens[0, :9]), whole[8], atol=0.3)
        for i in range(9, 20):
            np.testing.assert_allclose(session.decode(int(tokens[0, i])), whole[i], atol=0.3)
        np.testing.assert_allclose(session.prefill(tokens[0, 20:]), whole[23], atol=0.3)


def test_a_folder_without_a_model_is_no_reference(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="transformers can't read"):
        load_model(tmp_path)


def test_threads_fit_the_machine() -> None:
    assert 1 <= default_threads() <= 4096


# ---- generation ---------------------------------------------------------------------------------


def text_of(session: Session, **options: Any) -> str:
    return "".join(
        generate(session, tokenizer(), "The quick", **{"max_new_tokens": 20, "ends": (), **options})
    )


def test_greedy_is_what_transformers_generates() -> None:
    model, words = llama(), tokenizer()
    ids = torch.tensor([words("The quick")["input_ids"]])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
    text = words.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert text_of(TransformersSession(model)) == text and len(text) > 5


def test_a_seed_decides_a_sample() -> None:
    session = TransformersSession(llama())
    texts = [text_of(session, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert (
        text_of(session, temperature=1.0, top_k=1)
        == text_of(session)
        == text_of(session, temperature=1.0, top_p=1e-9)
    )


def test_sampling_follows_the_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    random = np.random.default_rng(0)

    def shares(sampling: Sampling) -> list[float]:
        drawn = [sampling.choose(logits, random) for _ in range(4000)]
        return [drawn.count(i) / 4000 for i in range(4)]

    assert shares(Sampling(1.0)) == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.03)
    assert shares(Sampling(1.0, top_k=2)) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert shares(Sampling(1.0, top_p=0.6)) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert shares(Sampling(0.01)) == [0, 1, 0, 0] == shares(Sampling())


def test_generation_ends_where_it_is_told() -> None:
    session = TransformersSession(llama())
    whole = text_of(session)
    assert text_of(session, stop=[whole[6:9]]) == whole[: whole.index(whole[6:9])]
    assert len(text_of(session, max_new_tokens=3)) < len(whole)
    assert text_of(session, max_new_tokens=0) == ""
    start = tokenizer()("The quick")["input_ids"]
    first = int(session.logits(np.array([start]))[0, -1].argmax())
    assert text_of(session, ends={first}) == ""
    # the context ends it too
    assert len(list(generate(session, tokenizer(), "The quick", max_new_tokens=10_000, ends=()))) <= CONTEXT


def test_prompts_that_can_not_be_continued() -> None:
    session = TransformersSession(llama())
    with pytest.raises(CompileError, match=f"context is {CONTEXT}"):
        generate(session, tokenizer(), TEXT * 3)
    with pytest.raises(CompileError, match="empty"):
        generate(session, tokenizer(), "")
    with pytest.raises(CompileError, match="no chat template"):
        generate(session, tokenizer(), "hello", chat=True)


def test_a_chat_template_is_used_unless_told_otherwise() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    session, words = TransformersSession(llama()), tokenizer(template)

    def start(prompt: str, **options: Any) -> list[str]:
        return list(generate(session, words, prompt, max_new_tokens=8, ends=(), **options))

    assert start("fox") == start("fox", chat=True) == start("<user>fox<assistant>", chat=False)
    assert start("fox") != start("fox", chat=False)


def test_pieces_join_to_the_text_and_never_split_a_character() -> None:
    words = tokenizer()
    for text in (TEXT, "🦊🐕🦊", " a  b\n\n c", "犬"):
        pieces = list(decoded(words, iter(words(text)["input_ids"])))
        assert "".join(pieces) == text and "�" not in "".join(pieces)
    half = words("🦊")["input_ids"][:-1]
    assert "".join(decoded(words, iter(half))) == words.decode(half)


def test_a_stop_is_found_across_pieces() -> None:
    assert list(until(["###", "END"], iter(["a#", "#b", "c#", "##d"]))) == ["a", "##b", "c"]
    assert "".join(until(["xyz"], iter("abxyabxyx"))) == "abxyabxyx"
    assert "".join(until([], iter("ab"))) == "ab"


def test_a_tokenizer_comes_from_the_folder(tmp_path: Path) -> None:
    words = tokenizer()
    words.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    loaded = load_tokenizer(tmp_path)
    assert loaded(TEXT)["input_ids"] == words(TEXT)["input_ids"]
    assert end_tokens(tmp_path, loaded) == {words.eos_token_id, 7, 8}
    with pytest.raises(CompileError, match="no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


# ---- evaluation ---------------------------------------------------------------------------------


def test_perplexity_is_what_torch_computes(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 9)
    words, model = tokenizer(), llama()
    windows = windows_for(text, words, 3, length=40)
    ids = words(TEXT * 9)["input_ids"]
    assert windows.tolist() == [ids[:40], ids[40:80], ids[80:120]]
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    nll = cross_entropy(logits.reshape(-1, VOCAB), windows[:, 1:].reshape(-1)).item()
    found = perplexity(TransformersSession(model), windows)
    assert (found.tokens, found.windows, found.length) == (3 * 39, 3, 40)
    assert found.nll == pytest.approx(nll, rel=1e-5) and found.ppl == pytest.approx(math.exp(nll), rel=1e-5)


def test_comparison_is_what_torch_computes() -> None:
    ours, theirs = llama(0), llama(1)
    windows = torch.from_numpy(TOKENS)
    with torch.no_grad():
        q, p = (m(windows).logits[:, :-1].double().log_softmax(-1).reshape(-1, VOCAB) for m in (ours, theirs))
    found = compare(TransformersSession(ours), TransformersSession(theirs), windows)
    expected = kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert found.kl == pytest.approx(expected, rel=1e-4)
    assert found.top1_agreement == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())
    assert found.ppl == pytest.approx(perplexity(TransformersSession(ours), windows).ppl)
    assert found.ppl_reference == pytest.approx(perplexity(TransformersSession(theirs), windows).ppl)
    same = compare(TransformersSession(ours), TransformersSession(ours), windows)
    assert (same.kl, same.top1_agreement) == (0, 1)


def test_vocabularies_must_agree(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=f"{WIDTH} outputs, the reference {VOCAB}"):
        encoder = open_session(write_encoder(tmp_path))
        compare_outputs(encoder, TransformersSession(llama()), torch.from_numpy(TOKENS))


def direct(model: Any, words: Any, before: str, after: str) -> float:
    ids = words(before + after)["input_ids"]
    start = len(words(before)["input_ids"])
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))


def test_log_likelihoods_are_what_torch_computes_in_any_batch() -> None:
    model, words = llama(), tokenizer()
    pairs = [("The quick", " brown fox"), ("The", " dog."), ("Viktor", " jagen Boxen"), ("犬", " も")] * 9
    found = log_likelihoods(TransformersSession(model), words, [Option(*pair) for pair in pairs])
    assert found == pytest.approx([direct(model, words, *pair) for pair in pairs], abs=1e-4)


def test_tasks_of_both_forms(tmp_path: Path) -> None:
    model, words = llama(), tokenizer()
    session = TransformersSession(model)
    choices = ["fox jumps over", "dog", "lazy dog."]
    scores = [direct(model, words, "The quick", " " + c) / len(c) for c in choices]
    contexts = ["The fox", "The dog\n"]
    joint = [direct(model, words, "The fox", " over"), direct(model, words, "The dog\n", "over")]
    lines = [
        {"query": "The quick", "choices": choices, "gold": int(np.argmax(scores))},
        {"query": "The quick", "choices": choices, "gold": int(np.argmin(scores))},
        {"contexts": contexts, "continuation": "over", "gold": int(np.argmax(joint))},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    found = accuracy(session, words, read_task(path))
    assert (found.task, found.examples) == ("mine", 3) and found.accuracy == pytest.approx(2 / 3)
    assert accuracy(session, words, read_task(path, limit=1)).accuracy == 1


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"gold": 0}', '{"query": "a", "choices": ["b"], "gold": 1}', ""]
)
def test_a_bad_line_of_a_task_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(CompileError, match=r"bad\.jsonl"):
        read_task(path)


# ---- bench --------------------------------------------------------------------------------------


def test_bench_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "STREAM_BYTES", 8 << 20)
    write_decoder(tmp_path, fused=True)
    found = bench(tmp_path, threads=1, work=Work(prompt=4, new=3, prefill=8, rounds=2))
    assert [len(r.values) for r in (found.decode, found.prefill, found.read_bytes_per_second)] == [2, 2, 2]
    assert min(found.decode.values) > 0 and found.decode.median > 0 and found.share_of_limit > 0
    assert found.load.first_token_seconds > 0
    # an interpreter and onnxruntime, but not what this process has imported
    assert 20 << 20 < found.load.peak_rss_bytes < 200 << 20
    assert found.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    cache = (4 + 2) * 2 * 2 * 8 * 4
    assert found.bytes_per_token == weight_bytes_per_token(tmp_path / "model.onnx") + cache


def test_tables_are_not_read_whole(tmp_path: Path) -> None:
    write_decoder(tmp_path, fused=True)
    used = {n: v.nbytes for n, v in tensors().items()}
    small = used["one"] + used["axis1"]
    expected = sum(used[n] for n in ("wq", "wk", "wv", "wo")) + small
    assert weight_bytes_per_token(tmp_path / "model.onnx") == expected


def test_a_failed_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="can't be loaded by gammac"):
        bench_module.load_in_process(tmp_path, 1, "gammac")


def test_memory_is_read_at_a_plausible_rate() -> None:
    assert 1e8 < read_bandwidth(1) < 1e13


def test_running_needs_no_torch() -> None:
    code = (
        "import sys, gammac.runtime.probe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ratios_are_of_rounds() -> None:
    rounds = bench_module.Rounds((2.0, 4.0, 9.0)), bench_module.Rounds((1.0, 4.0, 3.0))
    assert bench_module.ratio(*rounds) == 2.0 and rounds[0].median == 4.0
    assert all(a <= b for a, b in pairwise(rounds[0].values))


def test_running_an_artifact_imports_no_torch() -> None:
    told = "import sys, gammac.runtime.session, gammac.runtime.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
