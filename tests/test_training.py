"""DSA-QAT: the paper's formulas, the controller, exact resume, and a trained folder compiled as it is."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from llama_module import VOCAB, llama
from runtime_models import llama as transformers_llama
from runtime_models import tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_runs import killed_and_resumed

from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.driver import Request, compile_model, make_plan
from gammac.formats import IntegerFormat, load_quantized, parse_format
from gammac.ir.interpret import run_op
from gammac.passes.keep_precision import HIGH_PRECISION
from gammac.passes.quantizers import Gptq, Rtn
from gammac.passes.training import efficiency, losses, precision, sensitivity
from gammac.passes.training.compensate import gram_matrices
from gammac.passes.training.dsa_qat import DsaQat
from gammac.passes.training.fake_quantize import (
    HeldGrid,
    quantize_values,
    round_activations,
    step_size,
    straight_through,
)
from gammac.passes.training.options import DsaQatOptions
from gammac.passes.training.precision import Level
from gammac.passes.training.trained import CODES, read_trained
from gammac.passes.training.trainer import Data, Schedule, Trainer, smoothed_losses
from gammac.pipeline import Context
from gammac.runtime.check import Check
from gammac.runtime.evaluate import Comparison
from gammac.runtime.reference import InterpreterSession, TransformersSession
from gammac.targets.target import load_target
from gammac.training import TrainRequest, finetune, make_training
from gammac.weights import WeightStore

FORMATS = "w2g32+w3g32+w4g32+w6g32+w8g32"


# ---- formulas -----------------------------------------------------------------------------------


def test_the_quantizer_rounds_to_steps_and_clips_at_codes_times_the_step() -> None:
    x = torch.tensor([-9.0, -0.26, 0.24, 0.26, 9.0])
    assert quantize_values(x, 0.5, -7, 7).tolist() == [-3.5, -0.5, 0.0, 0.5, 3.5]


def test_the_step_is_the_largest_magnitude_over_the_largest_code() -> None:
    x = torch.tensor([[1.0, -14.0], [3.5, 0.0]])
    assert float(step_size(x, 4)) == 2.0
    assert step_size(x, 4, -1).flatten().tolist() == [2.0, 0.5]


def test_sensitivity_is_a_weighed_sum_and_standardising_makes_its_terms_comparable() -> None:
    assert sensitivity.sensitivity(2.0, 3.0, 0.25, 0.5) == 2.0
    assert sensitivity.gradient_variance(torch.tensor([1.0, 3.0])) == 1.0
    layers = {"a": sensitivity.Layer(1e-9, 4.0, 10, 0.2), "b": sensitivity.Layer(3e-9, 4.0, 30, 0.2, 1.0)}
    found = sensitivity.sensitivities(layers, 1, 1, 1)
    assert found == {"a": pytest.approx(0.5 + 0.5), "b": pytest.approx(1.5 + 1.5 + 1.0)}


def test_a_layer_in_two_halves_is_as_sensitive_as_the_whole() -> None:
    whole = {"a": sensitivity.Layer(1e-9, 4.0, 20, 0.2), "b": sensitivity.Layer(1e-9, 4.0, 20, 0.2)}
    halves = {"a": whole["a"], **{n: sensitivity.Layer(1e-9, 2.0, 10, 0.2) for n in ("b0", "b1")}}
    one, two = sensitivity.sensitivities(whole, 0.5, 0.5, 0), sensitivity.sensitivities(halves, 0.5, 0.5, 0)
    assert two["b0"] + two["b1"] == pytest.approx(two["a"]) and one["a"] == one["b"]


def test_attention_distortion_is_the_mean_kl_of_rows() -> None:
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    wanted = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert sensitivity.attention_distortion(p, q) == pytest.approx(wanted, rel=1e-5)


def test_the_loss_adds_the_noise_of_layers_and_relative_noise_ignores_scale() -> None:
    a, q = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    assert float(losses.squared_noise(a, q)) == 2.0
    assert float(losses.relative_noise(a, q)) == float(losses.relative_noise(10 * a, 10 * q)) == 0.5
    task = torch.tensor(3.0)
    assert float(losses.quantization_aware_loss(task, [torch.tensor(1.0), torch.tensor(2.0)], 0.5)) == 3.75
    assert losses.quantization_aware_loss(task, [], 0.5) is task


def test_efficiency_and_what_the_paper_claims() -> None:
    assert efficiency.compression_ratio(4) == 8
    assert [efficiency.size_reduction(b) for b in (4, 8, 12.8)] == pytest.approx([0.875, 0.75, 0.6])
    assert efficiency.speed_up(0.03, 0.02) == pytest.approx(1.5)
    n = {"a": 10, "b": 20}
    whole = efficiency.energy({"a": 4, "b": 6}, n)
    assert whole == efficiency.energy({"a": 4}, n) + efficiency.energy({"b": 6}, n) == 160
    four, six, eight = (efficiency.energy(dict.fromkeys(n, b), n) for b in (4, 6, 8))
    assert four < six < eight


# ---- fake quantization --------------------------------------------------------------------------


def test_gradients_pass_straight_through_and_stop_where_values_are_cut_off() -> None:
    x = torch.tensor([0.1, 5.0], requires_grad=True)
    q = torch.tensor([0.3, 1.0])
    out = straight_through(x, q)
    assert torch.equal(out, q) and torch.equal(*torch.autograd.grad(out.sum(), x), torch.ones(2))
    cut = straight_through(x, q, torch.tensor([True, False]))
    assert torch.autograd.grad(cut.sum(), x)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("step", [None, 0.05])
def test_rounded_activations_are_what_the_op_computes(step: float | None) -> None:
    from gammac.ir import Builder, TensorType, Value

    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    b = Builder()
    value = b.emit("fake_quantize", Value(TensorType("f32", (2, 3, 16)), "x"), bits=4,
                   **({} if step is None else {"scale": step}))  # fmt: skip
    assert value is not None
    assert torch.equal(round_activations(x, 4, step), run_op(b.ops[0], [x], {})[0])


@pytest.mark.parametrize("name", ["w2g32", "w4g32-sym", "w6g32", "w8channel", "nf4g32", "nf3g32-dq"])
def test_fake_weights_are_what_their_codes_stand_for(name: str) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    grid = HeldGrid(parse_format(name), "mse")
    grid.refresh(weight)
    fake = grid(weight)
    assert torch.equal(fake, grid.quantized(weight).dequantize())
    assert torch.autograd.grad(fake.sum(), weight)[0].mean() > 0.8
    # what lies on the grid comes back
    if isinstance(grid.format, IntegerFormat):
        again = grid.quantized(fake.detach())
        assert torch.equal(again.codes, grid.quantized(weight).codes)


# ---- the controller -----------------------------------------------------------------------------


def _layers(seed: int, count: int = 5) -> list[list[Level]]:
    random = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = [64 * (1 + i % 3) for i in range(count)]
    total = 8 * sum(sizes)
    return [
        [Level(f"w{b}g64", s * 4.0**-b, b * n / total, b * n) for b in (2, 3, 4, 6, 8)]
        for s, n in zip(random, sizes, strict=True)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_larger_lambda_never_gives_more_bits(seed: int) -> None:
    layers = _layers(seed)
    picks = [precision.by_trade_off(layers, trade) for trade in (0, 1e-4, 1e-3, 1e-2, 0.1, 1, 10)]
    bits = [precision.total_bits(layers, p) for p in picks]
    assert bits == sorted(bits, reverse=True) and bits[0] > bits[-1]


@pytest.mark.parametrize("seed", range(4))
def test_both_controllers_keep_the_budget_and_the_program_is_the_best_of_all(seed: int) -> None:
    layers = _layers(seed)
    sizes = sum(levels[0].bits // 2 for levels in layers)
    capacity = 4 * sizes
    bisected, trade = precision.by_bisection(layers, capacity)
    exact = precision.by_program(layers, capacity)

    def error(picks: tuple[int, ...]) -> float:
        return sum(levels[p].error for levels, p in zip(layers, picks, strict=True))

    every = itertools.product(range(5), repeat=len(layers))
    best = min(error(p) for p in every if precision.total_bits(layers, p) <= capacity)
    assert error(exact) == pytest.approx(best)
    assert precision.total_bits(layers, bisected) <= capacity
    assert best <= error(bisected) <= 4 * best
    # one bisection step less of λ would be too much
    assert precision.total_bits(layers, precision.by_trade_off(layers, trade * 0.99)) > capacity


@pytest.mark.parametrize("seed", range(4))
def test_what_lambda_leaves_over_is_filled_as_far_as_it_goes(seed: int) -> None:
    layers = _layers(seed)
    capacity = 4 * sum(levels[0].bits // 2 for levels in layers)
    picks, trade = precision.by_bisection(layers, capacity)
    room = capacity - precision.total_bits(layers, picks)
    wider = [levels[p + 1].bits - levels[p].bits for levels, p in zip(layers, picks, strict=True) if p < 4]
    assert 0 <= room < min(wider)
    assert all(p >= q for p, q in zip(picks, precision.by_trade_off(layers, trade), strict=True))


def test_a_budget_below_the_narrowest_formats_is_refused() -> None:
    for choose in (precision.by_bisection, precision.by_program):
        with pytest.raises(CompileError, match="too few"):
            choose(_layers(0), 10)


def test_a_layer_moves_by_one_level_and_only_for_a_gain() -> None:
    levels = [Level("a", 1.0, 0.1, 2), Level("b", 0.97, 0.1, 3), Level("c", 0.1, 0.1, 4)]
    assert precision.steadied([levels], (2,), (0,), 0.0) == (2,)  # would be worse
    assert precision.steadied([levels], (0,), (2,), 0.0) == (0,)  # 3 % is not worth a change
    assert precision.steadied([levels], (1,), (2,), 0.0) == (2,)
    falling = [Level("a", 1.0, 0, 2), Level("b", 0.5, 0, 3), Level("c", 0.1, 0, 4)]
    assert precision.steadied([falling], (0,), (2,), 0.0) == (1,)


def test_lambda_follows_the_trend_of_the_loss() -> None:
    assert precision.followed(1.0, 2.0, 1.9) > 1
    assert precision.followed(1.0, 2.0, 2.01) == 1
    assert precision.followed(1.0, 2.0, 2.1) < 1


def test_reversing_gives_the_least_sensitive_layer_the_greatest_sensitivity() -> None:
    layers = [[Level("w4g64", s * 0.5, 0, 4)] for s in (1.0, 4.0, 2.0)]
    turned = precision.reversed_errors(layers, [1.0, 4.0, 2.0])
    assert [levels[0].error for levels in turned] == [2.0, 0.5, 1.0]


# ---- training -----------------------------------------------------------------------------------


def _data(seed: int = 1) -> Data:
    """Texts in which each token says the next one, so that there is something to learn."""
    first = torch.randint(0, VOCAB, (64, 1), generator=torch.Generator().manual_seed(seed))
    return Data((first + torch.arange(16)) % VOCAB)


def _method(store: WeightStore | None = None, **options: Any) -> DsaQat:
    store = store or WeightStore()
    chosen = {"average_bits": 4, "formats": FORMATS, "table": "w8g32", "every": 4, **options}
    return DsaQat(llama(store), Context(load_target("reference"), store), DsaQatOptions(**chosen))


def test_training_lowers_the_quantized_loss_within_the_budget_and_settles() -> None:
    method = _method(average_bits=3.5)
    trainer = Trainer(method, _data(), Schedule(24 * 8 * 16, batch=8, rate=3e-3))
    history = trainer.run()
    smooth = list(smoothed_losses(history))
    assert smooth[-1] < smooth[0] - 0.05
    assert all(row["average_bits"] <= 3.5 + 1e-9 for row in history)
    assert not any(row["changed"] for row in history[-5:]), "widths are frozen in the last fifth"
    assert method.evaluate(_data()) < method.evaluate(_data(), quantized=False) + 0.5
    rounded = method.quantized()
    assert {n: q.format for n, q in rounded.items() if n in method.controller.names} == (
        method.controller.formats()
    )


def test_every_float_op_of_high_precision_sees_f32_and_stays_as_it_is() -> None:
    method = _method(activations="a4")
    seen: list[str] = []

    def watch(op: Any, operands: list[Tensor], results: tuple[Tensor, ...]) -> None:
        if op.name in HIGH_PRECISION:
            seen.append(op.name)
            assert all(t.dtype == torch.float32 for t in results)
            assert torch.equal(results[0], run_op(op, operands, {})[0])

    with torch.no_grad():
        method.graph.run(_data().tokens[:2], method._latent, method._read, watch)
    assert {"attention", "residual_add", "rms_norm"} <= set(seen)


def test_activations_take_part_and_static_steps_are_kept() -> None:
    for activations in ("a8tensor", "weights"):
        method = _method(activations=activations, gamma=0.1)
        history = Trainer(method, _data(), Schedule(4 * 8 * 16, batch=8)).run()
        assert all(row["noise"] > 0 for row in history)
        found = method.activations()
        assert found.keys() == set(method.controller.names)
        assert all(("scale" in how) == (activations == "a8tensor") for how in found.values())


def test_attentions_distortion_counts_only_if_it_is_asked_for() -> None:
    found = {}
    for kappa in (0.0, 0.5):
        method = _method(kappa=kappa)
        _, distortions = method.analyser.look(_data().batch(0, 8, 0))
        method.begin(_data().batch(0, 8, 0))
        layers = method.controller.layers({n: method.latents[n].detach() for n in method.controller.names})
        found[kappa] = distortions, sum(level.error for levels in layers for level in levels)
    assert not found[0.0][0] and found[0.5][1] > found[0.0][1]
    assert {n.split(".")[-2] for n in found[0.5][0]} == {"q", "k"}
    assert all(value > 0 for value in found[0.5][0].values())


def test_training_can_start_from_gptqs_codes() -> None:
    method, schedule = _method(start="gptq", average_bits=3.5), Schedule(4 * 8 * 16, batch=8)
    before = {n: method.latents[n].detach().clone() for n in method.controller.names}
    grams = gram_matrices(method.graph, (method.fixed | method.latents).__getitem__, _data().parts(8), before)
    method.prepare(_data(), schedule)
    method.begin(_data().batch(0, 8, 0))
    moved = 0
    for name, weight in before.items():
        format_ = method.grids[name].format
        gptq = Gptq().quantize(weight, grams[name], [format_])[0]
        found = method.grids[name].quantized(method.latents[name])
        torch.testing.assert_close(found.dequantize(), gptq.dequantize())
        moved += int((found.codes != Rtn().quantize(weight, None, [format_])[0].codes).sum())
    assert moved > 0, "GPTQ rounds other than to the nearest"


def test_rounding_can_start_late() -> None:
    method = _method(float_share=0.5, average_bits=3.5, activations="a8", gamma=0.1)
    history = Trainer(method, _data(), Schedule(12 * 8 * 16, batch=8, rate=3e-3)).run()
    assert [row["average_bits"] == 32 for row in history] == [True] * 5 + [False] * 7
    assert [row["noise"] > 0 for row in history] == [False] * 6 + [True] * 6


@pytest.mark.parametrize(
    "options", [{}, {"activations": "a8tensor"}, {"start": "gptq"}, {"float_share": 0.6, "start": "gptq"}]
)
def test_a_killed_run_goes_on_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    schedule = Schedule(12 * 4 * 16, batch=4, rate=3e-3, save_every=5)

    def trained(folder: Path | None) -> tuple[DsaQat, list[dict[str, Any]]]:
        method = _method(**options)
        return method, Trainer(method, _data(), schedule, folder).run()

    (whole, history), (resumed, again), steps = killed_and_resumed(trained, tmp_path, monkeypatch)
    assert steps == list(range(5, 12))
    assert json.dumps(again) == json.dumps(history)
    assert all(torch.equal(t, resumed.latents[n]) for n, t in whole.latents.items())
    assert resumed.activations() == whole.activations()
    assert all(torch.equal(q.codes, whole.quantized()[n].codes) for n, q in resumed.quantized().items())


# ---- from a folder to an artifact ---------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained folder, and the cache."""
    place = tmp_path_factory.mktemp("trained")
    transformers_llama().save_pretrained(place / "model")
    tokenizer().save_pretrained(place / "model")
    (place / "text").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    request = _request(place)
    finetune(make_training(request, place / "cache"), place / "out")
    return place, place / "cache"


def _request(place: Path, **options: Any) -> TrainRequest:
    chosen = {"average_bits": 4, "formats": FORMATS, "table": "w8g32", "every": 2, **options}
    schedule = Schedule(4 * 2 * 16, batch=2, rate=3e-3)
    return TrainRequest(str(place / "model"), DsaQatOptions(**chosen), schedule, place / "text", 16,
                        target="cpu-x86")  # fmt: skip


def test_the_artifact_has_the_trained_codes_and_predicts_what_the_trained_model_does(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    place, cache = trained
    plan = make_plan(Request(str(place / "out"), "cpu-x86", budget="4", calibration=place / "text"), cache)
    compiled = compile_model(plan, tmp_path / "artifact")
    codes = load_file(place / "out" / CODES)
    found = read_trained(place / "out")
    assert set(compiled.manifest.allocation.values()) == set(found.formats.values())
    for name, weight in compiled.module.weights.items():
        if name in found.formats:  # linears that were fused have other names
            stored = load_quantized(weight, plan.store)
            assert torch.equal(stored.codes, codes[f"{name}/codes"])
            assert torch.equal(stored.scales, codes[f"{name}/scales"])
    ids = torch.arange(2, 34)[None].numpy()
    training_graph = InterpreterSession(plan.module, plan.store).logits(ids)
    by_transformers = TransformersSession(place / "out").logits(ids)
    assert abs(training_graph - by_transformers).max() < 1e-4
    assert isinstance(compiled.check, Check)
    found_here = compiled.check.against_original
    assert isinstance(found_here, Comparison)
    # the loss, in nats, to half a percent: kernels of this target round what they read to int8
    assert math.log(found_here.ppl) == pytest.approx(math.log(found_here.ppl_reference), rel=0.005)


def test_what_training_decided_can_not_be_chosen_again(trained: tuple[Path, Path]) -> None:
    place, cache = trained
    request = Request(str(place / "out"), "cpu-x86", budget="4")
    with pytest.raises(CompileError, match="quantizer can't be chosen"):
        make_plan(replace(request, choices=replace(request.choices, quantizer="rtn")), cache)
    plan = make_plan(replace(request, budget="3", calibration=place / "text"), cache)
    with pytest.raises(CompileError, match="budget 3: it was trained at"):
        compile_model(plan, place / "never")
    assert not (place / "never").exists()


def test_weights_that_were_changed_after_training_are_refused(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    place, cache = trained
    shutil.copytree(place / "out", tmp_path / "changed")
    tensors = load_file(tmp_path / "changed" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(tensors, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    request = Request(str(tmp_path / "changed"), "cpu-x86", budget="4", calibration=place / "text")
    with pytest.raises(CompileError, match="other numbers") as caught:
        compile_model(make_plan(request, cache), tmp_path / "artifact")
    assert "up_proj" in str(caught.value)


def test_activations_that_no_kernel_runs_are_refused_before_training(trained: tuple[Path, Path]) -> None:
    place, cache = trained
    with pytest.raises(CompileError, match="6 bits are multiplied by weights with one scale a row"):
        make_training(_request(place, activations="a6"), cache)


def test_rounded_activations_come_along_into_the_artifact(trained: tuple[Path, Path], tmp_path: Path) -> None:
    place, cache = trained
    finetune(make_training(_request(place, activations="a8tensor"), cache), tmp_path / "out")
    plan = make_plan(
        Request(str(tmp_path / "out"), "cpu-x86", budget="4", calibration=place / "text"), cache
    )  # fmt: skip
    compiled = compile_model(plan, tmp_path / "artifact")
    ops = [op for f in compiled.module.functions.values() for op in f.ops if op.name == "fake_quantize"]
    scales = {how["scale"] for how in read_trained(tmp_path / "out").activations.values()}
    assert ops and {op.attrs["scale"] for op in ops} == scales


def test_the_command_trains_and_refuses_a_folder_that_is_there(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    place, cache = trained
    arguments = ["finetune", str(place / "model"), "--tokens", "32", "--length", "16", "--batch", "2",
                 "--formats", "w4g32", "--table-format", "w8g32", "--text", str(place / "text"),
                 "--cache", str(cache), "-o", str(tmp_path / "out")]  # fmt: skip
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0, first.output
    assert "14 × w4g32" in first.output
    figures = read_trained(tmp_path / "out").figures
    assert (figures["compression_ratio"], figures["size_reduction"], figures["energy"]) == (8, 0.875, 0.125)
    assert figures["predicted_speed_up"] > 0
    assert len((tmp_path / "out" / "history.csv").read_text().splitlines()) == 2
    second = CliRunner().invoke(main, arguments)
    assert second.exit_code == 1


def test_options_that_make_no_sense_are_refused() -> None:
    for option, message in (
        ({"controller": "magic"}, "no controller"), ({"average_bits": 0}, "average_bits"),
        ({"formats": "tcq2"}, "does not train tcq2"), ({"activations": "b8"}, "no activation format"),
    ):  # fmt: skip
        with pytest.raises(CompileError, match=message):
            DsaQatOptions(**option)  # type: ignore[arg-type]
