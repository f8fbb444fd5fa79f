"""Why a weight has its format: names by their ends, steps, prices, and what a file doesn't say."""

from dataclasses import replace

import pytest
from llama_module import llama

from gammac.diagnostics import CompileError
from gammac.explain import explain, find_weight, options, reasons
from gammac.formats import parse_format
from gammac.ir import Module
from gammac.targets.target import load_target
from gammac.weights import WeightStore

TARGET = load_target("cpu-x86")
ALONE = replace(TARGET, tie=False)
FORMATS = ("w2g32", "w4g32", "w8g32")


def allocated(**formats: str) -> Module:
    """Every weight scored n · 4^−bits, `down` tenfold, in w4g32 if not said."""
    module = llama(WeightStore())
    weights = []
    for weight in module.weights.values():
        if "role" in weight.attrs:
            worth = weight.type.numel() * (10 if "down" in weight.name else 1)
            scores = {f: worth * 4.0 ** -parse_format(f).bits for f in FORMATS}
            short = weight.name.removeprefix("layers.").removesuffix(".weight").replace(".", "")
            weights.append(weight.with_attrs(scores=scores, format=formats.get(f"b{short}", "w4g32")))
    return module.with_weights(*weights)


def test_names_by_their_ends() -> None:
    module = allocated()
    for name in ("layers.1.up.weight", "layers.1.up", "1.up", "1.up.weight"):
        assert find_weight(module, name).name == "layers.1.up.weight"
    with pytest.raises(CompileError, match=r"'up' stands for 2 weights\n.*layers.0.up.weight, layers.1.up"):
        find_weight(module, "up")
    with pytest.raises(CompileError, match=r"no weight 'p'"):
        find_weight(module, "p")


def test_a_part_stands_for_the_fused_weight() -> None:
    module = allocated()
    fused = replace(module.weights["layers.0.q.weight"], name="layers.0.q-k.weight")
    fused = fused.with_attrs(parts=("layers.0.q.weight", "layers.0.k.weight"))
    rest = {n: w for n, w in module.weights.items() if n not in ("layers.0.q.weight", "layers.0.k.weight")}
    assert find_weight(replace(module, weights={**rest, fused.name: fused}), "0.k").name == fused.name


def test_options_are_what_allocate_chooses_from() -> None:
    module = allocated()
    found = list(options(module, ("layers.0.o.weight",), TARGET))
    assert [o.format for o in found] == list(FORMATS)
    numel = 64 * 64
    assert [o.payload_bits for o in found] == [2 * numel, 4 * numel, 8 * numel]
    # a group of 32 has a 16-bit scale and a zero point
    assert [o.true_bits for o in found] == [numel * b + numel // 32 * (16 + b) for b in (2, 4, 8)]
    assert found[0].bytes < found[1].bytes < found[2].bytes
    assert {o.format: o.score for o in found} == module.weights["layers.0.o.weight"].attrs["scores"]


def test_prices_are_score_for_a_million_true_bits() -> None:
    module = allocated(b0down="w2g32", b1o="w8g32")
    found = explain(module, module.weights["layers.0.o.weight"], ALONE)
    numel = 64 * 64
    assert found.wider and found.narrower and found.best_left and found.worst_taken
    assert (found.wider.before, found.wider.after) == ("w4g32", "w8g32")
    assert found.wider.score == pytest.approx(numel * (4.0**-8 - 4.0**-4))
    assert found.wider.true_bits == numel * 4 + numel // 32 * 4 and found.wider.bytes > 0
    assert found.wider.price == pytest.approx((4.0**-4 - 4.0**-8) / (4 + 4 / 32) * 1e6)
    assert found.narrower.price == pytest.approx((4.0**-2 - 4.0**-4) / (2 + 2 / 32) * 1e6)
    # down is worth ten times as much and has 2 bits; o of block 1 has 8 for nothing
    assert found.best_left.weights == ("layers.0.down.weight",)
    assert found.best_left.price == pytest.approx(10 * found.narrower.price)
    assert found.worst_taken.weights == ("layers.1.o.weight",)
    assert found.worst_taken.price == pytest.approx(found.wider.price)
    up, down = reasons(found)
    assert up.endswith("not worth it"), "the bits of the worst step bring as much"
    assert down.startswith("a step narrower would cost") and "worth it alone, but steps are whole" in down


def test_weights_that_are_fused_are_decided_together() -> None:
    module = allocated()
    found = explain(module, module.weights["layers.0.up.weight"], TARGET)
    assert found.together == ("layers.0.gate.weight", "layers.0.up.weight")
    alone = explain(module, module.weights["layers.0.up.weight"], ALONE)
    assert found.wider and alone.wider
    assert found.wider.true_bits == 2 * alone.wider.true_bits
    assert found.wider.price == pytest.approx(alone.wider.price)
    assert found.options == alone.options, "the table of formats is the weight's own"
    assert next(reasons(found)).startswith("decided together, as the target fuses them: layers.0.gate")
    # a compile with --no-tie
    untied = allocated(b0up="w2g32")
    assert explain(untied, untied.weights["layers.0.up.weight"], TARGET).together == ("layers.0.up.weight",)


def test_what_the_file_doesn_t_say_is_said() -> None:
    module = allocated()
    name = "layers.0.o.weight"
    bare = replace(module.weights[name], attrs={"role": "block", "format": "w4g32", "measured_error": 0.25})
    found = explain(module.with_weights(bare), bare, ALONE)
    assert [(o.format, o.score, o.error) for o in found.options] == [("w4g32", None, 0.25)]
    assert found.wider is None and found.narrower is None
    assert list(reasons(found)) == [
        "its scores are not in this file: compile with --dump-ir, and inspect the dump behind allocate"
    ]
    other = explain(module.with_weights(bare), module.weights["layers.1.o.weight"], ALONE)
    assert next(reasons(other)).startswith("1 weights are not compared")
    norm = module.weights["norm.weight"]
    assert list(reasons(explain(module, norm, ALONE))) == [
        "it stays f32: no linear of a block, nor embedding or head"
    ]


def test_a_format_that_the_target_does_not_run_is_no_option() -> None:
    module = allocated()
    stock = replace(ALONE, kernels=tuple(k for k in TARGET.kernels if not k.needs_compiler))
    weight = module.weights["layers.0.o.weight"]
    scores = {"w3g32": 1.0, "w4g32": 0.5, "w8g32": 0.1}
    changed = module.with_weights(weight.with_attrs(scores=scores))
    found = list(options(changed, (weight.name,), stock))
    assert [o.format for o in found] == ["w4g32", "w8g32"]
