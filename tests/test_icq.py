"""ICQ: offsets by entropy, what is stored of them, and IR-QLoRA's shortcuts."""

import math
from dataclasses import replace

import pytest
import torch
from llama_module import llama
from test_lora import _data, _method

from gammac.diagnostics import CompileError
from gammac.driver import Request, make_plan
from gammac.formats import (
    CalibratedNormalFloat,
    DoubleNormalFloat,
    OffsetNormalFloat,
    Quantized,
    parse_format,
    with_plain_scales,
)
from gammac.passes import Choices
from gammac.passes.quantizers import make_quantizer
from gammac.passes.quantizers.icq import SIGMA, entropies, offsets_by_entropy
from gammac.passes.quantizers.levels import by_group
from gammac.passes.training.lora import pooling, repeating
from gammac.passes.training.lora_options import LoraOptions, demand_divisible
from gammac.passes.training.trainer import Schedule, Trainer
from gammac.weights import WeightStore, digest_of


def _weight(kind: str, seed: int = 0) -> torch.Tensor:
    """[48, 256] numbers: around zero, around other numbers, or heavy-tailed."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(48, 256, generator=generator) * 0.05
    if kind == "shifted":
        return normal + torch.randn(48, 4, generator=generator).repeat_interleave(64, 1) * 0.03
    return normal**3 * 100 if kind == "heavy" else normal


def _pair(weight: torch.Tensor, bits: int) -> tuple[Quantized, Quantized]:
    """Calibrated, and NormalFloat."""
    formats = parse_format(f"nf{bits}g64-icq"), parse_format(f"nf{bits}g64-dq")
    (found,), (plain,) = (
        make_quantizer(q).quantize(weight, None, [f])
        for q, f in zip(("icq:steps=12", "nf"), formats, strict=True)
    )
    return found, plain


@pytest.mark.parametrize("kind", ["normal", "shifted", "heavy"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_says_less_than_normal_float_and_many_say_more(kind: str, bits: int) -> None:
    found, plain = _pair(_weight(kind), bits)
    said, before = (entropies(by_group(q.codes, 64), 1 << bits) for q in (found, plain))
    assert (said >= before).all()
    assert (said > before).float().mean() > 0.3
    assert said.max() <= bits + 1e-5
    # a group that keeps no offset has NormalFloat's own codes
    assert isinstance(found.format, CalibratedNormalFloat)
    still = found.format.offsets_of(found.parts) == 0
    assert torch.equal(by_group(found.codes, 64)[still], by_group(plain.codes, 64)[still])
    error, reference = ((q.dequantize() - _weight(kind)).square().mean() for q in (found, plain))
    # entropy is not error: it helps where groups lie off zero, and costs where tails are heavy
    least, most = {"normal": (0.85, 1.05), "shifted": (0.5, 0.8), "heavy": (1.05, 3.0)}[kind]
    assert least * reference < error < most * reference


def test_entropy_is_that_of_the_histogram() -> None:
    codes = torch.tensor([[[0, 1, 2, 3], [0, 0, 0, 0]], [[0, 0, 3, 3], [1, 1, 1, 2]]], dtype=torch.uint8)
    last = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert entropies(codes, 4).flatten().tolist() == pytest.approx([2, 0, 1, last])


def test_the_search_finds_the_shift_and_takes_none_where_none_is_better() -> None:
    group = torch.linspace(-1, 1, 63)
    weight = torch.cat([group, torch.zeros(1)])[None, None]
    shifted = offsets_by_entropy(weight + 0.7, 4, 12)
    assert float(shifted) == pytest.approx(0.7, abs=0.1 * SIGMA * 1.1)
    assert float(offsets_by_entropy(torch.zeros(1, 1, 64), 4, 12)) == 0


def test_sigma_is_what_normal_float_scales_to_one() -> None:
    edge = torch.tensor(1 - 0.5 * (1 / 30 + 1 / 32), dtype=torch.float64)
    assert pytest.approx(float(1 / torch.special.ndtri(edge)), abs=1e-4) == SIGMA


def test_storage_is_what_the_parts_take() -> None:
    found, plain = _pair(_weight("shifted"), 4)
    format_, rows, columns = found.format, *found.codes.shape
    assert isinstance(format_, CalibratedNormalFloat)
    bits = format_.part_bits()
    assert found.parts.keys() == bits.keys()
    assert format_.storage_bits(rows, columns) == sum(t.numel() * bits[n] for n, t in found.parts.items())
    assert found.parts["offset_scales"].dtype == torch.float16
    # τ alone: 8/64 + 16/(64 · 256) of a bit
    big = 4096
    more = format_.storage_bits(big, big) - plain.format.storage_bits(big, big)
    assert more / big**2 == pytest.approx(0.126, abs=5e-4)
    assert format_.storage_bits(big, big) / big**2 == pytest.approx(4.253, abs=5e-4)
    assert digest_of(_pair(_weight("shifted"), 4)[0].parts) == digest_of(found.parts)


def test_offsets_in_f16_are_the_same_format_with_more_bits() -> None:
    weight = _weight("shifted")
    double, _ = _pair(weight, 3)
    kept = with_plain_scales(double)
    format_, bits = kept.format, kept.format.part_bits()
    assert isinstance(format_, OffsetNormalFloat) and format_ == parse_format("nf3g64-offset")
    assert format_.storage_bits(48, 256) == sum(t.numel() * bits[n] for n, t in kept.parts.items())
    assert format_.storage_bits(48, 256) / (48 * 256) == 3.5
    assert torch.equal(kept.codes, double.codes)
    assert (kept.dequantize() - double.dequantize()).abs().max() < 1e-3 * weight.abs().max()
    (own,) = make_quantizer("icq:steps=12").quantize(weight, None, [format_])
    (plain,) = make_quantizer("nf").quantize(weight, None, [format_.plain])
    said, before = (entropies(by_group(q.codes, 64), 8) for q in (own, plain))
    assert (said >= before).all() and (said > before).float().mean() > 0.3


def test_the_name_is_read_and_other_formats_stay() -> None:
    format_ = parse_format("nf3g64-icq")
    assert format_ == CalibratedNormalFloat(3, 64) and format_.name == "nf3g64-icq"
    assert parse_format("nf3g64-dq") == DoubleNormalFloat(3, 64)
    assert format_.fit(96).name == "nf3g32-icq"


def test_no_emitter_takes_it_for_what_it_is_not() -> None:
    choices = Choices("nf4g64-icq", "w8g64", "icq")
    with pytest.raises(CompileError, match=r"does not run nf4g64-icq.*\n*.*") as caught:
        make_plan(Request("tiny", "cpu-x86", "4", choices))
    assert "--target reference" in str(caught.value)
    with pytest.raises(CompileError, match="--quantizer icq"):
        LoraOptions(format="nf4g64-icq", quantizer="nf")


# ---- shortcuts ----------------------------------------------------------------------------------


def test_shortcuts_pool_and_repeat() -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*s, generator=generator) for s in ((5, 12), (4, 12), (8, 4)))
    beta1, beta2 = 0.3, -0.7
    u = x @ a.T + beta1 * x.reshape(5, 4, 3).mean(-1)
    wanted = u @ b.T + beta2 * u.repeat(1, 2)
    got = x @ (a + beta1 * pooling(4, 12)).T @ (b + beta2 * repeating(8, 4)).T
    assert torch.allclose(got, wanted, atol=1e-5)


def test_shortcuts_of_weight_zero_are_lora_and_learn() -> None:
    plain, connected = _method(), _method(method="ir-qlora")
    assert connected.options.base.name == "nf3g32-dq"
    assert len(connected.parameters()) == 2 * len(plain.parameters())
    for name in plain.names:
        pairs = zip(plain.factors(name), connected.factors(name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(plain.loss(_data(), 0)[0], connected.loss(_data(), 0)[0])
    base = {n: digest_of(q.parts) for n, q in connected.base.items()}
    Trainer(connected, _data(), Schedule(8 * 8 * 16, batch=8, rate=3e-3)).run()
    betas = [float(t.detach()) for n, t in connected.learnt.items() if "beta" in n]
    assert sum(b != 0 for b in betas) == len(betas)
    assert {n: digest_of(q.parts) for n, q in connected.base.items()} == base
    # what is stored adds up to the same, shortcuts and all
    for name, (a, b) in connected.adapters().factors.items():
        assert torch.equal(connected.merged(name), connected.fixed[name] + b @ a)


def test_a_rank_that_does_not_divide_is_refused() -> None:
    module = llama(WeightStore())
    options = LoraOptions(method="ir-qlora", rank=3)
    with pytest.raises(CompileError, match="rank of 3 does not divide its sizes") as caught:
        demand_divisible(options, module)
    assert "layers.0" in str(caught.value)
    demand_divisible(replace(options, rank=4), module)
    demand_divisible(replace(options, method="qlora"), module)
