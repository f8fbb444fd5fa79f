"""Incoherence: orthogonal factors, a function that is kept, Gram matrices and bits that follow."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from families import captured
from llama_module import VOCAB, llama
from onnx_models import Shape, decoder, quantized
from test_onnx import EXACT, ROUNDED, distance
from test_rotate import logits_of, with_outliers
from torch import Tensor

from gammac.budget import parse_budget
from gammac.diagnostics import CompileError
from gammac.driver import Request, make_plan
from gammac.dryrun import estimate
from gammac.formats import parse_format
from gammac.ir import Module, to_text
from gammac.passes import Choices, default_pipeline
from gammac.passes.allocate import Allocate
from gammac.passes.allocation_limits import limit_of
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.finetune import LearnRounding
from gammac.passes.incoherence import Incoherence
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.kronecker import KINDS, factors_of, random_kronecker
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.passes.options import parse_strategy
from gammac.passes.quantize import Quantize
from gammac.passes.quantizers import output_error
from gammac.passes.sensitivity import STRATEGIES
from gammac.passes.sensitivity.scores import candidate
from gammac.passes.split_rows import SplitRows
from gammac.pipeline import Context, Pipeline
from gammac.runtime.reference import InterpreterSession
from gammac.targets.cost import module_cost, op_seconds, sizes_of
from gammac.targets.onnx.emit import emit
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore

TOKENS = torch.randint(0, VOCAB, (6, 32), generator=torch.Generator().manual_seed(1))
WHOLE = [Incoherence("kronecker"), Incoherence("hadamard"), Incoherence("kronecker", rescale=True)]

Turn = Callable[[Incoherence], Module]


# ---- factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kronecker", "hadamard"),
    [
        (576, (24, 24), (24, 24)),
        (1536, (32, 48), (32, 48)),
        (192, (12, 16), (12, 16)),
        (960, (30, 32), (24, 40)),
        (48, (6, 8), (4, 12)),
        (18944, (128, 148), (128, 148)),
        (13, (1, 13), None),
        (1009, None, None),
    ],
)
def test_factors_lie_near_the_square_root(
    size: int, kronecker: tuple[int, int] | None, hadamard: tuple[int, int] | None
) -> None:
    assert factors_of(size, "kronecker") == kronecker
    assert factors_of(size, "hadamard") == hadamard


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 48, 192, 576])
def test_products_are_orthogonal_and_what_they_say(size: int, kind: str) -> None:
    found = random_kronecker(kind, size, "0.x")
    assert found is not None
    whole = found(torch.eye(size))
    torch.testing.assert_close(whole @ whole.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole, torch.kron(found.left, found.right))
    torch.testing.assert_close(found.inverse(whole), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_the_factors(kind: str) -> None:
    first, same, other = (random_kronecker(kind, 48, seed) for seed in ("1", "1", "2"))
    assert first and same and other
    assert torch.equal(first.left, same.left) and torch.equal(first.right, same.right)
    assert not torch.equal(first.right, other.right)


# ---- the function -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> WeightStore:
    return WeightStore()


@pytest.fixture(scope="module")
def ctx(store: WeightStore) -> Context:
    return Context(load_target("cpu-x86"), store, calibration=Calibration(TOKENS))


@pytest.fixture(scope="module")
def module(store: WeightStore, ctx: Context) -> Module:
    """A Llama with gains and outliers, its Gram matrices collected."""
    return CollectGrams().run(with_outliers(llama(store), store), ctx)


@pytest.fixture(scope="module")
def turned(module: Module, ctx: Context) -> Turn:
    return lambda options: options.run(module, ctx)


@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_the_function_is_kept(options: Incoherence, module: Module, turned: Turn, store: WeightStore) -> None:
    found = turned(options)
    torch.testing.assert_close(logits_of(found, store), logits_of(module, store), rtol=1e-4, atol=1e-4)
    for name, weight in found.weights.items():
        if weight.attrs.get("role") == "block":
            assert weight.digest != module.weights[name].digest
            assert weight.attrs["incoherence"] == options.kind
    assert found.weights["embed.weight"] == module.weights["embed.weight"]


# biases, layer norms: whatever stands around a linear
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_families_keep_their_outputs(family: str) -> None:
    found = captured(family)
    tokens = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(2)).numpy()
    expected = torch.from_numpy(InterpreterSession(found.module, found.store).logits(tokens))
    for kind in KINDS:
        after = Incoherence(kind).run(found.module, Context(load_target("cpu-x86"), found.store))
        got = torch.from_numpy(InterpreterSession(after, found.store).logits(tokens))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_decoding_is_turned_as_the_prefill_is(module: Module, ctx: Context, store: WeightStore) -> None:
    cached = InsertKvCache().run(module, ctx)
    sessions = [InterpreterSession(m, store) for m in (cached, Incoherence().run(cached, ctx))]
    tokens = TOKENS[0, :8].numpy()
    for session in sessions:
        session.prefill(tokens)
    plain, after = (torch.from_numpy(session.decode(7)) for session in sessions)
    torch.testing.assert_close(after, plain, rtol=1e-4, atol=1e-4)


def test_rows_may_have_been_split(module: Module, ctx: Context, store: WeightStore) -> None:
    split = SplitRows().run(module, ctx)
    found = Incoherence().run(split, ctx)
    torch.testing.assert_close(logits_of(found, store), logits_of(module, store), rtol=1e-4, atol=1e-4)


def test_what_reads_one_value_shares_its_turn(turned: Turn) -> None:
    function = turned(Incoherence()).functions["forward"]
    sources = {op.loc: op.operands[0] for op in function.ops if op.name == "linear"}
    for block in ("layers.0", "layers.1"):
        assert sources[f"{block}.q"] is sources[f"{block}.k"] is sources[f"{block}.v"]
        assert sources[f"{block}.gate"] is sources[f"{block}.up"]
        assert sources[f"{block}.o"] is not sources[f"{block}.q"]


def test_signs_and_scales_are_folded_into_norms_where_there_are_any(module: Module, turned: Turn) -> None:
    plain, scaled = turned(Incoherence()), turned(Incoherence(rescale=True))
    vectors = [n for n in scaled.weights if n.endswith(".rescale")]
    assert vectors == [f"layers.{i}.{name}.rescale" for i in (0, 1) for name in ("o", "down")]
    assert not any(n.endswith(".rescale") for n in plain.weights)
    assert sum(op.name == "mul" for op in scaled.functions["forward"].ops) == 2 + len(vectors)
    for name in ("layers.0.norm1.weight", "layers.1.norm2.weight"):
        assert plain.weights[name].digest != module.weights[name].digest
    assert plain.weights["norm.weight"] == module.weights["norm.weight"]


def test_equal_seeds_equal_modules(module: Module, store: WeightStore) -> None:
    texts = [
        to_text(Incoherence().run(module, Context(load_target("cpu-x86"), store, seed=s))) for s in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


# ---- what it is for -----------------------------------------------------------------------------


def floats(module: Module, store: WeightStore, name: str) -> Tensor:
    return store.tensor(module.weights[name].digest).double()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stands_out_afterwards(kind: str, module: Module, turned: Turn, store: WeightStore) -> None:
    """Largest weight beside the root mean square, and fourth moment, both in and out of the blocks."""
    found = turned(Incoherence(kind))
    for name in ("layers.0.q.weight", "layers.1.down.weight", "layers.0.o.weight"):
        before, after = floats(module, store, name), floats(found, store, name)
        peaks, tails = [], []
        for w in (before, after):
            peaks.append(w.abs().max() / w.square().mean().sqrt())
            tails.append(w.pow(4).mean() / w.square().mean().square())
        assert peaks[1] < 0.6 * peaks[0]
        assert tails[1] < 4.5 < tails[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_weights_share_is_spread_too(kind: str, module: Module, ctx: Context) -> None:
    """A mean that is not zero is a row of a Hadamard matrix: without signs it would be a spike."""
    name = "layers.0.o.weight"
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    flat = replace(module.weights[name], digest=ctx.store.put({"data": 1 + 0.1 * noise}))
    found = Incoherence(kind).run(module.with_weights(flat), ctx)
    weight = floats(found, ctx.store, name)
    for dim in (0, 1):
        # of 64 rows or columns none holds more than a third of all squares; unsigned, one holds all
        assert weight.square().sum(dim).max() / weight.square().sum() < 1 / 3


@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_gram_matrices_are_those_of_the_turned_inputs(
    options: Incoherence, module: Module, turned: Turn, ctx: Context, store: WeightStore
) -> None:
    found = turned(options)
    measured = CollectGrams().run(found, ctx)
    for name, weight in found.weights.items():
        if weight.attrs.get("role") == "block":
            expected, gram = (store.tensor(str(m.weights[name].attrs["gram"])) for m in (measured, found))
            torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_rescaling_makes_inputs_and_columns_alike(module: Module, turned: Turn, store: WeightStore) -> None:
    """diag(D⁻¹ G D⁻¹) and diag(D Wᵀ W D) are proportional; seen before V, which the factors undo."""
    found, name = turned(Incoherence(rescale=True)), "layers.0.down.weight"
    left, right = (floats(found, store, f"incoherence.in.128.{side}") for side in ("left", "right"))
    v = torch.kron(left.T.contiguous(), right)
    weight = floats(found, store, name) @ v.T
    gram = store.tensor(str(found.weights[name].attrs["gram"])).double()
    ratio = (v @ gram @ v.T).diagonal() / weight.square().sum(0)
    assert ratio.max() / ratio.min() < 1.01
    before = store.tensor(str(module.weights[name].attrs["gram"])).diagonal()
    assert (before / floats(module, store, name).square().sum(0)).log().std() > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_two_bits_a_row_lose_less_than_without(kind: str, module: Module, turned: Turn, ctx: Context) -> None:
    errors = {}
    for label, start in (("plain", module), ("turned", turned(Incoherence(kind)))):
        found = Candidates("w2channel", "w8channel").run(start, ctx)
        weights = [w for w in found.weights.values() if w.attrs.get("role") == "block"]
        errors[label] = [float(str(w.attrs["errors"]["w2channel"])) for w in weights]  # type: ignore[index,call-overload]
    better = sum(after < before for before, after in zip(errors["plain"], errors["turned"], strict=True))
    assert better >= 12 and sum(errors["turned"]) < 0.6 * sum(errors["plain"])


def test_quip_leaves_tables_to_gptq(module: Module, turned: Turn, ctx: Context) -> None:
    found = {
        q: Candidates("w4channel", "w4channel", quantizer=q).run(turned(Incoherence()), ctx).weights
        for q in ("quip", "gptq")
    }
    same = {n: found["quip"][n] == found["gptq"][n] for n, w in module.weights.items() if "role" in w.attrs}
    assert same.pop("embed.weight") and not any(same.values())


def test_candidates_stand_for_the_turned_weights(turned: Turn, ctx: Context) -> None:
    found = Candidates("w8channel", "w8channel").run(turned(Incoherence()), ctx)
    weight = found.weights["layers.0.up.weight"]
    gram = ctx.store.tensor(str(weight.attrs["gram"]))
    assert output_error(ctx.store.tensor(weight.digest), candidate(weight, "w8channel", ctx), gram) < 1e-3


# ---- what it costs ------------------------------------------------------------------------------


def test_true_bits_count_the_factors(module: Module, turned: Turn, ctx: Context) -> None:
    formats = {n: "w4g32" for n, w in module.weights.items() if w.attrs.get("role") == "block"}
    plain, found = (module_cost(m, ctx.target, formats) for m in (module, turned(Incoherence(rescale=True))))
    block = sum(module.weights[n].type.numel() for n in formats)
    # 64 and 128 in; 64, 128 and 32 out; then the four vectors
    factors = sum(p * p + q * q for p, q in ((8, 8), (8, 16), (8, 8), (8, 16), (4, 8)))
    extra = 32 * (factors + 2 * (64 + 128)) / block
    assert found.true_bits == pytest.approx(plain.true_bits + extra)
    assert found.bytes == plain.bytes + extra * block / 8
    assert found.payload_bits == plain.payload_bits
    assert found.decode_seconds > plain.decode_seconds


def test_a_budget_in_true_bits_leaves_room_for_them(module: Module, turned: Turn, ctx: Context) -> None:
    limits = [limit_of(parse_budget("3bpw"), m, ctx.target) for m in (module, turned(Incoherence()))]
    serving = sum(w.type.numel() for w in turned(Incoherence()).weights.values() if "serves" in w.attrs)
    assert limits[0].capacity - limits[1].capacity == 32 * serving > 0


def test_products_of_matrices_take_their_operations(turned: Turn, ctx: Context) -> None:
    found = turned(Incoherence())
    op = next(o for o in found.functions["forward"].ops if o.name == "matmul")
    few, many = (op_seconds(op, found, ctx.target, sizes_of(n, 0)) for n in (1, 4096))
    flops = 2 * 4096 * 64 * 8
    assert many - few > flops / (ctx.target.float_gflops * ctx.target.threads * 1e9)


@pytest.mark.parametrize("strategy", ["gamma{steps=2,draws=2}", "fisher", "delta_loss"])
def test_turned_modules_are_scored_allocated_and_learnt(
    strategy: str, module: Module, turned: Turn, ctx: Context
) -> None:
    """What follows the pass: factors are no weights to choose a format for, and stay floats."""
    budgets = (parse_budget("3.5bpw"),)
    ctx = replace(ctx, budgets=budgets)
    passes = (
        Candidates("w2g32+w4g32", "w8g32", quantizer="quip"),
        parse_strategy(strategy, STRATEGIES),
        Allocate(),
        LearnRounding(steps=2, batch=2),
        Quantize(),
    )
    found = Pipeline(passes).run(turned(Incoherence(rescale=True)), ctx)
    assert module_cost(found, ctx.target).true_bits <= 3.5
    stored = {n for n, w in found.weights.items() if "stored" in w.attrs}
    assert stored == {n for n, w in module.weights.items() if "role" in w.attrs}


# ---- the artifact -------------------------------------------------------------------------------


@pytest.mark.parametrize(("formats", "bound"), [({}, EXACT), ({"": "w4g32"}, ROUNDED)], ids=["f32", "w4g32"])
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_gives_the_interpreters_numbers(
    kind: str, formats: dict[str, str], bound: float, tmp_path: Path
) -> None:
    """Prefill and decoding; the factors are small f32 products, what is quantized stays packed."""
    store = WeightStore()
    ctx = Context(load_target("cpu-x86"), store)
    turned = quantized(Incoherence(kind).run(decoder(Shape(bias=True), store), ctx), store, formats)
    module = LegalizeOnnx().run(turned, ctx)
    emit(module, store, tmp_path)
    assert distance(module, tmp_path, store) < bound
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    # a layer turns four inputs and seven outputs, by two factors each
    assert kinds["MatMul"] >= 2 * 2 * (4 + 7)
    assert (kinds["MatMulNBits"] > 0) == bool(formats)


def test_the_dry_run_counts_what_the_compile_stores(tmp_path: Path) -> None:
    """Factors of 256 = 16 · 16, 512 = 16 · 32 and 128 = 8 · 16; the vectors of five layers' o and down."""
    choices = Choices("w3g64", quantizer="quip", strategy="uniform", incoherence="kronecker:rescale=on")
    plan = make_plan(Request("tiny", "cpu-x86", "3", choices), tmp_path)
    block = sum(w.type.numel() for w in plan.module.weights.values() if w.attrs.get("role") == "block")
    floats = 2 * (256 + 256) + 2 * (256 + 1024) + (64 + 256) + 5 * (256 + 512)
    expected = 3 + (16 + 3) / 64 + 32 * floats / block
    assert estimate(plan).cost.true_bits == pytest.approx(expected)


# ---- who asks for it, and refusals --------------------------------------------------------------


def names_of(choices: Choices) -> list[str]:
    return [p.name for p in default_pipeline(choices, "onnx", compiler=True)]


def test_quip_brings_its_incoherence_along() -> None:
    names = names_of(Choices(quantizer="quip"))
    at = names.index("incoherence")
    assert names.index("collect_grams") < at < names.index("candidates")
    assert "incoherence" not in names_of(Choices())
    assert "incoherence" not in names_of(Choices(quantizer="quip", incoherence="none"))
    (found,) = (
        p
        for p in default_pipeline(Choices(incoherence="hadamard:rescale=on"), "onnx", compiler=True)
        if isinstance(p, Incoherence)
    )
    assert found == Incoherence("hadamard", rescale=True)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices(rotate=True, incoherence="hadamard"), "rotate and incoherence"),
        (Choices(rotate=True, quantizer="quip"), "rotate and incoherence"),
        (Choices(incoherence="fourier"), "kind=fourier"),
        (Choices(incoherence="kronecker:scale=on"), "no option 'scale=on'"),
        (Choices(quantizer="rtn", incoherence="kronecker:rescale=on"), "rescale needs the Gram matrices"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(choices: Choices, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        default_pipeline(choices, "onnx", compiler=True)


def test_modules_that_cannot_be_turned_are_refused(store: WeightStore, ctx: Context, turned: Turn) -> None:
    with pytest.raises(CompileError, match="needs the Gram matrix"):
        Incoherence(rescale=True).run(llama(store), ctx)
    with pytest.raises(CompileError, match="turned already"):
        Incoherence().run(turned(Incoherence()), ctx)
    quantized = Candidates("w4channel", "w4channel", quantizer="rtn").run(llama(store), ctx)
    with pytest.raises(CompileError, match="quantized already"):
        Incoherence().run(quantized, ctx)


def test_a_width_without_factors_is_named(module: Module, ctx: Context) -> None:
    thirds = SplitRows(parts=3).run(module, ctx)
    with pytest.raises(CompileError, match=r"22 features have no two hadamard factors") as caught:
        Incoherence("hadamard").run(thirds, ctx)
    assert "kronecker" in str(caught.value)


def test_formats_of_turned_weights_are_as_before(turned: Turn, ctx: Context) -> None:
    weight = turned(Incoherence()).weights["layers.0.q.weight"]
    assert Candidates("w3g64", "w8g64").formats_for(weight, ctx) == (parse_format("w3g64"),)
