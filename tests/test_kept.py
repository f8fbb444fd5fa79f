"""Other densities than 2:4: formats, the sweep, rates by OWL, and the command line."""

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_module import llama
from test_cli import QUICK, Run, fails
from test_cli import cache as cache  # fixtures
from test_cli import gammac as gammac
from test_sensitivity import DENSITIES, scored
from test_two_four import problem

from gammac.diagnostics import CompileError
from gammac.formats import KeptFormat, NOfEightFormat, UnstructuredFormat, load_float, parse_format
from gammac.ir import TensorType, Weight
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates, quantize_stack
from gammac.passes.choices import Choices, check_choices, with_sparsity
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.quantizers import make_quantizer, output_error
from gammac.passes.sensitivity import Owl
from gammac.passes.sensitivity.first_last_high import blocks_of_weights
from gammac.passes.sparsifiers import SPARSIFIERS
from gammac.pipeline import Pipeline

NAMES = ["s18f16", "s38w2g64", "s48w4g64", "s78w3channel", "u50f16", "u30w4g64", "u70w2channel", "u33w8g32"]
FORMATS = st.one_of(
    st.builds(NOfEightFormat, st.sampled_from([2, 3, 4, 8, 16]), st.just(0), st.integers(1, 7)),
    st.builds(UnstructuredFormat, st.sampled_from([2, 3, 4, 8, 16]), st.just(0), st.integers(1, 99)),
)


def named(name: str) -> KeptFormat:
    found = parse_format(name)
    assert isinstance(found, KeptFormat)
    return found


@given(FORMATS)
def test_names_are_read_back(format_: KeptFormat) -> None:
    assert parse_format(format_.name) == format_


@given(FORMATS, st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**31))
def test_what_is_kept_is_stored_and_comes_back(
    format_: KeptFormat, rows: int, eights: int, seed: int
) -> None:
    columns = 8 * eights
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << min(format_.width, 8), (rows, columns), generator=generator)
    mask = format_.best(torch.rand(rows, columns, generator=generator))
    assert torch.equal(mask.sum(1), torch.full((rows,), format_.kept_of(columns)))
    scales = None if format_.is_float else torch.rand(rows, 1, generator=generator).half()
    found = format_.quantized(codes, mask, scales)
    format_.check(found.parts)
    assert torch.equal(format_.mask(found.parts["places"]), mask)
    values = codes.float() if scales is None else (codes - format_.grid.midpoint) * scales.float()
    assert torch.equal(found.dequantize(), values * mask)


def test_headline_and_storage_follow_from_places_and_values() -> None:
    sizes = {
        n: (named(n).bits, named(n).storage_bits(10, 640) / 6400) for n in ("s48w4g64", "u50w4g64", "s38f16")
    }
    # seven bits say which of 70 patterns, six which of 56
    assert sizes == {"s48w4g64": (2.875, 3.125), "u50w4g64": (3.0, 3.25), "s38f16": (6.75, 6.75)}
    assert named("u33w4g64").payload_bits(1, 64) == 64 + 4 * (64 - 21)


def test_places_that_keep_too_many_are_refused() -> None:
    for name in ("u50w4g64", "s48w4g64"):
        weight, gram = problem(4, 64)
        (found,) = make_quantizer("gptq").quantize(weight, gram, [named(name)])
        with pytest.raises(CompileError, match=f"no {name} codes"):
            named(name).check({**found.parts, "codes": found.parts["codes"][:, 1:]})


@pytest.mark.parametrize(("name", "mask"), list(product(NAMES, SPARSIFIERS)))
def test_every_density_is_exact_behind_every_mask(name: str, mask: str) -> None:
    weight, gram = problem()
    format_ = named(name)
    (found,) = make_quantizer(f"gptq:mask={mask}").quantize(weight, gram, [format_])
    assert torch.equal(
        format_.mask(found.parts["places"]).sum(1), torch.full((len(weight),), format_.kept_of(256))
    )
    assert int((found.dequantize() != 0).sum(1).max()) <= format_.kept_of(256)


@pytest.mark.parametrize("pattern", ["s48f16", "u50f16"])
def test_feedback_and_choice_in_the_sweep_lose_less(pattern: str) -> None:
    weight, gram = problem()
    lost = {}
    for mask in SPARSIFIERS:
        (found,) = make_quantizer(f"gptq:mask={mask}").quantize(weight, gram, [named(pattern)])
        lost[mask] = output_error(weight, found.dequantize(), gram)
    alone = output_error(weight, weight * named(pattern).best(weight.abs()), gram)
    assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"] < 0.85 * alone, (lost, alone)


def test_freer_patterns_lose_less_at_equal_density() -> None:
    weight, gram = problem()
    names = ["s24f16", "s48f16", "u50f16"]
    found = make_quantizer("gptq").quantize(weight, gram, [parse_format(n) for n in names])
    two_four, eight, free = (output_error(weight, q.dequantize(), gram) for q in found)
    assert free < eight < two_four


# ---- rates --------------------------------------------------------------------------------------


def test_owl_gives_more_to_a_block_where_more_stands_out() -> None:
    """A block of two gets a few weights of ten times the size."""
    _, ctx = scored("owl")
    module = llama(ctx.store)
    block_of = {n: b for n, b in blocks_of_weights(module).items() if module.weights[n].type.rank == 2}
    changed = []
    for name in (n for n, b in block_of.items() if b == 1):
        weight = module.weights[name]
        values = load_float(weight, ctx.store).clone()
        values.view(-1)[::97] *= 10
        changed.append(Weight(name, weight.type, ctx.store.put({"data": values}), weight.attrs))
    for budget in ("2.4", "2.8"):
        steps = (CollectGrams(), Candidates(DENSITIES, "w8g64"), Owl(), Allocate(budget=budget, tie=False))
        found = Pipeline(steps).run(module.with_weights(*changed), ctx)
        kept = {0: 0.0, 1: 0.0}
        for name, block in block_of.items():
            weight = found.weights[name]
            kept[block] += parse_format(str(weight.attrs["format"])).density * weight.type.numel()
        assert kept[1] > 1.1 * kept[0], budget


def test_owl_refuses_formats_of_one_density(gammac: Run, tmp_path: Path) -> None:
    result = gammac("compile", "tiny", "--strategy", "owl", *QUICK, "-o", str(tmp_path / "no"))
    fails(result, "owl says how sparse a block is", "--sparsity n:8")


def test_owl_refuses_two_widths_of_one_density() -> None:
    _, ctx = scored("owl")
    steps = (CollectGrams(), Candidates("s28w4g32+s28w2g32+s68w4g32", "w8g64"), Owl())
    with pytest.raises(CompileError, match="owl tells densities apart, and s28w4g32 and s28w2g32"):
        Pipeline(steps).run(llama(ctx.store), ctx)


def test_tables_stay_dense(gammac: Run, tmp_path: Path) -> None:
    result = gammac("compile", "tiny", "--table-formats", "u50w4g64", *QUICK, "-o", str(tmp_path / "no"))
    fails(result, "u50w4g64")
    with pytest.raises(CompileError, match="embedding and head stay dense"):
        check_choices(Choices(table="s24w4g64"))


def test_an_embedding_that_no_linear_reads_is_refused_what_rounding_does_not_write() -> None:
    """gptq has no inputs to weigh by there, and rounding to nearest writes integers."""
    _, ctx = scored("owl")
    table = Weight(
        "embed", TensorType("f32", (8, 64)), ctx.store.put({"data": torch.ones(8, 64)}), {"role": "table"}
    )
    with pytest.raises(
        CompileError, match="embed: no linear reads it, so that nothing says what nf4g64 loses"
    ):
        quantize_stack([table], (parse_format("nf4g64"),), make_quantizer("gptq"), ctx)


def test_sparsity_offers_several_densities(gammac: Run, tmp_path: Path) -> None:
    assert with_sparsity("w4g64", "n:8") == "s28w4g64+s38w4g64+s48w4g64+s58w4g64+s68w4g64"
    assert with_sparsity("w4g64", "unstructured").startswith("u30w4g64+u35w4g64+u40w4g64")
    text = tmp_path / "text"
    text.write_text("of every eight inputs some are kept, and the others are zero. " * 200)
    out = tmp_path / "sweep"
    result = gammac(
        "sweep", "tiny", "--target", "reference", "--sparsity", "n:8", "--formats", "w4g64",
        "--table-formats", "w8g64", "--budgets", "2.875", "--strategies", "owl", "--text", str(text),
        "--windows", "1", "--calibration-windows", "4", "--calibration-length", "32", "-o", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2.87" in (out / "sweep.md").read_text()


def test_no_emitter_is_silently_given_them(gammac: Run, tmp_path: Path) -> None:
    for backend in ("onnx", "tvm"):
        result = gammac(
            "compile",
            "tiny",
            "--sparsity",
            "unstructured",
            "--backend",
            backend,
            *QUICK,
            "-o",
            str(tmp_path / "out"),
        )
        fails(result, "does not run u30w", "--target reference measures")
