"""The IR itself: text round trips, type rules, the verifier, and the interpreter against torch."""

import contextlib
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gammac.diagnostics import CompileError
from gammac.ir import (
    OPS,
    Builder,
    Function,
    Module,
    Op,
    Sym,
    TensorType,
    TypeRuleError,
    Value,
    Weight,
    parse,
    to_text,
    verify,
)
from gammac.ir.interpret import KERNELS, run
from gammac.ir.types import Dim, evaluate, parse_dim, parse_type

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,5}(\.[0-9]{1,2})?", fullmatch=True)
SIZES = st.sampled_from(["batch", "seq", "past"])


@st.composite
def dims(draw: st.DrawFn) -> Dim:
    """A number, or a small polynomial."""
    total: Dim = draw(st.integers(1, 64))
    if draw(st.booleans()):
        for name in draw(st.lists(SIZES, min_size=1, max_size=2)):
            total = Sym.named(name) * draw(st.integers(1, 3)) + draw(st.sampled_from([0, total]))
    return total


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from([Sym.named("seq"), Sym.named("past") + Sym.named("seq")]),
)
ATTRS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple), st.dictionaries(NAMES, inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def modules(draw: st.DrawFn) -> Module:
    """A well-formed module: chains of elementwise ops and linears over a few widths."""
    widths = draw(st.lists(st.sampled_from([4, 8, 12]), min_size=2, max_size=3, unique=True))
    weights = {}
    for out in widths:
        for width in widths:
            attrs = draw(st.dictionaries(NAMES, ATTRS, max_size=2))
            name = f"layers.{out}.w{width}.weight"
            weights[name] = Weight(name, TensorType("f32", (out, width)), f"sha256:{out}{width}", attrs)
    x = Value(TensorType("f32", (Sym.named("batch"), draw(dims()), widths[0])), "x")
    builder = Builder()
    values = [x]
    for _ in range(draw(st.integers(0, 8))):
        value = draw(st.sampled_from(values))
        loc = draw(st.sampled_from(["", "layers.0.up", 'odd "name"']))
        kind = draw(st.sampled_from(["linear", "unary", "add", "scale"]))
        if kind == "linear":
            out = draw(st.sampled_from(widths))
            values.append(
                builder.emit(
                    "linear", value, weights[f"layers.{out}.w{value.type.shape[-1]}.weight"].ref, loc=loc
                )
            )
        elif kind == "unary":
            values.append(builder.emit(draw(st.sampled_from(["silu", "relu", "tanh"])), value, loc=loc))
        elif kind == "add":
            values.append(builder.emit("add", value, value, loc=loc))
        else:
            values.append(builder.emit("scale", value, loc=loc, by=draw(st.floats(allow_nan=False))))
    function = Function("forward", (x,), tuple(builder.ops), (values[-1],), ("y",))
    return Module("m", {"forward": function}, weights, draw(st.dictionaries(NAMES, ATTRS, max_size=3)))


@given(modules())
@settings(max_examples=150, deadline=None)
def test_text_round_trip(module: Module) -> None:
    text = to_text(module)
    again = parse(text)
    assert to_text(again) == text
    assert again.weights == module.weights
    assert again.attrs == module.attrs
    assert verify(again) == []


@given(dims(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_dimensions_round_trip_and_evaluate(dim: Dim, batch: int, seq: int, past: int) -> None:
    sizes = {"batch": batch, "seq": seq, "past": past}
    assert parse_dim(str(dim)) == dim
    assert evaluate(dim * 3 + dim, sizes) == 4 * evaluate(dim, sizes)


@given(st.sampled_from(["f32[batch,seq,64]", "i64[batch,past+seq]", "f32[]", "bool[2*seq-1]"]))
def test_types_round_trip(text: str) -> None:
    assert str(parse_type(text)) == text


SOURCE = """module @m {
  weight @w : f32[8,4] = sha256:aa
  func @forward(%x: f32[batch,4]) {
    %0 = linear %x, @w : f32[batch,8] loc("layers.0.up")
    %1 = silu %0 : f32[batch,8] loc("layers.0")
    return y = %1
  }
}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("silu %0", "silu %9", "bad.gir:5:15: %9 is not defined here"),
        ("@w :", "@w ; ", "unexpected character"),
        ("f32[8,4]", "f33[8,4]", "expected a type"),
        ("f32[8,4]", "f32[8,-]", "is no dimension"),
        ("%1 =", "%0 =", "%0 is defined twice"),
        ("sha256:aa", "sha256", "expected a digest"),
        ("return y = %1", "return y %1", "expected '='"),
        ("linear %x, @w", "linear %x, @v", "@v is not defined here"),
        ("\n}\n", "\n", "found 'end of file'"),
        ("}\n}\n", "}\n}\nmodule", "behind the module"),
    ],
)
def test_parse_errors_point_at_their_place(old: str, new: str, message: str) -> None:
    assert old in SOURCE
    with pytest.raises(CompileError) as raised:
        parse(SOURCE.replace(old, new), "bad.gir")
    assert message in str(raised.value)
    assert str(raised.value).startswith("bad.gir:")


@given(st.text(max_size=80))
def test_parser_never_crashes_on_garbage(text: str) -> None:
    with pytest.raises(CompileError):
        parse(text)


@given(st.integers(0, len(SOURCE) - 1), st.sampled_from(list('{}()=%@,"x1 ')))
def test_parser_never_crashes_on_a_damaged_file(position: int, character: str) -> None:
    text = SOURCE[:position] + character + SOURCE[position + 1 :]
    with contextlib.suppress(CompileError):
        verify(parse(text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("silu %0 : f32[batch,8]", "silu %0 : f32[batch,9]", "silu gives f32[batch,8], not f32[batch,9]"),
        ("silu %0", "swish %0", "there is no op swish"),
        ("silu %0", "silu %0 {slope = 1}", "silu has no attribute slope"),
        ("silu %0", "scale %0", "scale needs the attribute by"),
        ("silu %0", "scale %0 {by = 2}", "by is a float, not 2"),
        ("f32[8,4]", "f32[8,5]", "x has 4 features, the weight wants 5"),
        ("silu %0", "linear %0", "linear takes 2 to 3 operands, not 1"),
    ],
)
def test_verifier_names_what_is_wrong(old: str, new: str, message: str) -> None:
    (found,) = verify(parse(SOURCE.replace(old, new)))
    assert message in found.message
    assert found.loc.startswith("layers.0")


def test_verifier_lists_everything() -> None:
    broken = SOURCE.replace("f32[8,4]", "f32[8,5]").replace("silu %0", "swish %0")
    assert len(verify(parse(broken))) == 2


def test_verifier_finds_a_value_used_before_its_definition() -> None:
    module = parse(SOURCE)
    function = module.functions["forward"]
    upside_down = dataclasses.replace(function, ops=function.ops[::-1])
    assert any("before it is defined" in d.message for d in verify(module.with_functions(upside_down)))


def test_every_op_has_a_kernel_and_a_docstring() -> None:
    assert set(OPS) == set(KERNELS)
    assert all(spec.doc for spec in OPS.values())


def test_builder_refuses_operands_that_dont_fit() -> None:
    x = Value(TensorType("f32", (2, 3)), "x")
    with pytest.raises(TypeRuleError, match="don't broadcast"):
        Builder().emit("add", x, Value(TensorType("f32", (2, 4)), "y"))
    with pytest.raises(TypeRuleError, match="there is no op"):
        Builder().emit("added", x, x)


def one_op(name: str, *inputs: torch.Tensor, **attrs: object) -> torch.Tensor:
    """Run one op on tensors through the interpreter."""
    dtypes = {torch.float32: "f32", torch.int64: "i64"}
    params = tuple(Value(TensorType(dtypes[t.dtype], tuple(t.shape)), f"x{i}") for i, t in enumerate(inputs))
    builder = Builder()
    value = builder.emit(name, *params, **attrs)  # type: ignore[arg-type]
    function = Function("f", params, tuple(builder.ops), (value,), ("y",))
    arguments = {f"x{i}": t for i, t in enumerate(inputs)}
    found = run(function, arguments, lambda _: torch.empty(0))["y"]
    assert tuple(found.shape) == value.type.shape
    return found


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("seq", "total"), [(5, 5), (1, 7), (3, 8)])
def test_attention_is_what_it_says(window: int, softcap: float, seq: int, total: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, seq, 8, generator=generator)
    k, v = (torch.randn(2, 2, total, 8, generator=generator) for _ in range(2))
    found = one_op("attention", q, k, v, scale=0.3, causal=True, window=window, softcap=softcap)
    for i in range(seq):
        last = total - seq + i
        first = max(0, last - window + 1) if window else 0
        keys = k[:, :, first : last + 1].repeat_interleave(2, 1)
        values = v[:, :, first : last + 1].repeat_interleave(2, 1)
        scores = torch.einsum("bhd,bhkd->bhk", q[:, :, i], keys) * 0.3
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        expected = torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), values)
        torch.testing.assert_close(found[:, :, i], expected, atol=1e-5, rtol=1e-5)


def test_rope_turns_pairs_by_their_angle() -> None:
    x = torch.randn(1, 2, 3, 6)
    angle = torch.rand(1, 3, 2)
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
    found = one_op("rope", x, cos, sin)
    a, b = x[..., :2], x[..., 2:4]
    c, s = cos[:, None, :, :2], sin[:, None, :, :2]
    torch.testing.assert_close(found[..., :2], a * c - b * s)
    torch.testing.assert_close(found[..., 2:4], b * c + a * s)
    torch.testing.assert_close(found[..., 4:], x[..., 4:])


def test_rms_norm_is_what_it_says() -> None:
    x, weight = torch.randn(2, 8), torch.rand(8)
    expected = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(one_op("rms_norm", x, weight, eps=1e-5), expected)


def test_interpreter_binds_sizes_and_refuses_wrong_ones() -> None:
    function = parse(SOURCE).functions["forward"]
    weight = torch.randn(8, 4)
    x = torch.randn(3, 4)
    found = run(function, {"x": x}, lambda _: weight)["y"]
    torch.testing.assert_close(found, torch.nn.functional.silu(x @ weight.t()))
    with pytest.raises(ValueError, match="4 is 4, got 5"):
        run(function, {"x": torch.randn(3, 5)}, lambda _: weight)
    with pytest.raises(ValueError, match="wants %x"):
        run(function, {}, lambda _: weight)


def test_op_is_hashable_by_identity() -> None:
    value = Value(TensorType("f32", (1,)))
    assert Op("silu", (value,), (Value(value.type),)) != Op("silu", (value,), (Value(value.type),))
    assert not math.isnan(hash(value))
