"""DB-LLM's training beyond blocks: gradients at the scales of two planes, and its loss for distillation."""

import math

import pytest
import torch
from llama_module import VOCAB, llama
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import Quantized, candidates_of, parse_format
from gammac.ir import Module
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.finetune import Distill
from gammac.passes.finetune.deviation_aware import deviation_aware_loss
from gammac.passes.finetune.distill import _Trainer
from gammac.passes.finetune.scales import at_logs, scaled
from gammac.passes.quantizers import make_quantizer
from gammac.passes.sensitivity import WeightMse
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore


def logits(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(seed))


TOKENS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(9))


# ---- the loss -----------------------------------------------------------------------------------


def test_without_focus_it_is_distillation_and_the_next_token() -> None:
    student, log_p = logits(0), logits(1).log_softmax(-1)
    cross = torch.nn.functional.cross_entropy
    expected = cross(student.flatten(0, 1), log_p.exp().flatten(0, 1)) + cross(
        student.flatten(0, 1), TOKENS.flatten()
    )
    assert float(deviation_aware_loss(student, log_p, TOKENS, 0.0)) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_by_hand() -> None:
    """Both unsure: the whole cross entropy counts. The teacher sure: none of it."""
    even = torch.zeros(1, 4)
    sure = torch.tensor([[100.0, 0, 0, 0]])
    token = torch.tensor([1])
    both = deviation_aware_loss(even, even.log_softmax(-1), token, 0.5)
    assert float(both) == pytest.approx(2 * math.log(4), rel=1e-6)
    one = deviation_aware_loss(even, sure.log_softmax(-1), token, 0.5)
    assert float(one) == pytest.approx(math.log(4), rel=1e-6)


def test_positions_that_are_hard_to_tell_weigh_more() -> None:
    """Gradients of the distilled part, an unsure position beside a sure one."""
    teacher = torch.stack([0.1 * logits(2)[0, 0], 8 * logits(3)[0, 0]])
    student = teacher + 0.5 * logits(4)[0, :2]
    tokens, norms = TOKENS[0, :2], []
    for focus in (0.0, 0.5, 1.0):
        x = student.clone().requires_grad_()
        loss = deviation_aware_loss(x, teacher.log_softmax(-1), tokens, focus)
        loss = loss - torch.nn.functional.cross_entropy(x, tokens)
        (gradient,) = torch.autograd.grad(loss, x)
        norms.append(gradient.norm(dim=1))
    shares = [float(n[0] / n[1]) for n in norms]
    assert shares[0] < shares[1] < shares[2]


def test_no_gradient_flows_through_the_weight() -> None:
    student, log_p = logits(5).requires_grad_(), logits(6).log_softmax(-1)
    (found,) = torch.autograd.grad(deviation_aware_loss(student, log_p, TOKENS, 1.0), student)
    log_q = student.log_softmax(-1)
    weight = (log_p.exp() * log_p).sum(-1) * (log_q.exp() * log_q).sum(-1).detach() / math.log(11) ** 2
    loss = (weight * -(log_p.exp() * log_q).sum(-1)).mean()
    loss = loss + torch.nn.functional.cross_entropy(student.flatten(0, 1), TOKENS.flatten())
    (expected,) = torch.autograd.grad(loss, student)
    assert torch.allclose(found, expected, atol=1e-6)


# ---- scales of two planes -----------------------------------------------------------------------


def planes_of_a_weight() -> Quantized:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 64, generator=generator), torch.randn(200, 64, generator=generator)
    (found,) = make_quantizer("db_llm").quantize(weight, x.T @ x / 200, [parse_format("fdb2g32")])
    return found


def test_gradients_at_the_scales_are_those_of_autograd() -> None:
    start = planes_of_a_weight()
    gradient = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    logs = torch.zeros(6, 2, 2, requires_grad=True)
    alpha = (start.scales.float() * logs.exp()).repeat_interleave(32, 1)
    weight = alpha[..., 0] * start.parts["first"] + alpha[..., 1] * start.parts["second"]
    (expected,) = torch.autograd.grad((weight * gradient).sum(), logs)
    assert torch.allclose(at_logs(start, gradient), expected, atol=1e-4)


def test_scaled_keeps_codes_and_order() -> None:
    start = planes_of_a_weight()
    assert torch.equal(scaled(start, torch.zeros(6, 2, 2)).scales, start.scales)
    found = scaled(start, torch.tensor([-2.0, 2.0]).expand(6, 2, 2))
    assert torch.equal(found.parts["first"], start.parts["first"])
    first, second = found.scales.float().unbind(-1)
    assert bool((first * second < 0).all() and (second.abs() < first.abs()).all())


@pytest.fixture(scope="module")
def ctx() -> Context:
    tokens = torch.randint(0, VOCAB, (64, 24), generator=torch.Generator().manual_seed(1))
    return Context(load_target("cpu-x86"), WeightStore(), (), Calibration(tokens))


@pytest.fixture(scope="module")
def allocated(ctx: Context) -> Module:
    passes = (CollectGrams(), Candidates("fdb2g32", "w8g32", "db_llm"), WeightMse())
    return Pipeline((*passes, Allocate(budget="2", tie=False))).run(llama(ctx.store), ctx)


def test_distillation_brings_two_planes_nearer(allocated: Module, ctx: Context) -> None:
    found = Distill(steps=16, rate=0.01).run(allocated, ctx)
    report = found.attrs["distillation"]
    assert isinstance(report, dict) and report["after"] < 0.98 * report["before"]
    for name, weight in allocated.weights.items():
        if weight.attrs.get("role") == "block":
            before, after = (
                ctx.store.get(candidates_of(w)["fdb2g32"]) for w in (weight, found.weights[name])
            )
            assert torch.equal(before["first"], after["first"]) and after["scales"].shape[-1] == 2


def test_steps_lower_the_loss_that_was_asked_for(allocated: Module, ctx: Context) -> None:
    assert ctx.calibration is not None
    trainer = _Trainer(
        Distill(steps=8, rate=0.01, loss="deviation_aware"), allocated, ctx.calibration.tokens, ctx
    )

    def loss() -> float:
        runs = (trainer.student.forward(trainer.batches[b]).logits() for b in trainer.used)
        return sum(float(trainer._loss(logits, b)) for logits, b in zip(runs, trainer.used, strict=True))

    before = loss()
    trainer.train(0)
    assert loss() < 0.998 * before


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(CompileError, match="there are kl, deviation_aware"):
        Distill(loss="l2")
