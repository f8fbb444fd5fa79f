"""2:4 formats, one-shot masks, the sweep that prunes and rounds, and the paths of a compile."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_module import llama
from test_cli import QUICK, Run, fails
from test_cli import cache as cache  # fixtures
from test_cli import gammac as gammac
from torch import Tensor

from gammac import driver
from gammac.calibration import inputs_of
from gammac.diagnostics import CompileError
from gammac.formats import (
    Quantized,
    TwoFourFormat,
    concat_rows,
    is_two_four,
    keep_two,
    load_float,
    load_quantized,
    mask_of,
    parse_format,
    patterns_of,
)
from gammac.ir.interpret import run
from gammac.passes import Choices, default_pipeline
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.choices import with_sparsity
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.quantize import Quantize
from gammac.passes.quantizers import Gptq, make_quantizer, output_error
from gammac.passes.quantizers.sparse_sweep import order_of_groups
from gammac.passes.sensitivity import WeightMse
from gammac.passes.sparsifiers import SPARSIFIERS, make_sparsifier
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import BLOCK, load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore

WIDTHS = (2, 3, 4, 8)
NAMES = ["s24f16", "s24f16-hw", *(f"s24w{b}g64" for b in WIDTHS), "s24w3g32-hw", "s24w4channel"]
FORMATS = st.builds(
    TwoFourFormat, st.sampled_from(WIDTHS), st.sampled_from([0, 32, 64, 96, 128]), st.booleans()
)


def problem(rows: int = 96, columns: int = 256) -> tuple[Tensor, Tensor]:
    """A Gaussian weight, and the Gram matrix of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / 12 + torch.eye(columns)
    inputs = torch.randn(2000, columns, generator=generator) @ mixing
    inputs *= torch.rand(columns, generator=generator) * 3 + 0.1
    return weight, inputs.T @ inputs / 2000


def pruned(mask: str, name: str = "s24f16") -> Quantized:
    weight, gram = problem()
    (found,) = make_quantizer(f"gptq:mask={mask}").quantize(weight, gram, [parse_format(name)])
    return found


# ---- formats ------------------------------------------------------------------------------------


@given(FORMATS)
def test_names_round_trip(format_: TwoFourFormat) -> None:
    assert parse_format(format_.name) == format_


@pytest.mark.parametrize("text", ["s24", "s24w4", "s24w1g64", "s24w9g64", "s24f16g64", "s24w4g64-sym"])
def test_bad_names_show_the_spelling(text: str) -> None:
    with pytest.raises(CompileError, match=r"is no weight format(.|\n)*s24w4g64"):
        parse_format(text)


@pytest.mark.parametrize(
    ("name", "bits", "headline"),
    [
        ("s24w8g64", 4.75 + 0.25, 4.75), ("s24w4g64", 2.75 + 0.25, 2.75), ("s24w3g64", 2.25 + 0.25, 2.25),
        ("s24w2g64", 1.75 + 0.25, 1.75), ("s24w4g64-hw", 3.0 + 0.25, 3.0), ("s24f16", 8.75, 8.75),
        ("s24f16-hw", 9.0, 9.0),
    ],
)  # fmt: skip
def test_true_bits(name: str, bits: float, headline: float) -> None:
    format_ = parse_format(name)
    assert format_.storage_bits(10, 768) == bits * 7680 and format_.payload_bits(10, 768) == headline * 7680


@given(st.lists(st.integers(0, 5), min_size=3, max_size=24))
def test_patterns_are_masks_and_back(numbers: list[int]) -> None:
    patterns = torch.tensor([numbers], dtype=torch.uint8)
    mask = mask_of(patterns)
    assert mask.reshape(-1, 4).sum(1).eq(2).all() and torch.equal(patterns_of(mask), patterns)


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 4), min_size=1, max_size=8))
def test_of_four_the_two_largest_stay_and_of_equals_the_first(fours: list[tuple[int, ...]]) -> None:
    scores = torch.tensor(fours).float().reshape(1, -1)
    kept = keep_two(scores).reshape(-1, 4)
    for four, mask in zip(fours, kept.tolist(), strict=True):
        best = sorted(range(4), key=lambda i: (-four[i], i))[:2]
        assert {i for i in range(4) if mask[i]} == set(best)


def test_dequantize_by_hand() -> None:
    parts = {
        "codes": torch.tensor([[3, 0, 7, 4]], dtype=torch.uint8),
        "patterns": torch.tensor([[1, 5]], dtype=torch.uint8),  # places 0 and 2, 2 and 3
        "scales": torch.tensor([[0.5, 2.0]]).half(),
    }
    assert TwoFourFormat(3, 4).dequantize(parts).tolist() == [[-0.5, 0, -2.0, 0, 0, 0, 6.0, 0.0]]
    floats = {
        "codes": torch.tensor([[0.25, -3.0]]).half(),
        "patterns": torch.tensor([[2]], dtype=torch.uint8),
    }
    assert TwoFourFormat(16, 0).dequantize(floats).tolist() == [[0.25, 0, 0, -3.0]]


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_what_storage_counts_and_stack(name: str) -> None:
    found = pruned("sparsegpt", name)
    format_ = found.format
    assert isinstance(format_, TwoFourFormat)
    widths = {"codes": format_.width, "patterns": format_.index_bits, "scales": 16}
    assert sum(p.numel() * widths[n] for n, p in found.parts.items()) == format_.storage_bits(96, 256)
    if not format_.is_float:
        assert int(found.codes.max()) < 2**format_.width
    again = concat_rows([found.rows(0, 5), found.rows(5, 96)])
    assert torch.equal(again.dequantize(), found.dequantize())


def test_a_target_offers_them_only_for_whole_fours() -> None:
    target = load_target("reference")
    assert target.fit(parse_format("s24w4g64"), BLOCK, 576) == parse_format("s24w4g64")
    assert target.fit(parse_format("s24w4g64"), BLOCK, 100) == parse_format("s24w4channel")
    assert target.fit(parse_format("s24w4g64"), BLOCK, 102) is None
    assert target.fit(parse_format("s24f16"), BLOCK, 576) == parse_format("s24f16")


def test_damaged_patterns_are_refused() -> None:
    store, found = WeightStore(), pruned("wanda", "s24w4g64")
    module = llama(store)
    name = next(n for n, w in module.weights.items() if w.attrs.get("role") == "block")
    broken = {**found.parts, "patterns": found.parts["patterns"] + 3}
    weight = module.weights[name].with_attrs(stored="s24w4g64")
    with pytest.raises(CompileError, match="two are kept"):
        load_quantized(type(weight)(name, weight.type, store.put(broken), weight.attrs), store)


# ---- masks and the sweep ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", SPARSIFIERS)
def test_every_group_of_four_has_two(mask: str, name: str) -> None:
    assert is_two_four(pruned(mask, name).dequantize()).all()


def test_better_masks_lose_less() -> None:
    weight, gram = problem()
    lost = {m: output_error(weight, pruned(m).dequantize(), gram) for m in SPARSIFIERS}
    assert lost["sparsegpt"] < 0.95 * lost["wanda"] < 0.95 * lost["magnitude"]
    plain = weight * keep_two(weight.abs())
    assert lost["magnitude"] < 0.9 * output_error(weight, plain, gram), (
        "the sweep makes up for what is pruned"
    )


def test_wanda_is_magnitude_where_inputs_are_alike() -> None:
    importance = {m: make_sparsifier(m).importance(torch.full((8,), 3.0), torch.ones(8)) for m in SPARSIFIERS}
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    same = keep_two(weight.abs() * importance["wanda"])
    assert torch.equal(same, keep_two(weight.abs() * importance["magnitude"]))


def test_without_correlation_the_sweep_is_magnitude_pruning_and_rounding() -> None:
    weight, _ = problem()
    (found,) = Gptq(damping=0.0).quantize(weight, torch.eye(256), [parse_format("s24w4g64")])
    mask = keep_two(weight.abs())
    grid = (found.dequantize() / found.scales.float().repeat_interleave(64, 1)).round()
    assert torch.equal(mask_of(found.parts["patterns"]), mask)
    nearest = (weight / found.scales.float().repeat_interleave(64, 1)).round().clamp(-8, 7) * mask
    assert torch.equal(grid, nearest)


def test_the_sweep_equals_its_definition() -> None:
    """SparseGPT with rounding, column by column in numpy, in the original order."""
    weight, gram = problem(8, 32)
    (found,) = Gptq(act_order=False).quantize(weight, gram, [parse_format("s24w3g32")])
    left, became = weight.double().numpy().copy(), np.zeros((8, 32))
    damped = gram.double().numpy() + 0.01 * float(gram.diagonal().mean()) * np.eye(32)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    scales = found.scales.double().numpy()
    for i in range(32):
        if i % 4 == 0:
            scores = np.abs(left[:, i : i + 4]) / np.diag(upper)[i : i + 4]
            keep = scores.argsort(1).argsort(1) >= 2
        codes = np.clip(np.rint(left[:, i] / scales[:, 0]), -4, 3)
        became[:, i] = np.where(keep[:, i % 4], codes * scales[:, 0], 0)
        error = (left[:, i] - became[:, i]) / upper[i, i]
        left[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    assert np.allclose(found.dequantize().numpy(), became, atol=1e-5)


def test_fours_stay_together_in_act_order() -> None:
    order = order_of_groups(torch.tensor([0.0, 0, 0, 1, 5, 0, 0, 0, 2, 2, 2, 2]), 4)
    assert order.tolist() == [8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3]


@pytest.mark.parametrize("mask", SPARSIFIERS)
def test_rows_that_are_two_four_keep_their_zeros(mask: str) -> None:
    weight, gram = problem()
    given_ = keep_two(torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)))
    weight = torch.cat([weight[:40] * given_[:40], weight[40:]])
    (found,) = make_quantizer(f"gptq:mask={mask}").quantize(weight, gram, [parse_format("s24w4g64")])
    chosen = mask_of(found.parts["patterns"])
    assert torch.equal(chosen[:40], given_[:40]) and not torch.equal(chosen[40:], given_[40:])


def test_joint_is_better_than_one_after_the_other() -> None:
    weight, gram = problem()
    for bits in (2, 3):
        joint = pruned("sparsegpt", f"s24w{bits}g64").dequantize()
        sparse = pruned("sparsegpt")
        grid = TwoFourFormat(bits, 64).grid
        (rounded,) = make_quantizer("rtn").quantize(sparse.dequantize(), None, [grid])
        lost = output_error(weight, rounded.dequantize() * mask_of(sparse.parts["patterns"]), gram)
        assert output_error(weight, joint, gram) < lost


def test_inputs_that_never_fire_break_nothing() -> None:
    weight, gram = problem()
    gram[:10] = gram[:, :10] = 0
    (found,) = Gptq().quantize(weight, gram, [parse_format("s24w4g64")])
    assert bool(torch.isfinite(found.dequantize()).all()) and not found.dequantize()[:, :10].any()


def test_unknown_masks_are_named() -> None:
    with pytest.raises(CompileError, match="there are sparsegpt, wanda, magnitude"):
        make_quantizer("gptq:mask=best")


# ---- the passes ---------------------------------------------------------------------------------


def allocated(budget: str, block: str) -> list[str]:
    """The formats of a small Llama's block linears, which are 2:4 where they say so."""
    store = WeightStore()
    tokens = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(1))
    ctx = Context(load_target("reference"), store, (), Calibration(tokens))
    passes = (CollectGrams(), Candidates(block, "w8g32"), WeightMse(), Allocate(budget=budget, tie=False),
              Quantize())  # fmt: skip
    module = Pipeline(passes).run(llama(store), ctx)
    function = module.functions["forward"]
    made = run(function, inputs_of(function, torch.tensor([[1, 2, 3]])),
               lambda name: load_float(module.weights[name], store))  # fmt: skip
    assert bool(torch.isfinite(made["logits"]).all())
    for weight in module.weights.values():
        if str(weight.attrs.get("stored", "")).startswith("s24"):
            assert is_two_four(load_quantized(weight, store).dequantize()).all()
    return [str(w.attrs["stored"]) for w in module.weights.values() if w.attrs.get("role") == "block"]


def test_the_program_allocates_two_four_formats() -> None:
    formats = allocated("2.4", "s24w2g64+s24w4g64")
    assert {"s24w2g64", "s24w4g64"} == set(formats)


def test_for_size_alone_the_program_takes_dense_formats() -> None:
    """Rate and distortion: pruning half the weights costs more than it saves (true bits)."""
    dense = "w2g64+w3g64+w4g64"
    for budget in ("2.6bpw", "3.3bpw", "3.9bpw"):
        formats = allocated(budget, with_sparsity(dense, "auto"))
        sparse = [f for f in formats if f.startswith("s24")]
        assert len(sparse) <= len(formats) // 7, formats


def test_sparsity_is_a_set_of_formats() -> None:
    assert with_sparsity("w4g64+w2channel-sym", "2:4") == "s24w4g64+s24w2channel"
    assert with_sparsity("w4g64+w4g64-sym", "auto") == "w4g64+w4g64-sym+s24w4g64"
    with pytest.raises(CompileError, match="integer formats"):
        with_sparsity("nf4g64", "2:4")
    with pytest.raises(CompileError, match="no sparsity"):
        with_sparsity("w4g64", "4:8")


def test_what_no_quantizer_of_them_is_says_so() -> None:
    with pytest.raises(CompileError, match="rtn does not write s24w4g64"):
        default_pipeline(Choices("s24w4g64", quantizer="rtn"), "none", compiler=True)


def test_rotated_weights_are_refused() -> None:
    with pytest.raises(CompileError, match="lose their zeros"):
        default_pipeline(Choices("s24w4g64", rotate=True), "none", compiler=True)


# ---- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--sparsity", "2:4"],
            ["ONNX Runtime has no operator for 2:4", "--backend tvm", "--target reference"],
        ),
        (["--sparsity", "auto"], ["ONNX Runtime has no operator for 2:4"]),
        (["--mask", "wanda"], ["--mask says which weights stay", "--sparsity"]),
        (["--sparsity", "2:4", "--formats", "fdb2g64"], ["integer formats"]),
    ],
)
def test_compile_refuses_before_it_begins(
    gammac: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: list[str]
) -> None:
    monkeypatch.setattr(driver, "capture", None)  # whoever gets that far fails otherwise
    fails(gammac("compile", "tiny", "-o", tmp_path / "out", *QUICK, *arguments), *said)
    assert not list(tmp_path.iterdir())
