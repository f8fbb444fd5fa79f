"""Trials against plain runs of the whole module, and what they promise: sharing, and equal results."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from llama_module import VOCAB, llama
from torch import Tensor

from gammac import trials
from gammac.calibration import inputs_of
from gammac.diagnostics import CompileError
from gammac.formats import Quantized, load_float, parse_format
from gammac.ir import Module
from gammac.ir.interpret import run, run_ops
from gammac.passes.candidates import Candidates
from gammac.pipeline import Context
from gammac.targets.target import load_target
from gammac.trials import Trial, run_trials
from gammac.weights import WeightStore

LENGTH = 40
TRIED: list[Mapping[str, str]] = [
    {},
    {"layers.0.q.weight": "w2g32"},
    {"layers.1.down.weight": "w2g32", "layers.0.q.weight": "w2g32"},
    {"embed.weight": "w4g64"},
    {"layers.1.down.weight": "w2g32"},
    {"layers.0.q.weight": "w2g32", "layers.2.v.weight": "w4g32", "embed.weight": "w8g64"},
    {"layers.0.q.weight": "w2g32"},
]


def with_candidates(blocks: int = 3) -> tuple[Module, WeightStore]:
    store = WeightStore()
    pass_ = Candidates("w2g32+w4g32", "w4g64+w8g64", quantizer="rtn")
    return pass_.run(llama(store, blocks), Context(load_target("cpu-x86"), store)), store


def windows(count: int = 5, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(3))


def log_probabilities(
    module: Module, store: WeightStore, tokens: Tensor, assignment: Mapping[str, str]
) -> Tensor:
    """The whole module through the interpreter, with the weights replaced."""

    def weights(name: str) -> Tensor:
        weight: Any = module.weights[name]
        if name not in assignment:
            return load_float(weight, store)
        arrays = store.get(weight.attrs["candidates"][assignment[name]])
        return Quantized(parse_format(assignment[name]), arrays).dequantize()

    function = module.functions["forward"]
    return run(function, inputs_of(function, tokens), weights)["logits"][:, :-1].log_softmax(-1)


@pytest.mark.parametrize("tried", TRIED, ids=lambda a: "+".join(a) or "nothing")
def test_a_trial_is_a_run_with_the_weights_replaced(tried: Mapping[str, str]) -> None:
    (module, store), tokens = with_candidates(), windows()
    log_p, log_q = (log_probabilities(module, store, tokens, a) for a in ({}, tried))
    (found,) = run_trials(module, store, tokens, [tried])
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean())
    nll = -float(log_q.gather(-1, tokens[:, 1:, None]).double().mean())
    assert found.kl == pytest.approx(kl, rel=1e-5, abs=1e-7)
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.top1 == float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    assert found.ppl == pytest.approx(math.exp(nll), rel=1e-4)


def test_nothing_tried_is_full_precision() -> None:
    (module, store), tokens = with_candidates(), windows()
    (found,) = run_trials(module, store, tokens, [{}])
    assert found.kl == 0.0 and found.top1 == 1.0
    assert run_trials(module, store, tokens, []) == []


def test_codes_that_are_stored_are_the_reference() -> None:
    (module, store), tokens = with_candidates(), windows()
    name = "layers.0.q.weight"
    candidates: Any = module.weights[name].attrs["candidates"]
    stored = dataclasses.replace(
        module.weights[name], digest=candidates["w2g32"], attrs={"role": "block", "stored": "w2g32"}
    )
    (found,) = run_trials(module.with_weights(stored), store, tokens, [{}])
    (expected,) = run_trials(module, store, tokens, [{name: "w2g32"}])
    assert found == Trial(0.0, expected.nll, 1.0)


@pytest.mark.parametrize("states", [0, 2, 3, 7, 100])
def test_nothing_depends_on_what_is_tried_beside_it(states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, with room for so many states at a time."""
    (module, store), tokens = with_candidates(), windows()
    monkeypatch.setattr(trials, "BATCH_TOKENS", 2 * LENGTH)
    alone = [run_trials(module, store, tokens, [a])[0] for a in TRIED]
    state = trials._Trials(module, store, tokens)._state_bytes()
    monkeypatch.setattr(trials, "STATE_BYTES", states * state)
    assert run_trials(module, store, tokens, TRIED) == alone
    assert run_trials(module, store, tokens, TRIED[::-1]) == alone[::-1]


def runs_by_segment(
    tried: list[Mapping[str, str]], monkeypatch: pytest.MonkeyPatch, tokens: Tensor
) -> list[int]:
    """How often each of the five segments of a model of three blocks is run."""
    module, store = with_candidates()
    order = {s.ops: i for i, s in enumerate(trials.segments(module.functions["forward"]))}
    counts = [0] * len(order)

    def counted(ops: Any, *rest: Any) -> None:
        counts[order[ops]] += 1
        run_ops(ops, *rest)

    monkeypatch.setattr(trials, "run_ops", counted)
    run_trials(module, store, tokens, tried)
    return counts


def test_what_begins_alike_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = windows(2)
    late = {"layers.2.v.weight": "w2g32"}
    assert runs_by_segment([late, late], monkeypatch, tokens) == [1, 1, 1, 2, 2]
    # three embeddings, q of block 0 behind two of them, down of block 1 behind two of these
    assert runs_by_segment(TRIED, monkeypatch, tokens) == [3, 4, 6, 6, 6]


def test_a_tied_weight_is_tried_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = {"embed.weight": "w4g64"}
    assert runs_by_segment([tied], monkeypatch, windows(2)) == [2] * 5


def test_mistakes_are_named() -> None:
    (module, store), tokens = with_candidates(), windows()
    with pytest.raises(CompileError, match=r"no weight 'layers\.9\.q'"):
        run_trials(module, store, tokens, [{"layers.9.q": "w2g32"}])
    with pytest.raises(
        CompileError, match=r"layers\.0\.q\.weight: has no candidate 'w5g32'(.|\n)*w2g32, w4g32"
    ):
        run_trials(module, store, tokens, [{}, {"layers.0.q.weight": "w5g32"}])
    with pytest.raises(CompileError, match="predicts the next token"):
        run_trials(module.with_attrs(kind="encoder"), store, tokens, [{}])
    with pytest.raises(CompileError, match="windows of 2 tokens"):
        run_trials(module, store, tokens[:, :1], [{}])
