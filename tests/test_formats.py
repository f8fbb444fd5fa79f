"""Formats: names, fallbacks, storage, and what codes stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gammac.diagnostics import CompileError
from gammac.formats import IntegerFormat, Quantized, concat_rows, parse_format, parse_formats

FORMATS = st.builds(IntegerFormat, st.integers(1, 8), st.sampled_from([0, 32, 64, 96, 128]), st.booleans())


@given(FORMATS)
def test_names_round_trip(format_: IntegerFormat) -> None:
    assert parse_format(format_.name) == format_


@pytest.mark.parametrize("text", ["", "w9g64", "w0g64", "4g64", "w4g0", "w4g64-asym", "int4"])
def test_bad_names_show_the_spelling(text: str) -> None:
    with pytest.raises(CompileError, match="is no weight format"):
        parse_format(text)


def test_lists_of_formats() -> None:
    assert parse_formats("w2g64+w4channel, w8g32-sym") == (
        IntegerFormat(2, 64),
        IntegerFormat(4, 0),
        IntegerFormat(8, 32, True),
    )


@pytest.mark.parametrize(
    ("wished", "columns", "group"),
    [(64, 576, 64), (128, 576, 96), (128, 1536, 128), (64, 96, 32), (64, 100, 0), (0, 576, 0), (96, 128, 64)],
)
def test_group_size_falls_back_to_the_next_that_divides(wished: int, columns: int, group: int) -> None:
    assert IntegerFormat(4, wished).fit(columns) == IntegerFormat(4, group)


@pytest.mark.parametrize(
    ("name", "bits_per_weight"),
    # methods: b + (16 + b) / g; symmetric formats store no zero point
    [("w2g64", 2.28125), ("w3g64", 3.296875), ("w4g64", 4.3125), ("w4g128-sym", 4.125), ("w8g32", 8.75)],
)
def test_storage_counts_everything(name: str, bits_per_weight: float) -> None:
    assert parse_format(name).storage_bits(10, 768) / (10 * 768) == bits_per_weight


def test_channel_stores_one_scale_a_row() -> None:
    assert parse_format("w4channel").storage_bits(10, 100) == 10 * (400 + 16 + 4)


def test_dequantize_by_hand() -> None:
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    asymmetric = IntegerFormat(2, 2).quantized(codes, scales, torch.tensor([[1, 3]], dtype=torch.uint8))
    assert asymmetric.dequantize().tolist() == [[-0.5, 0.0, -2.0, 0.0]]
    symmetric = IntegerFormat(2, 2, True).quantized(codes, scales)
    assert symmetric.dequantize().tolist() == [[-1.0, -0.5, 0.0, 2.0]]


def test_rows_and_concat_are_inverse() -> None:
    codes = torch.arange(24, dtype=torch.uint8).reshape(6, 4) % 4
    scales, zeros = torch.rand(6, 2).half(), torch.randint(0, 4, (6, 2), dtype=torch.uint8)
    whole = IntegerFormat(2, 2).quantized(codes, scales, zeros)
    again = concat_rows([whole.rows(0, 1), whole.rows(1, 4), whole.rows(4, 6)])
    assert torch.equal(again.dequantize(), whole.dequantize())
    assert Quantized(whole.format, whole.parts).dequantize().equal(whole.dequantize())
