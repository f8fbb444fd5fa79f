"""Quantizers of codes that are no integer grid: the property that each paper claims, on small weights."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantizers import problem
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import (
    INTEGER,
    BinaryResidualFormat,
    DualBinaryFormat,
    IntegerFormat,
    PartlyBinaryFormat,
    Quantized,
    parse_format,
)
from gammac.formats.dual_binary import levels_of
from gammac.passes.quantizers import QUANTIZERS, Rtn, make_quantizer, output_error
from gammac.passes.quantizers.billm import BiLlm, residual_binary, split_binary
from gammac.passes.quantizers.db_llm import assign, int2_scales, refit_scales
from gammac.passes.quantizers.pb_llm import PbLlm, binarize

EXAMPLES = {
    "normal_float": ("nf2g64", "nf3g64", "nf4g64", "nf4channel", "nf4g64-dq"),
    "dual_binary": ("fdb2g64", "fdb2channel"),
    "partly_binary": ("pb1.7g128", "pb2g64"),
    "binary_residual": ("bi1.1g128", "bi1.1g64"),
}
PAIRS = [
    (name, format_)
    for name, quantizer in QUANTIZERS.items()
    for kind in quantizer.kinds
    if kind in EXAMPLES
    for format_ in EXAMPLES[kind]
]


def outliers(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a Gram matrix whose inputs differ a hundredfold in size."""
    weight, gram = problem(96, 256, seed)
    places = torch.randperm(256, generator=torch.Generator().manual_seed(seed))
    sizes = torch.logspace(-1, 1, 256)[places].sqrt()
    return weight, gram * sizes[:, None] * sizes


def one(quantizer: str, format_: str, weight: Tensor, gram: Tensor | None, **options: object) -> Quantized:
    (found,) = make_quantizer(quantizer, **options).quantize(weight, gram, [parse_format(format_)])
    return found


def lost(quantizer: str, format_: str, weight: Tensor, gram: Tensor, **options: object) -> float:
    return output_error(weight, one(quantizer, format_, weight, gram, **options).dequantize(), gram)


# ---- every pair ---------------------------------------------------------------------------------


def test_every_kind_of_format_has_a_quantizer_and_is_tested() -> None:
    kinds = {kind for quantizer in QUANTIZERS.values() for kind in quantizer.kinds}
    assert set(EXAMPLES) <= kinds and INTEGER in kinds


@pytest.mark.parametrize(("quantizer", "name"), PAIRS)
def test_a_weight_is_about_itself_and_the_same_each_time(quantizer: str, name: str) -> None:
    weight, gram = problem()
    before = weight.clone()
    found, again = (one(quantizer, name, weight, gram) for _ in range(2))
    assert torch.equal(weight, before), "the weight is not written into"
    assert found.dequantize().shape == weight.shape and bool(torch.isfinite(found.dequantize()).all())
    assert all(torch.equal(found.parts[n], again.parts[n]) for n in found.parts)
    assert output_error(weight, found.dequantize(), gram) < 0.5


@pytest.mark.parametrize(("quantizer", "name"), PAIRS)
def test_dead_inputs_and_constant_weights_survive(quantizer: str, name: str) -> None:
    weight, gram = problem()
    gram[5], gram[:, 5] = 0.0, 0.0
    for value in (weight, torch.zeros_like(weight), torch.full_like(weight, -3.0)):
        found = one(quantizer, name, value, gram).dequantize()
        assert bool(torch.isfinite(found).all())
        assert output_error(value, found, gram) < 0.5


STACKED = [(q, name) for q, name in PAIRS if QUANTIZERS[q].stacks and parse_format(name).by_rows]


@pytest.mark.parametrize(("quantizer", "name"), STACKED)
def test_stacked_rows_are_quantized_as_alone(quantizer: str, name: str) -> None:
    weight, gram = problem()
    whole = one(quantizer, name, weight, gram).dequantize()
    part = one(quantizer, name, weight[10:30], gram).dequantize()
    # products of other shapes sum in another order, which may tip a tie
    assert (whole[10:30] - part).abs().gt(1e-3).float().mean() < 0.01


# ---- NormalFloat --------------------------------------------------------------------------------


def test_nf4_distortion_of_a_gaussian_weight() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    plain, double = (
        output_error(weight, one("nf", n, weight, None).dequantize(), None) for n in ("nf4g64", "nf4g64-dq")
    )
    assert plain == pytest.approx(0.0085, rel=0.03)
    assert double == pytest.approx(plain, rel=0.01)


def even(*shape: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(*shape, generator=generator) - 1


@pytest.mark.parametrize(("draw", "wins"), [(torch.randn, True), (even, False)])
def test_nf4_is_for_gaussian_weights(draw: Callable[..., Tensor], wins: bool) -> None:
    weight = draw(256, 512, generator=torch.Generator().manual_seed(0))
    nf = output_error(weight, one("nf", "nf4g64", weight, None).dequantize(), None)
    (grid,) = Rtn("none").quantize(weight, None, [IntegerFormat(4, 64, symmetric=True)])
    assert (nf < output_error(weight, grid.dequantize(), None)) == wins


@pytest.mark.parametrize("name", ["nf2g64", "nf3g64", "nf4g64", "nf4channel"])
def test_nf_is_idempotent_and_keeps_zero(name: str) -> None:
    weight, _ = problem()
    weight[:, ::7] = 0.0
    found = one("nf", name, weight, None)
    again = one("nf", name, found.dequantize(), None)
    assert all(torch.equal(found.parts[n], again.parts[n]) for n in found.parts)
    assert bool((found.dequantize()[:, ::7] == 0).all())


@pytest.mark.parametrize("name", ["nf2g64", "nf3g64", "nf4g64", "nf4g64-dq"])
def test_error_feedback_helps_nf(name: str) -> None:
    weight, gram = problem()
    assert lost("gptq", name, weight, gram) < 0.7 * lost("nf", name, weight, gram)
    free = one("gptq", name, weight, torch.eye(192))
    assert torch.equal(free.codes, one("nf", name, weight, None).codes), "nothing to feed back: nearest"


# ---- DB-LLM -------------------------------------------------------------------------------------

ALPHAS = st.tuples(st.floats(0.1, 4), st.floats(0.05, 0.95), st.sampled_from([1.0, -1.0]))


@settings(max_examples=50)
@given(st.lists(ALPHAS, min_size=1, max_size=4), st.integers(0, 1000))
def test_assignment_is_the_nearest_level(alphas: list[tuple[float, float, float]], seed: int) -> None:
    scales = torch.tensor([[[s * a, -s * a * b] for a, b, s in alphas]]).half().float()
    weight = 4 * torch.randn(1, len(alphas), 64, generator=torch.Generator().manual_seed(seed))
    levels = levels_of(scales)
    found = levels.gather(-1, assign(weight, scales).long())
    nearest = (weight[..., None] - levels[:, :, None]).abs().amin(-1)
    assert torch.allclose((weight - found).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("clip", ["none", "mse"])
def test_two_planes_begin_at_the_symmetric_2_bit_grid(clip: str) -> None:
    weight, _ = problem()
    scales = int2_scales(weight, 64, clip)
    codes = assign(weight.reshape(48, 3, 64), scales).reshape(48, 192)
    found = DualBinaryFormat(64).quantized(codes, scales).dequantize().reshape(48, 3, 64)
    grids = [
        sign * Rtn(clip).quantize(sign * weight, None, [IntegerFormat(2, 64, True)])[0].dequantize()
        for sign in (1.0, -1.0)
    ]
    # each group is one of the two grids, bit for bit: the one that loses less
    same = torch.stack([(found == g.reshape(48, 3, 64)).all(-1) for g in grids])
    losses = torch.stack([(g - weight).square().reshape(48, 3, 64).sum(-1) for g in grids])
    assert bool(same.gather(0, losses.argmin(0, keepdim=True)).all())


def test_scales_are_refitted_to_the_outputs() -> None:
    weight, gram = problem()
    found = one("db_llm", "fdb2g64", weight, gram, rounds=1)
    format_ = found.format
    assert isinstance(format_, DualBinaryFormat)
    off = format_.quantized(format_.codes_of(found.parts), found.scales.float() * 1.1)
    again = format_.quantized(format_.codes_of(off.parts), refit_scales(weight, off, gram))
    errors = [output_error(weight, q.dequantize(), gram) for q in (found, off, again)]
    assert errors[2] < errors[1] and errors[2] < 1.2 * errors[0]
    assert torch.equal(again.parts["first"], found.parts["first"]), "codes stay"


def test_two_planes_lose_less_than_a_2_bit_grid() -> None:
    for weight, gram in (problem(), outliers()):
        two = lost("db_llm", "fdb2g64", weight, gram)
        assert two < 0.85 * lost("gptq", "w2g64-sym", weight, gram)
        assert two < 0.9 * lost("gptq", "w2g64", weight, gram)
        assert two <= lost("db_llm", "fdb2g64", weight, gram, rounds=1)


# ---- PB-LLM -------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_the_binary_scale_is_the_masked_least_squares_optimum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 32, generator=generator)
    mask = torch.rand(4, 32, generator=generator) < 0.8
    mean, scale = binarize(weight, mask)
    signs = torch.where(weight >= mean, 1.0, -1.0)
    fitted = [
        torch.linalg.lstsq(s[m][:, None], (w - u)[m][:, None]).solution.item()
        for s, m, w, u in zip(signs, mask, weight, mean, strict=True)
    ]
    assert torch.allclose(scale[:, 0], torch.tensor(fitted), rtol=2e-3)


@pytest.mark.parametrize("name", ["pb1.7g128", "pb2g64", "pb1g64", "pb4.5channel"])
def test_the_share_of_salient_weights_is_exact(name: str) -> None:
    weight, gram = outliers()
    found = one("pb_llm", name, weight, gram)
    format_ = found.format
    assert isinstance(format_, PartlyBinaryFormat)
    size = format_.inputs_per_scale(256)
    counts = found.parts["salient"].reshape(96, -1, size).sum((0, 2), dtype=torch.int64)
    assert counts.tolist() == [round((format_.bits - 1) / 7 * 96 * size)] * (256 // size)


@pytest.mark.parametrize("seed", range(3))
def test_saliency_by_hessian_loses_least_and_at_random_most(seed: int) -> None:
    weight, gram = outliers(seed)
    hessian, magnitude, random = (
        lost("pb_llm", "pb1.7g128", weight, gram, saliency=s) for s in ("hessian", "magnitude", "random")
    )
    assert hessian < magnitude < 0.8 * random


def test_more_salient_weights_lose_less() -> None:
    weight, gram = outliers()
    errors = [lost("pb_llm", f"pb{bits}g128", weight, gram) for bits in (1, 1.35, 1.7, 2, 4)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_an_unknown_saliency_is_refused() -> None:
    with pytest.raises(CompileError, match="there are hessian, magnitude, random"):
        PbLlm(saliency="loudness")


# ---- BiLLM --------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_a_residual_never_loses(seed: int) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed))
    everything = torch.ones_like(weight, dtype=torch.bool)
    mean, scales, signs, second = residual_binary(weight, everything)
    first = mean + (2.0 * signs - 1) * scales[:, :1]
    both = first + (2.0 * second - 1) * scales[:, 1:]
    # f16 scales are a hair from the optimum
    assert bool(((weight - both).square().sum(1) <= (weight - first).square().sum(1) + 1e-4).all())


@given(st.integers(0, 1000))
def test_the_split_is_the_best_of_all_thresholds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 24, generator=generator)
    mask = torch.rand(1, 24, generator=generator) < 0.7
    mask[0, :3] = True

    def error(split: bool) -> float:
        mean, sparse, scales = split_binary(weight, mask, split)
        scale = torch.where(sparse, scales[:, 1:], scales[:, :1])
        found = mean + torch.where(weight >= mean, 1.0, -1.0) * scale
        return float(((weight - found)[mask]).square().sum())

    mean, _ = binarize(weight, mask)
    sizes = (weight - mean).abs()[mask]
    brute = min(
        sum(float((g - g.mean()).square().sum()) for g in (sizes[sizes <= t], sizes[sizes > t]) if len(g))
        for t in sizes
    )
    assert error(True) == pytest.approx(brute, rel=0.01, abs=1e-4)
    assert error(True) <= error(False) + 1e-4


def test_each_of_billms_means_lowers_the_error() -> None:
    weight, gram = outliers()
    errors = {
        (split, residual): lost("billm", "bi1.1g128", weight, gram, split=split, residual=residual)
        for split in (False, True)
        for residual in (False, True)
    }
    assert errors[True, True] < errors[True, False] < errors[False, False]
    assert errors[True, True] < errors[False, True] < errors[False, False]
    sign = one("rtn", "w1g128", weight, None).dequantize()
    assert errors[True, True] < 0.25 * output_error(weight, sign, gram)


def test_salient_columns_stay_within_the_headline() -> None:
    weight, gram = outliers()
    for name in ("bi1.1g128", "bi1.05g64"):
        found = one("billm", name, weight, gram)
        format_ = found.format
        assert isinstance(format_, BinaryResidualFormat)
        counts = found.parts["salient"].reshape(-1, format_.group).sum(1)
        assert bool((counts <= int((format_.bits - 1) * format_.group)).all()) and int(counts.max()) > 0


def test_later_groups_make_up_for_earlier_ones() -> None:
    """Given a first group's codes, what is subtracted from the second is the least-squares compensation."""
    weight, gram = problem(8, 128)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(128)
    # without residuals, since which columns are salient depends on the Gram matrix
    format_ = BinaryResidualFormat(1.1, 64)
    (found,) = BiLlm(residual=False).quantize(weight, gram, [format_])
    first = found.dequantize()[:, :64]
    target = weight[:, 64:] + (weight[:, :64] - first) @ damped[:64, 64:] @ damped[64:, 64:].inverse()
    (alone,) = BiLlm(residual=False).quantize(target, torch.eye(64), [format_])
    assert torch.allclose(alone.dequantize(), found.dequantize()[:, 64:], atol=2e-3)
