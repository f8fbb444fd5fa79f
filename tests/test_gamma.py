"""The pass gamma: its samples, lines and prices by themselves, and what it learns of a small Llama."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from llama_module import VOCAB, llama
from torch import Tensor

from gammac.cache import PassCache
from gammac.calibration import SegmentWeights, Stream, backward_segments, run_up_to_last
from gammac.diagnostics import CompileError
from gammac.formats import candidates_of, load_float, parse_format
from gammac.ir import Module, Value, to_text
from gammac.ir.interpret import run_ops
from gammac.passes.allocate import Allocate
from gammac.passes.allocation_problem import Choice
from gammac.passes.allocation_search import choose
from gammac.passes.candidates import Candidates
from gammac.passes.kl_gradient import Formats, KlGradient, Slopes
from gammac.passes.options import parse_strategy
from gammac.passes.sensitivity import STRATEGIES
from gammac.passes.sensitivity.gamma import Gamma, block_loss
from gammac.passes.sensitivity.gamma_interactions import LEAST, SHARE, shrunk
from gammac.passes.sensitivity.gamma_preferences import Lines, Preferences, gumbel_softmax
from gammac.passes.sensitivity.gamma_steps import SteppedPreferences
from gammac.passes.sensitivity.gamma_teacher import Teacher
from gammac.passes.sensitivity.scores import candidate, falling, scoring_tokens
from gammac.pipeline import Context, Pipeline
from gammac.progress import no_progress
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore

WIDTHS: Final = (2.0, 3.0, 4.0, 8.0)
WINDOWS: Final = 8
# options of a run that takes a moment and stays at teacher forcing
QUICK: Final[dict[str, Any]] = {"windows": 4, "sweeps": 4, "steps": 6, "draws": 0, "curvature": 0.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_gradients_of_samples_are_those_of_the_soft_ones(temperature: float, hard: bool) -> None:
    """Against central differences of the soft sample with the same noise; straight-through if hard."""
    logits = torch.randn(4, generator=seeded(1), dtype=torch.float64)
    towards = torch.randn(4, generator=seeded(2), dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gumbel_softmax(leaf, temperature, seeded(3), hard) @ towards, leaf)
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 1e-5
        above, below = (
            gumbel_softmax(x, temperature, seeded(3), False) @ towards for x in (logits + step, logits - step)
        )
        assert float(gradient[i]) == pytest.approx(float(above - below) / 2e-5, rel=1e-5, abs=1e-8)


def test_hard_samples_are_one_hot_and_as_frequent_as_they_should() -> None:
    logits, generator = torch.tensor([0.3, -1.0, 1.2, 0.0], dtype=torch.float64), seeded()
    samples = torch.stack([gumbel_softmax(logits, 1.0, generator, True) for _ in range(3000)])
    assert set(samples.flatten().tolist()) == {0.0, 1.0} and (samples.sum(1) == 1).all()
    # five standard errors of a share of 3000 draws
    torch.testing.assert_close(samples.mean(0), logits.softmax(0), atol=5 * 0.5 / 3000**0.5, rtol=0)


def test_soft_samples_are_shares_and_sharpen_as_it_gets_colder() -> None:
    logits = torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64)
    peaks = []
    for temperature in (5.0, 1.0, 0.1):
        samples = torch.stack([gumbel_softmax(logits, temperature, seeded(i), False) for i in range(200)])
        assert ((samples > 0) & (samples < 1)).any() and torch.allclose(
            samples.sum(1), torch.ones(200).double()
        )
        peaks.append(float(samples.amax(1).mean()))
    assert peaks == sorted(peaks) and peaks[0] < 0.6 and peaks[2] > 0.9


# ---- lines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1.0, 0.9])
@pytest.mark.parametrize("hard", [False, True])
def test_lines_are_exact_for_a_quadratic_loss(memory: float, hard: bool) -> None:
    """L = l p² + I p has the slope 2 l p + I, and L(1) − L(0) = l + I wherever it was sampled."""
    quadratic = torch.tensor([3.0, 0.2, 0.01, 0.0], dtype=torch.float64)
    linear = torch.tensor([-0.5, 0.3, 0.0, 0.1], dtype=torch.float64)
    lines, generator = Lines.none(4), seeded(5)
    logits = torch.tensor([0.5, 0.0, -1.0, 0.2], dtype=torch.float64)
    for _ in range(60):
        p = gumbel_softmax(logits, 1.0, generator, hard)
        lines.add(p, 2 * quadratic * p + linear, memory)
    torch.testing.assert_close(lines.losses(), quadratic + linear, rtol=1e-9, atol=1e-9)


def test_a_line_without_spread_or_falling_is_its_mean() -> None:
    lines = Lines.none(2)
    for p, slope in ((0.2, 1.0), (0.8, -1.0)):
        lines.add(torch.tensor([0.25, p]).double(), torch.tensor([slope, slope]).double(), 1.0)
    assert lines.losses().tolist() == pytest.approx([0.0, 0.0])
    assert Lines.none(3).losses().tolist() == [0.0, 0.0, 0.0]


# ---- prices -------------------------------------------------------------------------------------


def preferences(target: float, augmented: bool = True) -> Preferences:
    """Six modules of several sizes, whose losses are known and stand still."""
    generator = seeded(7)
    sizes = {f"m{i}": 1.0 + i % 3 for i in range(6)}
    found = Preferences(
        dict.fromkeys(sizes, WIDTHS), {n: s / sum(sizes.values()) for n, s in sizes.items()}, target,
        memory=1.0, growth=1.5, augmented=augmented,
    )  # fmt: skip
    for lines in found.lines.values():
        level = torch.exp(2 * torch.randn((), generator=generator, dtype=torch.float64))
        lines.add(torch.full((4,), 0.5).double(), level * 4.0 ** -torch.tensor(WIDTHS).double(), 1.0)
    return found


@pytest.mark.parametrize(
    ("target", "temperature"), [(2.3, 0.3), (3.0, 0.1), (3.0, 2.0), (5.0, 0.3), (7.5, 1.0)]
)
def test_settling_meets_the_target(target: float, temperature: float) -> None:
    found = preferences(target)
    for _ in range(26):
        found.settle(temperature, 0.1)
    assert abs(found.violation) < 1e-3
    assert found.violation == pytest.approx(found.excess(temperature))


@pytest.mark.parametrize("target", [2.3, 7.5])
def test_a_penalty_alone_leaves_a_residual(target: float) -> None:
    found = preferences(target, augmented=False)
    for _ in range(12):
        found.settle(0.3, 0.1)
    assert abs(found.violation) > 0.05 and found.multiplier == 0.0


@pytest.mark.parametrize("augmented", [False, True])
def test_the_price_is_the_fixed_point(augmented: bool) -> None:
    found = preferences(3.0, augmented)
    for _ in range(8):
        multiplier, penalty, violation = found.multiplier, found.penalty, found.violation
        found.settle(0.5, 0.1)
        assert found.penalty == pytest.approx(penalty) or penalty == 0 or found.penalty == 1.5 * penalty
        if augmented and penalty:
            assert (found.multiplier > multiplier) == (violation > 0)
        # the penalty that the price was found with: it may have grown behind it
        used = penalty or found.penalty
        span = used * (max(WIDTHS) - min(WIDTHS))
        assert found.price == pytest.approx(
            found.multiplier + used * found.excess(0.5), rel=1e-9, abs=1e-9 * span
        )


def test_dearer_bits_are_fewer() -> None:
    found = preferences(3.0)
    found.settle(0.5, 0.1)
    excess = [found.excess(0.5, price) for price in (-100.0, 0.0, 0.1, 1.0, 100.0)]
    assert excess == sorted(excess, reverse=True)
    assert excess[0] == pytest.approx(5) and excess[-1] == pytest.approx(-1)


def test_before_the_first_losses_all_formats_are_alike() -> None:
    found = Preferences({"m": WIDTHS}, {"m": 1.0}, 3.0, 0.9, 1.5, True)
    assert found.logits("m").abs().max() == 0


def test_a_state_survives_json() -> None:
    found, again = preferences(3.0), Preferences({"m": WIDTHS}, {"m": 1.0}, 3.0, 0.9, 1.5, True)
    for _ in range(3):
        state = json.loads(json.dumps(found.state()))
        again = preferences(3.0)
        again.lines = {n: Lines.none(4) for n in again.lines}
        again.restore(state)
        assert again.state() == found.state()
        found.settle(0.5, 0.1)
        again.settle(0.5, 0.1)
        assert again.state() == found.state() and again.price == found.price


# ---- a small Llama ------------------------------------------------------------------------------


def context(store: WeightStore, **options: Any) -> Context:
    tokens = torch.randint(0, VOCAB, (WINDOWS, 24), generator=seeded(1))
    return Context(load_target("cpu-x86"), store, (), Calibration(tokens), **options)


def with_candidates(blocks: int, formats: str = "w2g32+w3g32+w4g32+w8g32") -> tuple[Module, Context]:
    store = WeightStore()
    ctx = context(store)
    return Candidates(formats, "w4g64+w8g64", quantizer="rtn").run(llama(store, blocks), ctx), ctx


@pytest.fixture(scope="module")
def prepared() -> tuple[Module, Context]:
    """Four blocks: 28 linears."""
    return with_candidates(4)


@pytest.fixture(scope="module")
def small() -> tuple[Module, Context]:
    """One block, where a run takes a moment."""
    return with_candidates(1)


@pytest.mark.parametrize("shown", [False, True])
def test_any_loss_flows_back_and_what_arrives_is_shown(small: tuple[Module, Context], shown: bool) -> None:
    """Against autograd from each segment's output on; states stay only for who is shown gradients."""
    module, ctx = small
    assert ctx.calibration is not None
    stream, found = Stream(module.functions["forward"], ctx.calibration.tokens), dict[tuple[int, int], Any]()

    def loss(logits: Tensor, batch: int) -> Tensor:
        return (batch + 1) * logits.square().mean()

    def arriving(index: int, batch: int, gradients: dict[Value, Tensor]) -> None:
        found[index, batch] = gradients

    run_up_to_last(module, stream, ctx.store, no_progress, "")
    segments, runs = stream.segments, backward_segments(
        module, stream, ctx.store, no_progress, "", loss=loss, arriving=arriving if shown else None
    )  # fmt: skip
    assert sum(len(list(gradients)) for _, _, gradients in runs) == 9 * len(stream.batches)
    assert [stream.has(i) for i in range(len(segments))] == [shown] * len(segments)
    if not shown:
        return
    assert found.keys() == {(i, b) for i in range(len(segments) - 1) for b in range(len(stream.batches))}
    weights = SegmentWeights(module, ctx.store)
    for (index, batch), gradients in found.items():
        env = stream.load(index + 1, batch)
        leaves = {v: env[v].requires_grad_() for v in gradients}
        for segment in segments[index + 1 :]:
            run_ops(segment.ops, env, stream.sizes[batch], weights, keep=[*leaves, *segment.live_out])
        expected = torch.autograd.grad(loss(env[segments[-1].live_out[-1]], batch), list(leaves.values()))
        for own, other in zip(gradients.values(), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-8)


def scores_of(module: Module, role: str = "block") -> dict[str, dict[str, float]]:
    found: dict[str, Any] = {n: w.attrs["scores"] for n, w in module.weights.items() if "scores" in w.attrs}
    return {n: s for n, s in found.items() if module.weights[n].attrs["role"] == role}


def measured(module: Module, ctx: Context, format_: str, normalize: str) -> dict[str, float]:
    """Each block linear's loss with nothing but this one candidate in place, over all batches."""
    assert ctx.calibration is not None
    teacher = Teacher(module, ctx.calibration.tokens, ctx)
    found: dict[str, float] = {}
    for index in range(1, len(teacher.segments) - 1):
        weights = SegmentWeights(module, ctx.store)
        for name in teacher.weights_of(index):
            own = candidate(module.weights[name], format_, ctx)

            def changed(
                n: str, name: str = name, own: Tensor = own, weights: SegmentWeights = weights
            ) -> Tensor:
                return own if n == name else weights(n)

            with torch.no_grad():
                losses = [
                    block_loss(normalize, teacher, index, b, teacher.run(index, b, teacher.stream, changed))
                    for b in range(teacher.batches)
                ]
            found[name] = float(torch.stack(losses).mean())
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, for values without ties."""
    first, second = (np.argsort(np.argsort(np.array(x))) for x in (a, b))
    return float(1 - 6 * np.square(first - second).sum() / (len(a) * (len(a) ** 2 - 1)))


def gamma_attrs(module: Module) -> dict[str, float]:
    found = module.attrs["gamma"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("samples", "normalize"), [("hard", "fisher"), ("soft", "fisher"), ("hard", "delta")]
)
def test_what_is_learnt_is_what_is_lost(
    prepared: tuple[Module, Context], samples: str, normalize: str
) -> None:
    module, ctx = prepared
    options: dict[str, Any] = {"samples": samples, "normalize": normalize, "draws": 0, "curvature": 0.0}
    scored = Gamma(windows=WINDOWS, sweeps=8, **options).run(module, ctx)
    scores, alone = scores_of(scored), measured(module, ctx, "w2g32", normalize)
    assert scores.keys() == alone.keys() and len(scores) == 28
    for name, own in scores.items():
        assert list(own) == list(candidates_of(module.weights[name]))
        assert all(np.isfinite(x) and x >= 0 for x in own.values())
        assert min(own["w2g32"], own["w3g32"]) > own["w8g32"] and own["w2g32"] > own["w4g32"]
    ordered = [list(own.values()) == sorted(own.values(), reverse=True) for own in scores.values()]
    assert sum(ordered) >= 22, "4 and 8 bits are near each other"
    assert rank_correlation([s["w2g32"] for s in scores.values()], list(alone.values())) > 0.8
    assert abs(gamma_attrs(scored)["excess_bits"]) < 1e-3 and gamma_attrs(scored)["price"] > 0


@pytest.mark.parametrize("format_", ["w2g32", "w4g32"])
def test_the_curvature_is_what_a_block_loses(small: tuple[Module, Context], format_: str) -> None:
    """Exactly where all that follows in the block is linear in the weight, nearly behind softmax and SiLU."""
    module, ctx = small
    assert ctx.calibration is not None
    curvatures = Teacher(module, ctx.calibration.tokens, ctx).curvatures
    lost = measured(module, ctx, format_, "fisher")
    assert (
        curvatures.keys()
        == lost.keys()
        == {f"layers.0.{n}.weight" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    )
    for name, loss in lost.items():
        exact = name in ("layers.0.up.weight", "layers.0.down.weight")
        assert curvatures[name][format_] == pytest.approx(loss, rel=1e-5 if exact else 0.5)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_loss_is_a_mean_of_what_was_sampled_and_the_curvature(
    small: tuple[Module, Context], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ctx = small
    monkeypatch.setattr("gammac.passes.sensitivity.gamma.falling", dict)
    sampled = scores_of(Gamma(**QUICK).run(module, ctx))
    mixed = scores_of(Gamma(**{**QUICK, "curvature": share}).run(module, ctx))
    curvatures = Teacher(module, scoring_tokens("gamma", QUICK["windows"], module, ctx), ctx).curvatures
    for name, own in mixed.items():
        for format_, loss in own.items():
            wanted = (1 - share) * sampled[name][format_] + share * curvatures[name][format_]
            assert loss == pytest.approx(wanted, rel=1e-5)


def test_each_option_changes_what_is_learnt() -> None:
    module, ctx = with_candidates(2)
    options: list[dict[str, Any]] = [
        {}, {"samples": "soft"}, {"normalize": "delta"}, {"normalize": "output"}, {"normalize": "none"},
        {"inputs": "mixed"}, {"constraint": "penalty"}, {"target": 4.0}, {"memory": 0.5}, {"windows": 3},
        {"hot": 4.0}, {"cold": 0.6, "samples": "soft"}, {"penalty": 1.0, "constraint": "penalty"},
        {"sweeps": 5}, {"steps": 5}, {"draws": 3}, {"curvature": 0.5},
    ]  # fmt: skip
    runs = [Gamma(**{**QUICK, "windows": 2, "sweeps": 3, "steps": 3, **o}).run(module, ctx) for o in options]
    for (i, a), (j, b) in itertools.combinations(enumerate(scores_of(r) for r in runs), 2):
        assert a != b, f"{options[i]} and {options[j]}"


def test_a_penalty_alone_misses_the_target(prepared: tuple[Module, Context]) -> None:
    module, ctx = prepared
    augmented, penalty = (
        gamma_attrs(Gamma(**{**QUICK, "constraint": c}).run(module, ctx)) for c in ("augmented", "penalty")
    )
    assert abs(penalty["excess_bits"]) > 3 * abs(augmented["excess_bits"])


def test_where_the_constraint_is_met_its_penalty_says_nothing(small: tuple[Module, Context]) -> None:
    module, ctx = small
    runs = [Gamma(**{**QUICK, "penalty": p}).run(module, ctx) for p in (0.05, 0.5)]
    assert all(abs(gamma_attrs(r)["excess_bits"]) < 1e-3 for r in runs)
    prices = [gamma_attrs(r)["price"] for r in runs]
    assert prices[0] == pytest.approx(prices[1], rel=0.1)


def test_scores_hold_for_every_target(prepared: tuple[Module, Context]) -> None:
    """The price is not in them: learnt at another average, they order the modules as before."""
    module, ctx = prepared
    first, other = (scores_of(Gamma(**{**QUICK, "target": t}).run(module, ctx)).values() for t in (2.5, 5.0))
    assert rank_correlation([s["w2g32"] for s in first], [s["w2g32"] for s in other]) > 0.8


def test_scores_are_the_seed_s(small: tuple[Module, Context]) -> None:
    module, ctx = small
    pass_ = Gamma(**{**QUICK, "draws": 3})
    runs = [pass_.run(module, dataclasses.replace(ctx, seed=seed)) for seed in (0, 0, 1)]
    first, again, other = map(to_text, runs)
    assert first == again
    a, b = scores_of(runs[0]), scores_of(runs[2])
    assert first != other and all(a[n] != b[n] for n in a)


@pytest.mark.parametrize("inputs", ["full", "mixed"])
def test_a_killed_run_goes_on_where_it_stopped(
    small: tuple[Module, Context], inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ctx = small
    monkeypatch.setattr("gammac.passes.sensitivity.gamma_interactions.GROUP", 1)
    pass_ = Gamma(**{**QUICK, "draws": 3, "inputs": inputs})
    cached = dataclasses.replace(ctx, cache=PassCache(tmp_path))
    whole = to_text(pass_.run(module, ctx))
    original, computed = PassCache.record, list[str]()

    class Killed(Exception):
        pass

    def dying(after: int | None) -> Callable[..., dict[str, Any]]:
        def record(self: PassCache, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            def counted() -> dict[str, Any]:
                if len(computed) == after:
                    raise Killed
                computed.append(key)
                return compute()

            return original(self, key, counted)

        return record

    for after in (1, 3, 5):  # at the last of them models are drawn
        monkeypatch.setattr(PassCache, "record", dying(after))
        with pytest.raises(Killed):
            pass_.run(module, cached)
    monkeypatch.setattr(PassCache, "record", dying(None))
    assert to_text(pass_.run(module, cached)) == whole
    assert len(computed) == len(set(computed)) >= 4 + 3, "each sweep and each drawn model was run once"
    first = list(computed)
    assert to_text(pass_.run(module, cached)) == whole and computed == first
    pass_.run(module, dataclasses.replace(cached, seed=1))
    assert len(set(computed)) == 2 * len(first), "another seed's are others"


def test_what_the_teacher_says_serves_every_target(
    small: tuple[Module, Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Curvatures are worked out once, and again where their record is damaged."""
    module, ctx = small
    cached = dataclasses.replace(ctx, cache=PassCache(tmp_path))
    worked_out: list[bool] = []

    class Counted(Teacher):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            worked_out.append(bool(self.curvatures))

    monkeypatch.setattr("gammac.passes.sensitivity.gamma.Teacher", Counted)
    options = {**QUICK, "draws": 0, "curvature": 0.5}
    wanted = [to_text(Gamma(**options, target=t).run(module, ctx)) for t in (2.5, 3.0)]
    assert worked_out == [True, True]
    found = [to_text(Gamma(**options, target=t).run(module, cached)) for t in (2.5, 3.0)]
    assert found == wanted and worked_out[2:] == [True, False]
    for record in tmp_path.rglob("*.json"):
        record.write_text("{")
    assert to_text(Gamma(**options, target=3.0).run(module, cached)) == wanted[1]
    assert worked_out[4:] == [True]


def untied(module: Module) -> Module:
    """The module with a copy of the embedding for its head."""
    table, function = module.weights["embed.weight"], module.functions["forward"]
    head = dataclasses.replace(table, name="head.weight")
    ops = tuple(
        dataclasses.replace(op, operands=(op.operands[0], head.ref)) if op.loc == "head" else op
        for op in function.ops
    )
    weights = {**module.weights, head.name: head}
    return dataclasses.replace(
        module, functions={"forward": dataclasses.replace(function, ops=ops)}, weights=weights
    )


def test_a_tied_embedding_loses_in_both_places(small: tuple[Module, Context]) -> None:
    module, ctx = small
    pass_ = Gamma(**{**QUICK, "sweeps": 2, "steps": 1})
    (tied,) = scores_of(pass_.run(module, ctx), "table").values()
    apart = scores_of(pass_.run(untied(module), ctx), "table")
    assert list(apart) == ["embed.weight", "head.weight"]
    for format_, score in tied.items():
        parts = [own[format_] for own in apart.values()]
        assert min(parts) > 0 and score == pytest.approx(sum(parts), rel=1e-5)


def test_the_head_s_loss_is_its_divergence(small: tuple[Module, Context]) -> None:
    module, ctx = small
    assert ctx.calibration is not None
    module = untied(module)
    scores = scores_of(Gamma(**{**QUICK, "sweeps": 2, "steps": 1}).run(module, ctx), "table")["head.weight"]
    teacher = Teacher(module, ctx.calibration.spread(4).tokens, ctx)
    head, last = module.weights["head.weight"], len(teacher.segments) - 1
    (source,) = {op.operands[0] for op in teacher.segments[last].ops if op.loc == "head"}
    (norm,) = (op for op in teacher.segments[last].ops if op.results == (source,))
    for format_, score in scores.items():
        found = []
        for batch in range(teacher.batches):
            x = teacher.reads(last, batch)[norm.operands[0]][:, :-1]  # type: ignore[index]
            x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            p, q = (
                (x @ w.T).log_softmax(-1)
                for w in (load_float(head, ctx.store), candidate(head, format_, ctx))
            )
            found.append(float((p.exp() * (p - q)).sum(-1).mean()))
        # what f32 leaves of the smallest
        assert score == pytest.approx(sum(found) / len(found), rel=1e-3, abs=1e-7)


def test_one_format_leaves_nothing_to_learn() -> None:
    module, ctx = with_candidates(1, "w3g32")
    scored = Pipeline((Gamma(windows=4), Allocate(budget="3"))).run(module, ctx)
    assert all(own == {"w3g32": 0.0} for own in scores_of(scored).values())
    assert "gamma" not in scored.attrs and scores_of(scored, "table")["embed.weight"]["w4g64"] > 0


# ---- drawn models -------------------------------------------------------------------------------


def test_a_mean_counts_as_far_as_it_stands_out_of_its_noise() -> None:
    assert shrunk([]) == shrunk([2.0]) == shrunk([1.0, -1.0]) == 0.0
    assert shrunk([3.0, 3.0, 3.0]) == 3.0
    values = [1.0, 3.0, 2.0]  # the mean 2, its standard error √(1 / 3)
    assert shrunk(values) == pytest.approx(2 * (1 - 1 / 3 / 4))
    assert shrunk([-v for v in values]) == pytest.approx(-shrunk(values))
    assert shrunk([0.1, 5.0, -5.0]) == 0.0


def test_interactions_are_what_they_say(
    small: tuple[Module, Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ℓ and a share of the mean of: the slope from full precision, less 2 ℓ where the format is drawn."""
    module, ctx = small
    monkeypatch.setattr("gammac.passes.sensitivity.gamma.falling", dict)
    alone = scores_of(Gamma(**QUICK).run(module, ctx))
    seen: list[tuple[dict[str, str], Slopes]] = []
    original = KlGradient.measure_each

    def measure_each(
        self: KlGradient, allocations: Sequence[Formats], title: str
    ) -> list[tuple[float, Slopes]]:
        found = original(self, allocations, title)
        seen.extend((dict(f), slopes) for f, (_, slopes) in zip(allocations, found, strict=True))
        return found

    monkeypatch.setattr(KlGradient, "measure_each", measure_each)
    learnt = Gamma(**{**QUICK, "draws": 4}).run(module, ctx)
    among = scores_of(learnt)
    assert len(seen) == 4 and all(formats.keys() == alone.keys() for formats, _ in seen)
    assert len({tuple(formats.values()) for formats, _ in seen}) > 1
    for name, own in alone.items():
        assert learnt.weights[name].attrs["losses_alone"] == pytest.approx(own, rel=1e-5)
        for format_, loss in own.items():
            values = [
                slopes[name][format_] - slopes[name][""] - 2 * loss * (formats[name] == format_)
                for formats, slopes in seen
            ]
            expected = max(LEAST * loss, loss + SHARE * shrunk(values))
            assert among[name][format_] == pytest.approx(expected, rel=1e-3, abs=1e-5 * own["w2g32"])


# ---- what allocate makes of it ------------------------------------------------------------------


def formats(module: Module) -> dict[str, str]:
    return {n: str(w.attrs["format"]) for n, w in module.weights.items() if "format" in w.attrs}


@pytest.fixture(scope="module")
def scored(prepared: tuple[Module, Context]) -> Module:
    return Gamma(windows=4, draws=0).run(*prepared)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("budget", ["2.5", "3", "4"])
def test_a_price_for_bits_changes_no_allocation(
    prepared: tuple[Module, Context], scored: Module, budget: str, tie: bool
) -> None:
    """Σ κ n b is the same for all allocations that use a budget up."""
    _, ctx = prepared
    first = Allocate(budget=budget, tie=tie).run(scored, ctx)
    assert first.attrs["allocation"]["payload_bits"] == float(budget), "the budget is met exactly"  # type: ignore[call-overload, index]
    gains = [
        (own["w2g32"] - own["w4g32"]) / 2 / scored.weights[n].type.numel()
        for n, own in scores_of(scored).items()
    ]
    # dearer bits may leave some of the budget unused, unless they cost less than they gain anywhere
    for kappa in (1e-3 * min(gains), -min(gains), -3 * max(gains)):
        priced = scored.with_weights(
            *(
                scored.weights[n].with_attrs(
                    scores={
                        f: s + kappa * parse_format(f).bits * scored.weights[n].type.numel()
                        for f, s in own.items()
                    }
                )
                for n, own in scores_of(scored).items()
            )
        )
        assert formats(Allocate(budget=budget, tie=tie).run(priced, ctx)) == formats(first)


def test_the_order_of_modules_does_not_matter(prepared: tuple[Module, Context], scored: Module) -> None:
    """Equal-shaped modules that change places take their formats along."""
    _, ctx = prepared
    first = formats(Allocate(budget="3", tie=False).run(scored, ctx))
    shuffled = [list(scored.weights)[i] for i in torch.randperm(len(scored.weights), generator=seeded(3))]
    reordered = dataclasses.replace(scored, weights={n: scored.weights[n] for n in shuffled})
    assert formats(Allocate(budget="3", tie=False).run(reordered, ctx)) == first
    # the scores of block i go to block 3 − i
    own = scores_of(scored)
    there = {n: n.replace(n.split(".")[1], str(3 - int(n.split(".")[1])), 1) for n in own}
    assert {there[there[n]] for n in own} == own.keys() and all(there[n] != n for n in own)
    mirrored = scored.with_weights(*(scored.weights[there[n]].with_attrs(scores=s) for n, s in own.items()))
    found = formats(Allocate(budget="3", tie=False).run(mirrored, ctx))
    assert {n: found[there[n]] for n in own} == {n: first[n] for n in own}
    assert len({first[n] for n in own}) > 1


def test_rows_may_come_in_any_order(scored: Module) -> None:
    rows = [
        tuple(Choice(f, s, (parse_format(f).bits * scored.weights[n].type.numel(),)) for f, s in own.items())
        for n, own in scores_of(scored).items()
    ]
    capacity = (3 * sum(scored.weights[n].type.numel() for n in scores_of(scored)),)
    first = choose(rows, capacity)
    for seed in range(4):
        order = torch.randperm(len(rows), generator=seeded(seed)).tolist()
        picks = choose([rows[i] for i in order], capacity)
        assert [picks[order.index(i)] for i in range(len(rows))] == list(first)


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("windows=0", "windows is at least 1"),
        ("sweeps=1", "sweeps is at least 2"),
        ("steps=0", "steps is at least 1"),
        ("hot=0", "hot is at least 0.01"),
        ("cold=nan", "cold is at least 0.01"),
        ("memory=1.1", "memory is at least 0 and at most 1"),
        ("penalty=0", "penalty is at least 1e-06"),
        ("growth=0.9", "growth is at least 1"),
        ("draws=-1", "draws is at least 0"),
        ("normalize=delta", "draws and curvature need losses in nats, normalize=delta has none"),
        ("normalize=delta,draws=0", "need losses in nats"),
        ("curvature=2", "curvature is at least 0 and at most 1"),
        ("samples=firm", "samples='firm'\n  hint: it is soft or hard"),
        ("normalize=max", "normalize='max'\n  hint: it is fisher or delta or output or none"),
        ("inputs=quantized", "inputs='quantized'\n  hint: it is full or mixed"),
        ("constraint=hard", "constraint='hard'\n  hint: it is augmented or penalty"),
        ("sweep=3", "no option 'sweep=3'"),
    ],
)
def test_wrong_options_are_refused(options: str, said: str) -> None:
    with pytest.raises(CompileError) as caught:
        parse_strategy(f"gamma{{{options}}}", STRATEGIES)
    assert said in str(caught.value) and str(caught.value).startswith("gamma: ")


@pytest.mark.parametrize("target", [2.0, 9.0, -1.0])
def test_a_target_that_no_mixture_has_is_refused(small: tuple[Module, Context], target: float) -> None:
    with pytest.raises(CompileError, match=r"gamma: target=.*\n.*between 2 and 8"):
        Gamma(**{**QUICK, "target": target}).run(*small)


def test_a_next_token_is_needed(small: tuple[Module, Context]) -> None:
    module, ctx = small
    for wrong in (
        (module.with_attrs(kind="encoder"), ctx),
        (module, dataclasses.replace(ctx, calibration=None)),
    ):
        with pytest.raises(CompileError, match="gamma needs calibration text and a model that predicts"):
            Gamma().run(*wrong)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"w2g64": 3.0, "w3g64": 1.0, "w4g64": 2.0}, {"w2g64": 3.0, "w3g64": 1.5, "w4g64": 1.5}),
        ({"w4g64": 3.0, "w2g64": 1.0, "w3g64": 2.0}, {"w4g64": 2.0, "w2g64": 2.0, "w3g64": 2.0}),
        ({"w3g128": 2.0, "w3g64": 1.0}, {"w3g128": 2.0, "w3g64": 1.0}),
        ({"w8g64": 0.0}, {"w8g64": 0.0}),
    ],
)
def test_scores_that_rise_with_the_bits_are_pooled(given: dict[str, float], wanted: dict[str, float]) -> None:
    assert falling(given) == wanted and list(falling(given)) == list(given)


# ---- logits by steps ----------------------------------------------------------------------------


def stepped(optimizer: str, target: float = 3.0, rate: float = 0.02) -> SteppedPreferences:
    """Two modules of one size, one of which loses a hundred times as much, after many samples."""
    found = SteppedPreferences(
        {"much": WIDTHS, "little": WIDTHS}, {"much": 0.5, "little": 0.5}, target,
        memory=0.98, growth=1.5, augmented=True, optimizer=optimizer, rate=rate,
    )  # fmt: skip
    losses = {"much": 100.0 * 4.0 ** -torch.tensor(WIDTHS).double()}
    losses["little"] = losses["much"] / 100
    generator = seeded(11)
    for _ in range(40):
        for _ in range(20):
            for name, own in losses.items():
                found.learn(name, found.sample(name, 1.0, generator, hard=True), own)
        found.settle(1.0, 0.1)
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "global", "adam"])
def test_steps_prefer_wide_formats_where_more_is_lost(optimizer: str) -> None:
    found = stepped(optimizer)
    bits = torch.tensor(WIDTHS).double()
    much, little = (float(torch.softmax(found.logits(n), -1) @ bits) for n in ("much", "little"))
    assert much > little
    assert abs(found.excess(1.0)) < 0.05, "the constraint is met"


def test_adam_forgets_magnitudes_and_one_second_moment_does_not() -> None:
    """How far the first step's logits of the two modules differ, whose gradients differ a hundredfold."""
    spreads = {}
    for optimizer in ("global", "adam"):
        found = SteppedPreferences(
            {"much": WIDTHS, "little": WIDTHS}, {"much": 0.5, "little": 0.5}, 3.0,
            memory=0.98, growth=1.5, augmented=True, optimizer=optimizer, rate=0.1,
        )  # fmt: skip
        generator = seeded(3)
        for name, scale in (("much", 100.0), ("little", 1.0)):
            p = found.sample(name, 1.0, generator, hard=False)
            found.learn(name, p, scale * 4.0 ** -torch.tensor(WIDTHS).double())
        spreads[optimizer] = {n: float(found.logits(n).abs().max()) for n in found.bits}
    assert spreads["adam"]["little"] == pytest.approx(spreads["adam"]["much"], rel=0.01)
    assert spreads["global"]["little"] < 0.1 * spreads["global"]["much"]


@pytest.mark.parametrize("optimizer", ["sgd", "global", "adam"])
def test_a_stepped_state_survives_json(optimizer: str) -> None:
    found = stepped(optimizer)
    again = SteppedPreferences(
        found.bits, found.shares, found.target, 0.98, 1.5, True, optimizer=optimizer, rate=0.02
    )
    again.restore(json.loads(json.dumps(found.state())))
    assert again.state() == found.state()
    for preferences_ in (found, again):
        p = preferences_.sample("much", 1.0, seeded(4), hard=True)
        preferences_.learn("much", p, torch.ones(4, dtype=torch.float64))
    assert again.state() == found.state()


@pytest.mark.parametrize("optimizer", ["sgd", "global", "adam"])
def test_stepped_scores_are_losses(small: tuple[Module, Context], optimizer: str) -> None:
    """They fall with the bits, in the units of those on lines."""
    module, ctx = small
    lines = scores_of(Gamma(**QUICK).run(module, ctx))
    steps = scores_of(Gamma(**QUICK, optimizer=optimizer).run(module, ctx))
    assert steps.keys() == lines.keys() and steps != lines
    for own in steps.values():
        values = [own[f] for f in sorted(own, key=parse_format)]
        assert values == sorted(values, reverse=True) and values[-1] >= 0
    total = [sum(max(own.values()) for own in found.values()) for found in (lines, steps)]
    assert 0.1 < total[1] / total[0] < 10
