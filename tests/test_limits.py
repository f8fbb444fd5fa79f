"""Limits of every kind in one program: the optimum of all allocations, and what they count."""

import itertools
import math
from dataclasses import replace
from functools import cache

import pytest
from allocation_models import MODEL
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gammac.budget import parse_budgets
from gammac.cli.limits import limits_of
from gammac.diagnostics import CompileError
from gammac.ir import Module, parse
from gammac.passes import Choices, refine_of
from gammac.passes.allocate import Allocate
from gammac.pipeline import Context, Pipeline
from gammac.targets import cost, energy
from gammac.targets.target import load_target

CPU = load_target("cpu-x86")
TVM = load_target("cpu-x86", "tvm")
TOKENS = 64


@cache
def everything() -> list[tuple[dict[str, str], dict[str, float]]]:
    """All allocations without ties, and what the cost model says of the whole module."""
    module = parse(MODEL)
    weights = [w for w in module.weights.values() if "role" in w.attrs]
    found = []
    for names in itertools.product(*(list(w.attrs["scores"]) for w in weights)):  # type: ignore[arg-type]
        chosen = {w.name: name for w, name in zip(weights, names, strict=True)}
        total = cost.module_cost(module, CPU, chosen)
        decode, sizes = cost.decode_function(module, TOKENS) or (None, {})
        prefill, many = cost.prefill_function(module, TOKENS) or (None, {})
        assert decode is not None and prefill is not None
        found.append((chosen, {
            "payload": total.payload_bits,
            "true": total.true_bits,
            "size": total.bytes,
            "memory": cost.peak_bytes(module, CPU, chosen, TOKENS),
            "latency": sum(cost.op_seconds(op, module, CPU, sizes, chosen) for op in decode.ops),
            "prefill": sum(cost.op_seconds(op, module, CPU, many, chosen) for op in prefill.ops),
            "energy": energy.decode_joules(module, CPU, chosen, TOKENS) or 0.0,
            "loss": sum(w.attrs["scores"][chosen[w.name]] for w in weights),  # type: ignore[call-overload, index, misc]
        }))  # fmt: skip
    return found


UNITS = {
    "payload": "", "true": "bpw", "size": "B", "memory": f"B@{TOKENS}", "latency": f"s/token@{TOKENS}",
    "prefill": f"s@{TOKENS}", "energy": f"J/token@{TOKENS}", "loss": "loss",
}  # fmt: skip


def allocated(budget: str, objective: str = "quality") -> Module:
    pass_ = Allocate(budget=budget, tie=False, objective=objective)
    return Pipeline((pass_,)).run(parse(MODEL), Context(CPU))


def formats(module: Module) -> dict[str, str]:
    return {n: str(w.attrs["format"]) for n, w in module.weights.items() if "format" in w.attrs}


def spelled(kind: str, value: float) -> str:
    unit = UNITS[kind]
    # budgets in bytes are spelled in kilobytes
    return f"{value / 1e3:.9f}K{unit}" if unit.startswith("B") else f"{value:.15f}{unit}"


KINDS = sorted(UNITS)
# what is rounded up to nanoseconds, picojoules or parts of a loss, weight by weight
SLACK = {"latency": 1e-8, "prefill": 1e-8, "energy": 1e-11, "loss": 3e-5}


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.dictionaries(st.sampled_from(KINDS), st.floats(0.0, 1.0), min_size=1, max_size=5),
    st.sampled_from(["quality", "latency", "energy"]),
)
def test_any_limits_together_give_the_optimum(shares: dict[str, float], objective: str) -> None:
    """Limits between the least and the most of each kind, the order of which does not matter."""
    if objective != "quality":
        shares = {"loss": 0.5, **shares}
    limits = {}
    for kind, share in shares.items():
        low, high = (pick(costs[kind] for _, costs in everything()) for pick in (min, max))
        limits[kind] = low + share * (high - low) + 2 * SLACK.get(kind, 1e-6)
    measure = "loss" if objective == "quality" else objective
    fitting = [
        costs[measure]
        for _, costs in everything()
        if all(costs[kind] <= limit - SLACK.get(kind, 0) for kind, limit in limits.items())
    ]
    budgets = [spelled(kind, limit) for kind, limit in limits.items()]
    if not fitting:
        return
    found = formats(allocated("+".join(budgets), objective))
    assert found == formats(allocated("+".join(reversed(budgets)), objective))
    costs = next(costs for chosen, costs in everything() if chosen == found)
    assert all(costs[kind] <= limit for kind, limit in limits.items())
    assert costs[measure] <= min(fitting) + SLACK.get(measure, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_feasible_value_is_named_and_works(kind: str) -> None:
    low = min(costs[kind] for _, costs in everything())
    with pytest.raises(CompileError) as caught:
        allocated(f"1GB+{spelled(kind, low * 0.99)}")
    enough = str(caught.value).split("grant ")[1].split(" or allow")[0]
    allocated(f"1GB+{enough}")
    value = parse_budgets(enough)[0]
    assert value.kind == kind and low <= value.value * (1 + 1e-6) and value.value < 1.1 * low + 1e-6


def test_memory_counts_the_cache_of_the_context() -> None:
    text = """
    module @m {
      weight @q : f32[64,64] = sha256:aa {role = "block", scores = {w4g64 = 1.0}}
      func @prefill(%x: f32[batch,seq,64]) {
        %0 = linear %x, @q : f32[batch,seq,64]
        return y = %0, present_key.0 = %x
      }
    }
    """
    module = parse(text)
    grown = [cost.alive_bytes(module, CPU, tokens) for tokens in (512, 2048)]
    assert grown == [2 * 4 * 64 * 512, 2 * 4 * 64 * 2048]
    # where a prefill's logits are those of its last token, only they take room
    assert [cost.alive_bytes(parse(MODEL), target, 512) for target in (CPU, TVM)] == [
        (2 + 64 + 32 + 256) * 4 * 512, (2 + 128 + 64 + 32) * 4 * 512,
    ]  # fmt: skip


def test_energy_is_bytes_and_multiply_adds() -> None:
    text = MODEL.replace("scores = {w2g64 = 1.5, w3g64 = 0.6, w4g64 = 0.2}", 'format = "w4g64"')
    module = parse(text)
    decode, sizes = cost.decode_function(module) or (None, {})
    assert decode is not None
    down = next(op for op in decode.ops if op.name == "linear" and op.weight().name == "down")  # type: ignore[union-attr]
    read = cost.weight_cost(module.weights["down"], (), module, CPU).bytes
    expected = read * CPU.energy["byte"] + 64 * 128 * CPU.energy["int8_mac"]
    assert energy.op_joules(down, module, CPU, sizes) == pytest.approx(1e-12 * expected)
    assert energy.decode_joules(module, replace(CPU, energy={})) is None


def test_a_target_without_figures_for_energy_says_so() -> None:
    with pytest.raises(CompileError, match="no energy data"):
        Allocate(budget="1J/token").run(parse(MODEL), Context(replace(CPU, energy={})))


def test_an_objective_without_a_limit_of_loss_is_refused() -> None:
    with pytest.raises(CompileError, match="takes the cheapest format everywhere"):
        allocated("3", "latency")
    with pytest.raises(CompileError, match="the objective is quality or latency or energy, not 'speed'"):
        allocated("3", "speed")
    assert refine_of(Choices(strategy="gamma", objective="latency")) == ()
    with pytest.raises(CompileError, match="refine improves quality"):
        refine_of(Choices(strategy="gamma", objective="latency", refine=True))


def test_a_smaller_loss_takes_longer() -> None:
    seconds = []
    for loss in ("1.2loss", "3loss", "6loss", "14loss"):
        attrs = allocated(loss, "latency").attrs["allocation"]
        assert isinstance(attrs, dict) and float(attrs["objective"]) <= float(loss.removesuffix("loss"))
        seconds.append(float(attrs["latency"]))
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]


def test_budgets_are_written_in_any_order() -> None:
    a, b = (parse_budgets(text) for text in ("3+200MB@2048+1ms@64", "1ms@64,3,200MB@2048"))
    assert sorted(map(str, a)) == sorted(map(str, b)) and math.isclose(a[1].value, 2e8)


def test_options_are_spellings_of_budgets() -> None:
    given_ = dict.fromkeys(("max_latency", "max_prefill", "max_memory", "max_energy", "max_loss"))
    asked = {**given_, "max_latency": "12ms", "max_memory": "200MB", "max_loss": "0.5", "max_energy": "1mJ"}
    found = [str(parse_budgets(text)[0]) for text in limits_of({**asked, "context": 2048})]
    assert found == ["12ms/token", "200MB@2048", "1mJ/token", "0.5loss"]
    written = {**given_, "max_latency": "9us/token@64", "max_prefill": "2s@100", "max_memory": "1GB@7"}
    assert limits_of({**written, "context": None}) == ["9us/token@64", "2s@100", "1GB@7"]
    plain = {**given_, "max_prefill": "2s", "max_memory": "1GB", "context": None}
    assert limits_of(plain) == ["2s@512", "1GB@512"]
