"""Prefill and decode give the tokens that transformers gives."""

from pathlib import Path

import pytest
import torch
from families import DECODERS, Captured, captured, first_passes, tokens

from gammac.diagnostics import CompileError
from gammac.frontend.export import capture, load_source
from gammac.ir import Sym, parse, rewrite
from gammac.passes.insert_kv_cache import InsertKvCache, attention_is_one_op, decoder_has_a_cache
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.weights import WeightStore

TINY = Path(__file__).parent.parent / "models_zoo" / "tiny"


def generate(found: Captured, ids: torch.Tensor, count: int) -> list[int]:
    """Greedy tokens by one prefill and `count` - 1 steps of decode."""
    outputs = found.run("prefill", input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])
    chosen: list[int] = []
    while True:
        token = outputs["logits"][:, -1:].argmax(-1)
        chosen.append(int(token))
        if len(chosen) == count:
            return chosen
        past = {name.replace("present", "past"): t for name, t in outputs.items() if name != "logits"}
        position = torch.tensor([[ids.shape[1] + len(chosen) - 1]])
        outputs = found.run("decode", input_ids=token, position_ids=position, **past)


def reference(found: Captured, ids: torch.Tensor, count: int) -> list[int]:
    """Greedy tokens by transformers, which goes on after an end token."""
    found.model.generation_config.eos_token_id = None
    with torch.no_grad():
        whole = found.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return whole[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt2", "opt"])
def test_sixty_four_greedy_tokens_are_transformers(family: str) -> None:
    found = captured(family)
    ids, _ = tokens(1, 6)
    assert generate(found, ids, 64) == reference(found, ids, 64)


@pytest.mark.parametrize("family", DECODERS)
def test_decode_continues_forward(family: str) -> None:
    """Several tokens at a time, for several texts at a time, give what one forward gives."""
    found = captured(family)
    ids, positions = tokens(2, 11)
    whole = found.run("forward", input_ids=ids, position_ids=positions)["logits"]
    outputs = found.run("prefill", input_ids=ids[:, :5], position_ids=positions[:, :5])
    seen = [outputs["logits"]]
    for start, end in ((5, 6), (6, 9), (9, 11)):
        past = {name.replace("present", "past"): t for name, t in outputs.items() if name != "logits"}
        outputs = found.run(
            "decode", input_ids=ids[:, start:end], position_ids=positions[:, start:end], **past
        )
        seen.append(outputs["logits"])
    torch.testing.assert_close(torch.cat(seen, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_the_signature_names_the_cache() -> None:
    decode = captured("llama").module.functions["decode"]
    names = [p.name for p in decode.params]
    assert names == [
        "input_ids", "position_ids", "past_key.0", "past_value.0", "past_key.1", "past_value.1",
    ]  # fmt: skip
    assert str(decode.params[2].type) == "f32[batch,2,past,8]"
    assert decode.return_names == (
        "logits", "present_key.0", "present_value.0", "present_key.1", "present_value.1",
    )  # fmt: skip
    assert decode.returns[1].type.shape[2] == Sym.named("past") + Sym.named("seq")
    assert set(captured("llama").module.functions) == {"forward", "prefill", "decode"}


def test_an_encoder_gets_no_cache() -> None:
    module = captured("bert").module
    assert set(module.functions) == {"forward"}
    assert not list(decoder_has_a_cache(module))


def test_attention_in_pieces_is_refused() -> None:
    source = captured("llama").source
    without = rewrite(
        source.functions["forward"], lambda b, op, xs: (xs[0],) if op.name == "attention" else None
    )
    module = source.with_functions(without)
    assert [d.loc for d in attention_is_one_op(module)] == ["@forward"]
    with pytest.raises(CompileError, match="0 attention ops for 2 layers"):
        Pipeline((InsertKvCache(),)).run(module, Context(load_target("cpu-x86")))


def test_a_mask_tensor_is_refused() -> None:
    text = """module @m attributes {kind = "decoder", layers = 1} {
      func @forward(%x: f32[batch,2,seq,8], %mask: bool[seq,seq]) {
        %0 = attention %x, %x, %x, %mask {scale = 1.0, causal = true} : f32[batch,2,seq,8] loc("layers.0")
        return y = %0
      }
    }"""
    (complaint,) = attention_is_one_op(parse(text))
    assert complaint.loc == "layers.0"


@pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="the embedded model is not there yet")
def test_the_embedded_model_generates_what_transformers_does() -> None:
    from transformers import AutoModelForCausalLM

    store = WeightStore()
    source = load_source(str(TINY))
    module = capture(source, store)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    found = Captured(model, module, first_passes(module, store), store)
    assert source.tokenizer is not None
    ids = source.tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert generate(found, ids, 64) == reference(found, ids, 64)
