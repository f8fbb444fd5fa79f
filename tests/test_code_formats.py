"""Formats whose codes are no integer grid: names, storage, levels, and what codes stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.formats import (
    BinaryResidualFormat,
    DoubleNormalFloat,
    DualBinaryFormat,
    Format,
    IntegerFormat,
    NormalFloat,
    PartlyBinaryFormat,
    Quantized,
    concat_rows,
    parse_format,
)
from gammac.formats.dual_binary import in_order, levels_of
from gammac.formats.normal_float import dynamic_levels, normal_levels
from gammac.passes.quantizers import QUANTIZERS, make_quantizer

GROUPS = st.sampled_from([0, 32, 64, 96, 128])
FORMATS: st.SearchStrategy[Format] = st.one_of(
    st.builds(NormalFloat, st.integers(2, 4), GROUPS),
    st.builds(DoubleNormalFloat, st.integers(2, 4), GROUPS),
    st.builds(DualBinaryFormat, GROUPS),
    st.builds(PartlyBinaryFormat, st.sampled_from([1.0, 1.35, 1.7, 2.0, 4.5]), GROUPS),
    st.builds(BinaryResidualFormat, st.sampled_from([1.05, 1.1, 1.25]), GROUPS),
)
NAMES = [
    "nf2g64",
    "nf3g64",
    "nf4g64",
    "nf4g64-dq",
    "nf3g64-dq",
    "fdb2g64",
    "pb1.7g128",
    "pb2g64",
    "bi1.1g128",
]
# QLoRA, appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def quantized(name: str, rows: int = 48, columns: int = 192) -> Quantized:
    """A Gaussian weight in a format, by the first quantizer that writes it."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(rows, columns, generator=generator),
        torch.randn(400, columns, generator=generator),
    )
    format_ = parse_format(name).fit(columns)
    writer = next(n for n, q in QUANTIZERS.items() if format_.kind in q.kinds)
    (found,) = make_quantizer(writer).quantize(weight, x.T @ x / 400, [format_])
    return found


# ---- names and storage --------------------------------------------------------------------------


@given(FORMATS)
def test_names_round_trip(format_: Format) -> None:
    assert parse_format(format_.name) == format_
    assert format_.fit(192) == parse_format(format_.fit(192).name)


@pytest.mark.parametrize(
    "text", ["nf5g64", "nf4", "fdb3g64", "fdb2g64-dq", "pb8g64", "pb0.7g64", "bi2g64", "bi1"]
)
def test_bad_names_show_the_spelling(text: str) -> None:
    with pytest.raises(CompileError, match=r"is no weight format(.|\n)*fdb2g64"):
        parse_format(text)


@pytest.mark.parametrize("shape", [(48, 192), (40, 320), (7, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_parts_are_exactly_what_storage_counts(name: str, shape: tuple[int, int]) -> None:
    found = quantized(name, *shape)
    widths = found.format.part_bits()  # type: ignore[attr-defined]
    assert found.parts.keys() == widths.keys()
    assert sum(part.numel() * widths[n] for n, part in found.parts.items()) == found.format.storage_bits(
        *shape
    )
    for n, part in found.parts.items():
        if not part.is_floating_point():
            assert part.dtype == torch.uint8 and int(part.max()) < 2 ** widths[n]
        else:
            assert 8 * part.element_size() == widths[n]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("nf4g64", 4.25),
        ("nf4g64-dq", 4.127),  # 4 + 8/64 + 32/(64 · 256): the paper's figure
        ("fdb2g64", 2.5),
        ("fdb2g128", 2.25),
        ("pb1.7g128", 2.95),  # signs .9, codes .8, bitmap 1, mean and scale .25
        ("pb2g128", 3.25),
        ("bi1.1g128", 2.75),  # two bits, six f16 numbers for 128 weights
    ],
)
def test_true_bits_of_large_weights(name: str, bits: float) -> None:
    format_ = parse_format(name)
    # a row's own numbers and what is stored once are in the last digits
    assert format_.storage_bits(4096, 4096) / 4096**2 == pytest.approx(bits, rel=0.003)
    assert format_.payload_bits(10, 100) == round(1000 * format_.bits)


def test_what_crosses_rows_says_so() -> None:
    by_rows = {name: parse_format(name).by_rows for name in NAMES}
    assert by_rows == {n: not n.endswith("-dq") and n[:2] not in ("pb", "bi") for n in NAMES}
    for name in (n for n, yes in by_rows.items() if yes):
        whole = quantized(name)
        again = concat_rows([whole.rows(0, 5), whole.rows(5, 48)])
        assert torch.equal(again.dequantize(), whole.dequantize())
        assert torch.equal(whole.rows(3, 9).dequantize(), whole.dequantize()[3:9])
    with pytest.raises(AssertionError, match="not stored row by row"):
        quantized("pb1.7g128").rows(0, 1)


# ---- NormalFloat --------------------------------------------------------------------------------


def test_normal_levels_are_the_published_ones() -> None:
    assert torch.allclose(normal_levels(4), torch.tensor(NF4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_levels_ascend_through_zero(bits: int) -> None:
    levels = normal_levels(bits)
    assert len(levels) == 2**bits and bool((levels.diff() > 0).all())
    assert levels[0] == -1 and levels[-1] == 1 and levels[2 ** (bits - 1) - 1] == 0


def test_dynamic_levels_are_a_tree_of_powers_of_ten() -> None:
    levels = dynamic_levels()
    assert len(levels) == 256 and bool((levels.diff() > 0).all())
    assert levels[-1] == 1 and 0 in levels.tolist()
    assert float(levels[levels > 0].min()) == pytest.approx(0.55e-6)
    # the widest power has the finest steps: 64 of 0.9/64
    assert float(levels[-2]) == pytest.approx(1 - 0.45 / 64)


# ---- two planes ---------------------------------------------------------------------------------

ALPHAS = st.tuples(st.floats(0.01, 4), st.floats(0.02, 0.98), st.sampled_from([1.0, -1.0]))


@given(ALPHAS)
def test_levels_stand_in_order(drawn: tuple[float, float, float]) -> None:
    size, share, sign = drawn
    scales = torch.tensor([[[sign * size, -sign * share * size]]]).half()
    levels = levels_of(scales)[0, 0]
    assert bool((levels.diff() >= 0).all()) and 0 in levels.tolist()
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    found = DualBinaryFormat(4).quantized(codes, scales)
    assert torch.equal(found.dequantize()[0], levels)
    assert torch.equal(found.format.codes_of(found.parts), codes)  # type: ignore[attr-defined]
    assert torch.equal(in_order(scales, 2.0**-14), scales.float())


def test_scales_out_of_order_are_brought_into_it() -> None:
    wrong = torch.tensor([[1.0, 0.5], [1.0, -2.0], [-1.0, -0.1], [0.0, 0.0], [3.0, -3.0]])
    found = in_order(wrong, 2.0**-14)
    assert bool((found.prod(-1) < 0).all()) and bool((found[:, 1].abs() < found[:, 0].abs()).all())
    assert torch.equal(in_order(found, 2.0**-14), found)


def test_planes_are_binary_codes_that_add_up() -> None:
    found = quantized("fdb2g64")
    first, second = found.format.planes(found.parts)  # type: ignore[attr-defined]
    assert first.format == second.format == IntegerFormat(1, 64, True)
    alpha = found.scales.float().repeat_interleave(64, 1)
    for i, plane in enumerate((first, second)):
        expected = alpha[..., i] * found.parts[("first", "second")[i]]
        assert torch.equal(plane.dequantize(), expected)
    assert torch.equal(first.dequantize() + second.dequantize(), found.dequantize())


# ---- by hand ------------------------------------------------------------------------------------


def u8(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def test_partly_binary_by_hand() -> None:
    parts = {
        "salient": u8([0, 1, 0], [0, 0, 1]), "signs": u8([1, 0, 0, 1])[0], "codes": u8([7, 2])[0],
        "means": torch.tensor([[0.5], [0.0]]).half(), "scales": torch.tensor([[1.0], [2.0]]).half(),
        "salient_scales": torch.tensor([[0.25], [1.0]]).half(), "salient_zeros": u8([3], [4]),
    }  # fmt: skip
    found = PartlyBinaryFormat(3.0, 0).dequantize(parts)
    assert found.tolist() == [[1.5, 1.0, -0.5], [-2.0, 2.0, -2.0]]


def test_binary_residual_by_hand() -> None:
    numbers = torch.tensor([[[0.5, 1.0, 4.0, -1.0, 2.0, 0.5]]]).half()
    parts = {
        "signs": u8([1, 0, 1, 0]),
        "second": u8([0, 1, 1, 0]),
        "salient": u8([0, 0, 1, 1]),
        "numbers": numbers,
    }
    found = BinaryResidualFormat(1.5, 0).dequantize(parts)
    assert found.tolist() == [[1.5, -3.5, 1.5, -3.5]]
