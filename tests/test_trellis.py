"""Trellis codes: what a stream stands for, what the encoder finds, and what both cost."""

import math
from itertools import product

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.driver import Request, make_plan
from gammac.formats import TrellisFormat, code_values, parse_format, spread, tile_bounds
from gammac.formats.trellis import pack, unpack
from gammac.passes import Choices, default_pipeline
from gammac.passes.quantizers import Gptq, Tcq, output_error
from gammac.passes.quantizers.viterbi import encode


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, seed: int = 1) -> Tensor:
    """The Gram matrix of inputs that have much to do with each other."""
    mixing = torch.eye(columns) + gaussian(columns, columns, seed) * 0.3
    inputs = gaussian(2048, columns, seed + 1) @ mixing
    return inputs.T @ inputs / 2048


def viterbi(targets: Tensor, format_: TrellisFormat, weights: Tensor | None = None) -> Tensor:
    """The states of one tile."""
    branches, length = 1 << format_.bits, len(targets)
    values = code_values(format_.state_bits).reshape(-1, branches).T.contiguous()
    states = np.empty(length, np.int64)
    taken = np.empty((length, branches, values.shape[1] // branches), np.uint8)
    shares = torch.ones(length) if weights is None else weights
    encode(targets.numpy(), shares.numpy(), values.numpy(), taken, states, tuple(range(branches)))
    return torch.from_numpy(states)


@pytest.mark.parametrize("name", ["tcq2", "tcq4-l8", "tcq1g64", "tcq3g128-l16"])
def test_names_round_trip(name: str) -> None:
    assert parse_format(name).name == name


@pytest.mark.parametrize("name", ["tcq5", "tcq0", "tcq2g0", "tcq2-l7", "tcq2-l17", "tcq2channel"])
def test_bad_names_show_the_spelling(name: str) -> None:
    with pytest.raises(CompileError, match="is no weight format") as error:
        parse_format(name)
    assert "tcq2" in str(error.value)


@pytest.mark.parametrize("rows", [1, 7, 256, 257, 576, 1000])
def test_tiles_cover_the_rows_evenly(rows: int) -> None:
    bounds = tile_bounds(rows)
    lengths = np.diff(bounds)
    assert (bounds[0], bounds[-1]) == (0, rows)
    assert lengths.max() <= 256 and lengths.max() - lengths.min() < 32
    assert all(bound % 16 == 0 for bound in bounds[:-1])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_streams_hold_their_codes_and_no_more(bits: int) -> None:
    codes = torch.randint(
        0, 1 << bits, (5, 77), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    packed = pack(codes, bits)
    assert packed.shape == (5, math.ceil(77 * bits / 8))
    assert torch.equal(unpack(packed, bits, 77), codes)


def test_streams_that_are_too_short_are_refused() -> None:
    with pytest.raises(CompileError, match="19 bytes holds no 77 codes of 2 bits"):
        unpack(torch.zeros(5, 19, dtype=torch.uint8), 2, 77)


def test_a_stream_by_hand() -> None:
    # codes 1, 2, 3, 0, …: the third weight has seen the bits 01 10 11, and before them the last one's, 00
    codes = torch.tensor([[1, 2, 3, 0, 0, 0, 0, 2]], dtype=torch.uint8)
    assert pack(codes, 2).tolist() == [[0b01101100, 0b00000010]]
    states = TrellisFormat(2, state_bits=8).states(codes)[0]
    assert states[2] == 0b10_01_10_11 and states[0] == 0b00_00_10_01 and states[7] == 0b00_00_00_10


@pytest.mark.parametrize("name", ["tcq1-l16", "tcq2", "tcq2g32-l9", "tcq3", "tcq3-l16", "tcq4-l8"])
@pytest.mark.parametrize("rows", [16, 77, 256, 600])
def test_a_weight_is_its_scale_times_its_states_value(name: str, rows: int) -> None:
    format_, generator = parse_format(name), torch.Generator().manual_seed(rows)
    assert isinstance(format_, TrellisFormat)
    codes = torch.randint(0, 1 << format_.bits, (64, rows), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows, format_.groups(64), generator=generator).half()
    values = code_values(format_.state_bits)[format_.states(codes)].T
    wanted = values * spread(scales.float(), format_.inputs_per_scale(64), 64)
    assert torch.equal(format_.quantized(codes, scales).dequantize(), wanted)


@pytest.mark.parametrize("state_bits", range(8, 17))
def test_values_are_nearly_gaussian(state_bits: int) -> None:
    values = code_values(state_bits)
    square = float(values.square().mean())
    # the sum of four independent bytes: kurtosis 2.7
    assert square == pytest.approx(4 * (256**2 - 1) / 12 / 128**2, rel=0.12)
    assert float(values.pow(4).mean()) / square**2 == pytest.approx(2.7, rel=0.17)
    assert abs(float(values.mean())) < 0.03
    assert torch.equal(values.half().float(), values)


def test_values_never_change() -> None:
    """They are part of what stored bits mean."""
    products = [state * 2488982903 % 2**32 for state in (0, 1, 2, 4095)]
    values = [sum(product.to_bytes(4, "little")) // 4 - 127 for product in products]
    assert (code_values(12)[[0, 1, 2, 4095]] * 32).tolist() == values == [-127, 17, 34, -19]


def test_viterbi_equals_trying_every_stream() -> None:
    """Every stream of a tile of six weights of 2 bits; a state is four weights, so that it goes round."""
    format_, shares = TrellisFormat(2, state_bits=8), torch.tensor([1.0, 0.5, 2.0, 1.0, 1.5, 0.8])
    streams = torch.tensor(list(product(range(4), repeat=6)), dtype=torch.uint8)
    possible = format_.states(streams)
    values = code_values(8)[possible]
    for target in gaussian(20, 6):
        states = viterbi(target, format_, shares)
        # the tail is bitten: decoding the bits goes through the same states
        assert torch.equal(format_.states((states & 3)[None].to(torch.uint8))[0], states)
        # and among all streams with the same bits across the seam none is better
        rivals = possible[:, -1] & 63 == states[-1] & 63
        losses = ((target - values[rivals]).square() * shares).sum(1)
        found = ((target - code_values(8)[states]).square() * shares).sum()
        assert float(found) == pytest.approx(float(losses.min()), rel=1e-5)


def distortion(name: str, rows: int = 512, columns: int = 96) -> float:
    """Of a Gaussian weight whose inputs have nothing to do with each other."""
    weight = gaussian(rows, columns)
    (found,) = Tcq("none").quantize(weight, torch.eye(columns), [parse_format(name)])
    return output_error(weight, found.dequantize(), None)


@pytest.mark.parametrize(
    ("name", "expected"),
    # between the rate-distortion bound, 4^−k, and the best scalar codes: 0.118, 0.0345 and 0.0095
    [("tcq2-l8", 0.0800), ("tcq2-l10", 0.0749), ("tcq2", 0.0714), ("tcq3", 0.0184), ("tcq4", 0.0049)],
)
def test_distortion_of_a_gaussian_weight(name: str, expected: float) -> None:
    found = distortion(name)
    assert 4.0 ** -parse_format(name).bits < found == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("rows", "name"), [(256, "tcq2"), (300, "tcq3-l10"), (7, "tcq2g64"), (97, "tcq1g96")]
)
def test_storage_is_the_bytes_of_the_parts(rows: int, name: str) -> None:
    weight, format_ = gaussian(rows, 136), parse_format(name)
    (found,) = Tcq().quantize(weight, correlated(136), [format_])
    assert sum(p.nbytes for p in found.parts.values()) * 8 == format_.storage_bits(*weight.shape)
    assert found.parts["packed"].nbytes == 136 * math.ceil(rows * format_.bits / 8)
    assert found.dequantize().shape == weight.shape


def test_true_bits() -> None:
    """k bits a weight, and one f16 scale a row."""
    assert parse_format("tcq2").storage_bits(512, 256) / (512 * 256) == 2 + 16 / 256
    assert parse_format("tcq3g64").storage_bits(576, 576) / 576**2 == 3 + 16 / 64


def test_feedback_makes_up_for_errors() -> None:
    weight, gram = gaussian(128, 96), correlated(96)
    formats = [parse_format(n) for n in ("tcq2-l8", "tcq3-l8")]
    without = Tcq().quantize(weight, torch.diag(gram.diagonal()), formats)
    for alone, found in zip(without, Tcq().quantize(weight, gram, formats), strict=True):
        lost, kept = (output_error(weight, q.dequantize(), gram) for q in (alone, found))
        assert kept < 0.6 * lost


def test_the_search_for_a_scale_gains() -> None:
    # a few directions carry most of the inputs: feedback moves the weights far
    inputs = gaussian(2048, 96) / torch.arange(1, 97) @ gaussian(96, 96, 1)
    weight, gram, formats = gaussian(128, 96), inputs.T @ inputs / 2048, [parse_format("tcq2-l10")]
    plain, searched = (
        output_error(weight, Tcq(clip).quantize(weight, gram, formats)[0].dequantize(), gram)
        for clip in ("none", "mse")
    )
    assert searched < 0.95 * plain


def test_fewer_bits_than_gptq_and_less_than_half_the_error() -> None:
    weight, gram = gaussian(128, 192), correlated(192)
    trellis, grid = parse_format("tcq2"), parse_format("w2g64")
    assert trellis.storage_bits(128, 192) < grid.storage_bits(128, 192)
    (found,), (swept,) = Tcq().quantize(weight, gram, [trellis]), Gptq().quantize(weight, gram, [grid])
    found_error, swept_error = (output_error(weight, q.dequantize(), gram) for q in (found, swept))
    assert found_error < 0.5 * swept_error


def test_the_number_of_threads_changes_nothing() -> None:
    weight, gram, formats = gaussian(700, 64), correlated(64), [parse_format("tcq2-l8")]
    before, found = numba.get_num_threads(), []
    try:
        for threads in (1, min(2, before)):
            numba.set_num_threads(threads)
            found.append(Tcq().quantize(weight, gram, formats)[0])
    finally:
        numba.set_num_threads(before)
    assert all(torch.equal(found[0].parts[n], found[1].parts[n]) for n in ("packed", "scales"))


def test_inputs_that_never_fire_and_rows_of_nothing() -> None:
    weight, gram = gaussian(64, 96), correlated(96)
    gram[5], gram[:, 5], weight[7] = 0.0, 0.0, 0.0
    (found,) = Tcq().quantize(weight, gram, [parse_format("tcq4-l8")])
    values = found.dequantize()
    assert bool(torch.isfinite(values).all()) and float(values[7].abs().max()) < 1e-3
    assert output_error(weight, values, gram) < 0.01


def test_few_rows_are_refused_by_name() -> None:
    with pytest.raises(CompileError, match="tcq2 needs 6 rows or more, not 5"):
        Tcq().quantize(gaussian(5, 32), torch.eye(32), [parse_format("tcq2")])


def test_rows_are_not_cut() -> None:
    (found,) = Tcq().quantize(gaussian(64, 32), torch.eye(32), [parse_format("tcq2-l8")])
    with pytest.raises(AssertionError, match="not stored row by row"):
        found.rows(0, 32)


def test_onnx_refuses_before_any_work() -> None:
    choices = Choices(block="tcq2", quantizer="tcq")
    with pytest.raises(CompileError, match="does not run tcq2"):
        make_plan(Request("no-such-model", choices=choices))


def test_other_quantizers_name_the_one_that_writes_trellises() -> None:
    with pytest.raises(CompileError, match="gptq does not write tcq2") as error:
        default_pipeline(Choices(block="tcq2"), "onnx", compiler=True)
    assert "--quantizer tcq" in str(error.value)
