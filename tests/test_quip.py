"""QuIP's LDLQ: the sweep of GPTQ by another definition, its range, stochastic rounding, greedy passes."""

from itertools import product

import pytest
import torch
from test_quantizers import problem
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import Quantized, parse_format
from gammac.passes.quantizers import Gptq, Quip, Rtn, make_quantizer, output_error
from gammac.passes.quantizers.gptq import Feedback
from gammac.passes.quantizers.grid import Grid, fixed_grid
from gammac.passes.quantizers.quip import improved

WIDE = parse_format("w8channel")  # codes 0 … 255 around 128: with a coarse step a grid without ends


def ldlq(weight: Tensor, gram: Tensor, grid: Grid, levels: int, damping: float = 0.01) -> Tensor:
    """Ŵₖ = Q(Wₖ + (W − Ŵ) Uₖ) with G = (U + I) D (U + I)ᵀ, U strictly upper triangular: QuIP, equation 2.

    In f64, column by column; one scale and zero point a row.
    """
    wide = gram.double() + damping * gram.diagonal().mean().double() * torch.eye(len(gram))
    # the factor of the matrix read backwards, read backwards, is upper triangular
    root = torch.linalg.cholesky(wide.flip(0, 1)).flip(0, 1)
    u = root / root.diagonal() - torch.eye(len(gram))
    w, found = weight.double(), weight.double()
    scale, zero = grid.scales[:, 0].double(), grid.zeros[:, 0].double()
    for k in range(w.shape[1]):
        wanted = w[:, k] + (w - found)[:, :k] @ u[:k, k]
        codes = ((wanted / scale).round() + zero).clamp(0, levels)
        found = torch.cat([found[:, :k], ((codes - zero) * scale)[:, None], w[:, k + 1 :]], 1)
    return found


def grid_of(found: Quantized) -> Grid:
    zeros = torch.full_like(found.scales, found.format.midpoint) if found.zeros is None else found.zeros
    return Grid(found.scales.float(), zeros.float())


def coarse(weight: Tensor, step: float) -> Grid:
    return Grid(torch.full((len(weight), 1), step), torch.full((len(weight), 1), 128.0))


def loss(delta: Tensor, gram: Tensor) -> float:
    return float(((delta.double() @ gram.double()) * delta.double()).sum())


# ---- LDLQ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [Gptq(act_order=False), Quip(act_order=False)], ids=["gptq", "quip"])
@pytest.mark.parametrize("name", ["w2channel", "w3channel", "w4channel-sym"])
def test_the_sweep_is_ldlq(quantizer: Gptq | Quip, name: str) -> None:
    """GPTQ's inverse factor and LDLQ's factor of the matrix itself give the same codes (QuIP, theorem 6)."""
    weight, gram = problem(rows=64)
    (found,) = quantizer.quantize(weight, gram, [parse_format(name)])
    expected = ldlq(weight, gram, grid_of(found), found.format.levels)
    assert (found.dequantize() - expected).abs().max() < 1e-5


def test_by_decreasing_diagonal_it_is_ldlq_of_the_permuted_problem() -> None:
    weight, gram = problem()
    (found,) = Quip().quantize(weight, gram, [parse_format("w2channel")])
    order = gram.diagonal().argsort(descending=True)
    expected = ldlq(weight[:, order], gram[order][:, order], grid_of(found), 3)
    assert (found.dequantize()[:, order] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_without_ends_ldlq_loses_less_than_nearest_and_as_much_as_predicted(seed: int) -> None:
    """Errors e of the sweep are uniform in a step, and the loss is Σ e² D: tr(D) step² / 12 a row, where
    nearest has tr(G) step² / 12 (QuIP, lemma 3)."""
    weight, gram = problem(rows=128, seed=seed)
    feedback = Feedback.of(gram, act_order=False, damping=1e-6)
    grid = coarse(weight, 0.5)
    codes = feedback.codes(weight, grid, WIDE)
    assert codes.min() > 0 and codes.max() < 255
    nearest = (weight / 0.5).round() * 0.5
    lost, plain = loss((codes - 128) * 0.5 - weight, gram), loss(nearest - weight, gram)
    assert lost < 0.7 * plain
    diagonal = feedback.factor.double().diagonal() ** -2
    assert lost == pytest.approx(128 * 0.25 / 12 * float(diagonal.sum()), rel=0.05)
    assert plain == pytest.approx(128 * 0.25 / 12 * float(gram.diagonal().sum()), rel=0.1)


# ---- range --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "rho"), [(2, 2.4), (3, 2.4), (4, 2.4), (2, 1.8)])
def test_the_range_is_a_multiple_of_the_root_mean_square(bits: int, rho: float) -> None:
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(0))
    (found,) = Quip(rho=rho).quantize(weight, torch.eye(192), [parse_format(f"w{bits}channel")])
    rms = weight.square().mean(1).sqrt()
    torch.testing.assert_close(
        found.scales[:, 0].float() * found.format.levels, 2 * rho * rms, rtol=1e-3, atol=1e-4
    )
    assert found.zeros is not None
    assert set(found.zeros.unique().tolist()) <= {2 ** (bits - 1) - 1, 2 ** (bits - 1)}


def test_the_half_step_is_to_the_better_side() -> None:
    """With a zero point that is whole the range reaches further on one side."""
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0)).exp()
    for sign, zero in ((1, 1), (-1, 2)):
        grid = fixed_grid(sign * weight, parse_format("w2channel"), 2.4)
        assert (grid.zeros == zero).float().mean() > 0.95


def test_a_short_last_group_has_its_own_range() -> None:
    weight = torch.ones(4, 96)
    grid = fixed_grid(weight, parse_format("w2g64"), 2.4)
    torch.testing.assert_close(grid.scales, torch.full((4, 2), 1.6), rtol=1e-3, atol=0)


def test_more_than_four_bits_search_their_range() -> None:
    weight, gram = problem()
    (found,) = Quip().quantize(weight, gram, [parse_format("w8g64")])
    (plain,) = Gptq().quantize(weight, gram, [parse_format("w8g64")])
    assert torch.equal(found.codes, plain.codes)


# ---- stochastic rounding ------------------------------------------------------------------------


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    """Without correlation: each value goes up as often as it lies above the lower code."""
    weight = torch.rand(1, 64, generator=torch.Generator().manual_seed(0)).repeat(4000, 1) - 0.5
    gram, grid = torch.eye(64), coarse(weight, 0.25)
    dither = Quip(rounding="stochastic")._dither(weight)
    codes = Feedback.of(gram, act_order=False, damping=0.01).codes(weight, grid, WIDE, dither)
    found = (codes - 128) * 0.25
    assert ((found - weight).abs() <= 0.25001).all()
    assert (found.mean(0) - weight[0]).abs().max() < 4 * 0.125 / 4000**0.5


def test_a_seed_decides_stochastic_rounding() -> None:
    weight, gram = problem()
    formats = [parse_format("w3channel"), parse_format("w4g64")]
    runs = [Quip(rounding="stochastic", seed=s).quantize(weight, gram, formats) for s in (1, 1, 2)]
    for first, same, other in zip(*runs, strict=True):
        assert torch.equal(first.codes, same.codes) and not torch.equal(first.codes, other.codes)
    (nearest,) = Quip().quantize(weight, gram, formats[:1])
    errors = [output_error(weight, q.dequantize(), gram) for q in (nearest, runs[0][0])]
    assert errors[0] < errors[1] < 3 * errors[0]


# ---- greedy passes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w2channel", "w2g64", "w3g32-sym", "w4g64"])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_passes_never_lose(name: str, seed: int) -> None:
    weight, gram = problem(seed=seed)
    for start in (Quip(), Rtn()):
        (found,) = start.quantize(weight, gram, [parse_format(name)])
        losses = [output_error(weight, found.dequantize(), gram)]
        for passes in (1, 2, 9):
            better = improved(found, weight, gram, torch.arange(192), passes)
            assert torch.equal(better.scales, found.scales)
            losses.append(output_error(weight, better.dequantize(), gram))
        assert losses[0] > losses[1] >= losses[2] * 0.999999 >= losses[3] * 0.999998


def test_greedy_ends_where_no_single_code_helps() -> None:
    weight, gram = problem(rows=3, columns=12)
    (found,) = Quip(greedy=50).quantize(weight, gram, [parse_format("w2channel")])
    best = loss(found.dequantize() - weight, gram)
    for row, column, code in product(range(3), range(12), range(4)):
        codes = found.codes.clone()
        codes[row, column] = code
        other = Quantized(found.format, {**found.parts, "codes": codes})
        assert loss(other.dequantize() - weight, gram) >= best * (1 - 1e-6)


def test_greedy_passes_leave_inputs_alone_that_never_fire() -> None:
    weight, gram = problem()
    gram[5], gram[:, 5] = 0.0, 0.0
    (found,) = Quip(greedy=3).quantize(weight, gram, [parse_format("w2channel")])
    assert torch.isfinite(found.dequantize()).all()


# ---- options ------------------------------------------------------------------------------------


def test_options_stand_behind_colons() -> None:
    assert make_quantizer("quip:rho=2:greedy=5:rounding=stochastic") == Quip(2.0, "stochastic", 5)
    assert make_quantizer("gptq:block=64", damping=0.1, clip="none") == Gptq("none", damping=0.1, block=64)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("quip:rounding=up", "rounding is nearest or stochastic"),
        ("quip:rho=-1", "rho is above 0"),
        ("quip:greedy=-1", "greedy 0 or more"),
        ("quip:range=2", "the options of quantizer quip: rho, rounding"),
        ("rtn:greedy=1", "the options of quantizer rtn: clip"),
    ],
)
def test_wrong_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(CompileError) as caught:
        make_quantizer(spec)
    assert message in str(caught.value)
