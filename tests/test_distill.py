"""Distillation of scales and norms: its gradients, and what it learns of a small Llama."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from learning_models import allocated_llama, context, kill_at
from llama_module import VOCAB, llama

from gammac.diagnostics import CompileError
from gammac.formats import Quantized, candidates_of, parse_format
from gammac.ir import Module, to_text
from gammac.passes import Choices, default_pipeline
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.finetune.distill import Distill
from gammac.passes.finetune.student import Learnt, Student
from gammac.passes.kl_gradient import KlGradient
from gammac.passes.quantize import Quantize
from gammac.passes.sensitivity import WeightMse
from gammac.pipeline import Pipeline
from gammac.targets.target import load_target
from gammac.weights import WeightStore

DISTILL = Distill(steps=20, rate=0.01)


@pytest.fixture(scope="module")
def store() -> WeightStore:
    return WeightStore()


@pytest.fixture(scope="module")
def allocated(store: WeightStore) -> Module:
    return allocated_llama(store)


@pytest.fixture(scope="module")
def distilled(allocated: Module, store: WeightStore) -> Module:
    return DISTILL.run(allocated, context(store))


def logits_of(student: Student, tokens: torch.Tensor) -> torch.Tensor:
    return student.forward(tokens).logits()


def test_gradients_are_those_of_finite_differences(allocated: Module, store: WeightStore) -> None:
    """Along a random direction through everything learnt; the loss is smooth but for scales kept as f16."""
    student = Student(allocated, store)
    student.scaled = partial(_exactly_scaled, student)  # type: ignore[method-assign]
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
    target = torch.randn(2, 12, VOCAB, generator=torch.Generator().manual_seed(4))

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return (logits * target).sum() / 100

    generator = torch.Generator().manual_seed(5)
    along = {n: torch.randn(t.shape, generator=generator) for n, t in student.learnt.tensors().items()}
    _, gradients = student.forward(tokens).backward(loss)
    slope = 0.0
    for name, gradient in gradients:
        kind = "scales" if name in student.learnt.scales else "vectors"
        slope += float((gradient * along[f"{kind}:{name}"]).sum())
    step, values = 1e-3, []
    for sign in (1, -1):
        student.learnt = Learnt.of({n: sign * step * t for n, t in along.items()})
        values.append(float(loss(logits_of(student, tokens))))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.02)


def _exactly_scaled(student: Student, name: str) -> Quantized:
    start = student.codes(name)
    return Quantized(
        start.format, {**start.parts, "scales": start.scales.float() * student.learnt.scales[name].exp()}
    )


def test_the_student_begins_as_the_allocated_model(allocated: Module, store: WeightStore) -> None:
    ctx = context(store)
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))
    formats = {n: str(w.attrs["format"]) for n, w in allocated.weights.items() if "format" in w.attrs}
    teacher = KlGradient(allocated, tokens, ctx)
    log_q = logits_of(Student(allocated, store), tokens)[:, :-1].log_softmax(-1)
    log_p = teacher.log_p(0)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert kl == pytest.approx(teacher.measure(formats, "")[0], rel=1e-4)


def test_what_is_learnt_is_nearer_on_tokens_not_learnt_from(
    allocated: Module, distilled: Module, store: WeightStore
) -> None:
    report = distilled.attrs["distillation"]
    assert isinstance(report, dict) and report["after"] < 0.95 * report["before"]
    tokens = torch.randint(0, VOCAB, (8, 24), generator=torch.Generator().manual_seed(2))
    log_p = torch.cat([KlGradient(allocated, tokens, context(store)).log_p(b) for b in range(4)])
    losses = []
    for module in (allocated, distilled):
        log_q = logits_of(Student(module, store), tokens)[:, :-1].log_softmax(-1)
        losses.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    assert losses[1] < 0.95 * losses[0]


def test_codes_stay_and_scales_move(allocated: Module, distilled: Module, store: WeightStore) -> None:
    moved = 0
    for name, before in allocated.weights.items():
        after = distilled.weights[name]
        if before.attrs.get("role") != "block":
            continue
        format_ = str(before.attrs["format"])
        old, new = (
            Quantized(parse_format(format_), store.get(candidates_of(w)[format_])) for w in (before, after)
        )
        assert torch.equal(old.codes, new.codes) and new.scales.dtype == torch.float16
        moved += not torch.equal(old.scales, new.scales)
    assert moved >= 10
    gains = [n for n, w in allocated.weights.items() if n.endswith("norm.weight") and w.type.rank == 1]
    assert gains and all(distilled.weights[n].digest != allocated.weights[n].digest for n in gains)
    only_scales = Distill(steps=2, vectors=False).run(allocated, context(store))
    assert all(only_scales.weights[n].digest == allocated.weights[n].digest for n in gains)


def test_scales_of_trellis_codes_are_learnt(store: WeightStore) -> None:
    ctx = dataclasses.replace(context(store), target=load_target("reference"))
    passes = (
        CollectGrams(), Candidates("tcq2", "w8g32", "tcq"), WeightMse(), Allocate(budget="2", tie=False),
    )  # fmt: skip
    module = Pipeline(passes).run(llama(store), ctx)
    found = DISTILL.run(module, ctx)
    report = found.attrs["distillation"]
    assert isinstance(report, dict) and report["after"] < 0.95 * report["before"]
    name = "layers.0.q.weight"
    old, new = (store.get(candidates_of(m.weights[name])["tcq2"]) for m in (module, found))
    assert torch.equal(old["packed"], new["packed"]) and not torch.equal(old["scales"], new["scales"])


def test_quantize_stores_what_was_learnt(distilled: Module, store: WeightStore) -> None:
    stored = Quantize().run(distilled, context(store))
    for name, weight in distilled.weights.items():
        if "format" in weight.attrs:
            assert stored.weights[name].digest == candidates_of(weight)[str(weight.attrs["format"])]


def test_what_does_not_help_is_not_taken(
    allocated: Module, store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gammac.passes.finetune.distill._Trainer.error", lambda _: 0.25)
    found = Distill(steps=1).run(allocated, context(store))
    assert found.weights == allocated.weights
    assert found.attrs["distillation"] == {"before": 0.25, "after": 0.25}


def test_equal_seeds_equal_scales_and_a_killed_run_goes_on(
    allocated: Module, distilled: Module, store: WeightStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context(store, tmp_path)
    done = kill_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        DISTILL.run(allocated, ctx)
    assert to_text(DISTILL.run(allocated, ctx)) == to_text(distilled)
    assert len(done) == 4 and len(set(done)) == 3, "three chunks of steps, the last of them twice"
    other = DISTILL.run(allocated, context(store, seed=1))
    assert to_text(other) != to_text(distilled)


def test_wrong_wishes_are_refused(allocated: Module, store: WeightStore) -> None:
    with pytest.raises(CompileError, match="steps is at least 1"):
        Distill(steps=0)
    with pytest.raises(CompileError, match="calibration text"):
        DISTILL.run(allocated, dataclasses.replace(context(store), calibration=None))
    with pytest.raises(CompileError, match="full-precision inputs"):
        default_pipeline(Choices(distill=True, inputs="quantized"), "onnx", compiler=True)
    with pytest.raises(CompileError, match="scales of dual_binary and integer and trellis"):
        default_pipeline(Choices("nf4g64", quantizer="nf", distill=True), "onnx", compiler=True)
