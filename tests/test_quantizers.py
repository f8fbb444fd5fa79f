"""Quantizers of integer codes: being registered means being tested. Others: test_code_quantizers.py."""

import pytest
import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import INTEGER, IntegerFormat, parse_format
from gammac.passes.quantizers import QUANTIZERS, Gptq, Rtn, make_quantizer, output_error
from gammac.passes.quantizers.gptq import inverse_factor
from gammac.passes.quantizers.grid import choose_grid, round_to_grid

NAMES = [
    "w2g64",
    "w3g32-sym",
    "w3g64",
    "w4g64",
    "w4g64-sym",
    "w4g96",
    "w4channel",
    "w5g64",
    "w8g32",
    "w8channel-sym",
]
ON_GRIDS = [name for name, quantizer in QUANTIZERS.items() if INTEGER in quantizer.kinds]


def problem(rows: int = 48, columns: int = 192, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A Gaussian weight and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 0.1
    inputs = torch.randn(2048, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / 2048


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantizer", ON_GRIDS)
def test_codes_fit_the_format(quantizer: str, name: str) -> None:
    weight, gram = problem()
    (found,) = make_quantizer(quantizer).quantize(weight, gram, [parse_format(name)])
    format_ = found.format
    assert found.codes.shape == weight.shape and found.codes.dtype == torch.uint8
    assert int(found.codes.max()) <= format_.levels
    assert found.scales.shape == (48, format_.groups(192)) and bool((found.scales > 0).all())
    assert (found.zeros is None) == format_.symmetric
    assert found.zeros is None or int(found.zeros.max()) <= format_.levels


# quip's range is a multiple of the root mean square, whatever grid the weights lie on
@pytest.mark.parametrize("quantizer", [q for q in ON_GRIDS if q != "quip"])
def test_what_lies_on_the_grid_comes_back_unchanged(quantizer: str) -> None:
    weight, gram = problem()
    # min-max on a grid that uses its whole range in every group is that grid again
    (first,) = Rtn("none").quantize(weight, None, [IntegerFormat(4, 64)])
    on_grid = first.dequantize()
    (again,) = make_quantizer(quantizer, clip="none").quantize(on_grid, gram, [IntegerFormat(4, 64)])
    assert torch.allclose(again.dequantize(), on_grid, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantizer", ON_GRIDS)
def test_no_quantizer_is_worse_than_rounding(quantizer: str, name: str) -> None:
    weight, gram = problem()
    format_ = parse_format(name)
    (nearest,) = Rtn().quantize(weight, None, [format_])
    (found,) = make_quantizer(quantizer).quantize(weight, gram, [format_])
    assert (
        output_error(weight, found.dequantize(), gram)
        <= output_error(weight, nearest.dequantize(), gram) * 1.001
    )


@pytest.mark.parametrize("quantizer", ON_GRIDS)
def test_formats_of_one_call_don_t_disturb_each_other(quantizer: str) -> None:
    weight, gram = problem()
    formats = [parse_format(n) for n in NAMES]
    together = make_quantizer(quantizer).quantize(weight, gram, formats)
    for format_, found in zip(formats, together, strict=True):
        (alone,) = make_quantizer(quantizer).quantize(weight, gram, [format_])
        # sums in another order may tip a tie, no more
        assert (alone.codes != found.codes).float().mean() < 0.01


def test_rounding_is_within_half_a_step() -> None:
    weight, _ = problem()
    format_ = IntegerFormat(4, 64)
    (found,) = Rtn("none").quantize(weight, None, [format_])
    step = found.scales.float().repeat_interleave(64, 1)
    # the zero point is rounded too, so an end may lie another half step outside
    assert bool(((found.dequantize() - weight).abs() <= step * 1.01).all())
    assert ((found.dequantize() - weight).abs() <= step * 0.505).float().mean() > 0.98


@pytest.mark.parametrize(
    ("name", "min_max", "clipped"),
    # measured distortions of a Gaussian weight, group size 64
    [("w2g64", 0.21, 0.127), ("w3g64", 0.0382, 0.0311), ("w4g64", 0.0083, 0.0076)],
)
def test_distortion_of_a_gaussian_weight(name: str, min_max: float, clipped: float) -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    for clip, expected in (("none", min_max), ("mse", clipped)):
        (found,) = Rtn(clip).quantize(weight, None, [parse_format(name)])
        assert output_error(weight, found.dequantize(), None) == pytest.approx(expected, rel=0.05)


def test_gptq_without_correlation_is_rounding() -> None:
    weight, _ = problem()
    (found,) = Gptq().quantize(weight, torch.eye(192), [IntegerFormat(3, 64)])
    (nearest,) = Rtn().quantize(weight, None, [IntegerFormat(3, 64)])
    assert torch.equal(found.codes, nearest.codes)


def test_gptq_error_identity() -> None:
    """The sweep's squared errors sum to tr(Δ H Δᵀ), H damped: checked by re-running the sweep by hand."""
    weight, gram = problem(rows=8, columns=64)
    format_ = IntegerFormat(3, 64)
    grid = choose_grid(weight, format_, "mse", gram.diagonal())
    factor = inverse_factor(gram, 0.01)
    left, total = weight.clone(), 0.0
    for i in range(64):
        code = ((left[:, i : i + 1] / grid.scales).round() + grid.zeros).clamp(0, format_.levels)
        error = (left[:, i] - ((code - grid.zeros) * grid.scales)[:, 0]) / factor[i, i]
        left[:, i] -= error * factor[i, i]
        left[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
        total += float(error.square().sum())
    (found,) = Gptq(act_order=False).quantize(weight, gram, [format_])
    assert torch.allclose(found.dequantize(), left, atol=1e-4)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(64)
    delta = found.dequantize() - weight
    assert float(((delta @ damped) * delta).sum()) == pytest.approx(total, rel=1e-3)


def test_act_order_stores_groups_in_place() -> None:
    weight, gram = problem()
    gram = gram * torch.linspace(3, 0.3, 192)[:, None].sqrt() * torch.linspace(3, 0.3, 192).sqrt()
    errors = []
    for act_order in (False, True):
        (found,) = Gptq(act_order=act_order).quantize(weight, gram, [IntegerFormat(2, 64)])
        errors.append(output_error(weight, found.dequantize(), gram))
    assert errors[1] <= errors[0] * 1.02


def test_gptq_takes_inputs_that_never_fire() -> None:
    weight, gram = problem()
    gram[5], gram[:, 5] = 0.0, 0.0
    (found,) = Gptq().quantize(weight, gram, [IntegerFormat(4, 64)])
    assert bool(torch.isfinite(found.dequantize()).all())


def test_gptq_takes_fewer_samples_than_inputs() -> None:
    weight, _ = problem()
    inputs = torch.randn(10, 192)
    (found,) = Gptq().quantize(weight, inputs.T @ inputs / 10, [IntegerFormat(4, 64)])
    assert output_error(weight, found.dequantize(), inputs.T @ inputs) < 0.01


def test_gptq_says_when_there_is_no_inverse() -> None:
    with pytest.raises(CompileError, match="no inverse"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01)


def test_a_constant_weight_survives() -> None:
    for value in (0.0, 1.0, -3.0):
        weight = torch.full((4, 64), value)
        quantized = round_to_grid(weight, choose_grid(weight, IntegerFormat(2, 64)), IntegerFormat(2, 64))
        assert torch.allclose(quantized.dequantize(), weight, rtol=1e-2)


def test_unknown_quantizers_are_named() -> None:
    with pytest.raises(CompileError, match="there are rtn, gptq"):
        make_quantizer("awq2")
