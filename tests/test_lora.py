"""Adapters on a quantized base: what learns, what stays, resume, and both ways into an artifact."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from llama_module import VOCAB, llama
from runtime_models import llama as transformers_llama
from runtime_models import tokenizer
from safetensors.torch import load_file
from training_runs import killed_and_resumed

from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.driver import Compiled, Request, calibration_of, compile_model, make_plan
from gammac.formats import Quantized, in_plain_scales, load_candidate, load_quantized, parse_format
from gammac.lora_training import finetune_lora
from gammac.passes import Choices
from gammac.passes.add_adapters import AddAdapters, adapter_names, with_adapters
from gammac.passes.candidates import Candidates
from gammac.passes.training.adapters import ADAPTERS, Adapters, read_adapters, write_adapters
from gammac.passes.training.lora import Lora
from gammac.passes.training.lora_options import LoraOptions, runs
from gammac.passes.training.trained import CODES, read_trained
from gammac.passes.training.trainer import Data, Schedule, Trainer, smoothed_losses
from gammac.pipeline import Context
from gammac.runtime.check import Check
from gammac.runtime.evaluate import Comparison
from gammac.runtime.session import open_session
from gammac.targets.target import load_target
from gammac.targets.tvm.toolchain import find_linker
from gammac.training import TrainRequest, make_training
from gammac.weights import WeightStore, digest_of


def _data(seed: int = 1) -> Data:
    """Texts in which each token says the next one, so that there is something to learn."""
    first = torch.randint(0, VOCAB, (64, 1), generator=torch.Generator().manual_seed(seed))
    return Data((first + torch.arange(16)) % VOCAB)


def _method(**options: Any) -> Lora:
    store = WeightStore()
    module, ctx = llama(store), Context(load_target("reference"), store)
    chosen = LoraOptions(**{"format": "nf3g32-dq", "table": "w8g32", "rank": 4, **options})
    done = Candidates(chosen.base.name, chosen.table, chosen.quantizer_for(chosen.base)).run(module, ctx)
    base = {}
    for name, weight in done.weights.items():
        if "role" in weight.attrs:
            format_ = chosen.base.name if weight.attrs["role"] == "block" else chosen.table
            base[name] = load_candidate(weight, format_, store)
    return Lora(module, ctx, chosen, base)


def _loss_at(method: Lora, step: int) -> float:
    return float(method.loss(_data(), step)[0].detach())


# ---- training -----------------------------------------------------------------------------------


def test_adapters_add_nothing_at_first_and_training_moves_them_alone() -> None:
    method = _method()
    base = {n: digest_of(q.parts) for n, q in method.base.items()}
    fixed = {n: t.clone() for n, t in method.fixed.items()}
    first = method.evaluate(_data())
    assert first == pytest.approx(method.evaluate(_data(), method.fixed.__getitem__), abs=1e-6)
    history = Trainer(method, _data(), Schedule(24 * 8 * 16, batch=8, rate=3e-3)).run()
    smooth = list(smoothed_losses(history))
    assert smooth[-1] < smooth[0] - 0.05
    assert method.evaluate(_data()) < first - 0.1
    assert {n: digest_of(q.parts) for n, q in method.base.items()} == base
    assert all(torch.equal(t, fixed[n]) for n, t in method.fixed.items())


def test_every_block_linear_has_an_adapter_and_the_graph_adds_what_merging_adds() -> None:
    method = _method()
    Trainer(method, _data(), Schedule(6 * 8 * 16, batch=8, rate=3e-3)).run()
    assert len(method.names) == 14 and all("/b" in n or "/a" in n for n in method.parameters())
    merged = {**method.fixed, **{n: method.merged(n) for n in method.names}}
    with torch.no_grad():
        beside = method.graph.run(_data().tokens, method.weights())
        added = method.plain.run(_data().tokens, merged.__getitem__)
    assert (beside - added).abs().max() < 1e-4
    assert method.kl(_data(), None, merged.__getitem__) < 1e-6
    assert method.kl(_data(), None, method.fixed.__getitem__) > 1e-3


def test_dropout_changes_what_adapters_read_and_nothing_else() -> None:
    method = _method(dropout=0.5)
    one, again = (_loss_at(method, 3) for _ in range(2))
    # b is zero: whatever a reads, nothing is added
    assert one == again == _loss_at(_method(), 3)
    with torch.no_grad():
        for name, parameter in method.learnt.items():
            parameter.fill_(0.01) if name.endswith("/b") else parameter
    losses = [_loss_at(method, step) for step in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_a_killed_run_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(12 * 4 * 16, batch=4, rate=3e-3, save_every=5)

    def trained(folder: Path | None) -> tuple[Lora, list[dict[str, Any]]]:
        method = _method(dropout=0.1)
        return method, Trainer(method, _data(), schedule, folder).run()

    (whole, history), (resumed, again), steps = killed_and_resumed(trained, tmp_path, monkeypatch)
    assert steps == list(range(5, 12))
    assert json.dumps(again) == json.dumps(history)
    write_adapters(tmp_path / "whole", whole.adapters())
    write_adapters(tmp_path / "resumed", resumed.adapters())
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()


# ---- the file, and what does not fit ------------------------------------------------------------


def test_adapters_survive_their_file_and_damage_is_named(tmp_path: Path) -> None:
    method = _method()
    path = tmp_path / ADAPTERS
    write_adapters(path, method.adapters())
    found = read_adapters(path)
    assert (found.method, found.base) == ("qlora", method.adapters().base)
    for name, pair in method.adapters().factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, found.factors[name], strict=True))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CompileError, match="can't be read as adapters"):
        read_adapters(path)


def test_factors_of_other_shapes_are_refused() -> None:
    store = WeightStore()
    module = llama(store)
    name = "layers.0.up.weight"
    rows, columns = module.weights[name].type.shape
    assert isinstance(rows, int) and isinstance(columns, int)
    for pair in (
        (torch.zeros(2, columns + 1), torch.zeros(rows, 2)),
        (torch.zeros(2, columns), torch.zeros(rows, 3)),
    ):
        with pytest.raises(CompileError) as caught:
            with_adapters(module, {name: pair}, store)
        assert name in str(caught.value)
    with pytest.raises(CompileError, match="another model"):
        with_adapters(module, {"nowhere": (torch.zeros(1, 1), torch.zeros(1, 1))}, store)


def test_options_that_make_no_sense_are_refused() -> None:
    for option, message in (
        ({"method": "magic"}, "no method"), ({"rank": 0}, "rank"), ({"dropout": 1.0}, "dropout"),
        ({"format": "w2g64+w4g64"}, "one format"), ({"merge_format": "w4g64"}, "without --merge"),
        ({"format": "w4g64", "quantizer": "nf"}, "does not write"),
    ):  # fmt: skip
        with pytest.raises(CompileError, match=message):
            LoraOptions(**option)  # type: ignore[arg-type]


def test_the_quantizer_follows_the_format() -> None:
    options = LoraOptions()
    names = ("nf4g64-dq", "w4g64", "tcq2", "pb1.7g128")
    assert [options.quantizer_for(parse_format(n)) for n in names] == ["nf", "gptq", "tcq", "pb_llm"]
    assert LoraOptions(format="w4g64", quantizer="rtn").quantizer_for(parse_format("w3g64")) == "rtn"


# ---- from a folder to an artifact ---------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a folder of adapters on a base in 4 bits."""
    place = tmp_path_factory.mktemp("lora")
    transformers_llama().save_pretrained(place / "model")
    tokenizer().save_pretrained(place / "model")
    (place / "text").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    _finetune(place, "out")
    return place


@pytest.fixture(scope="module")
def compiled(place: Path) -> Compiled:
    """The artifact of that folder."""
    return _compile(place, "out", place / "artifact")


@pytest.fixture(scope="module")
def other(place: Path) -> Path:
    """Other adapters on the same base."""
    _finetune(place, "other", seed=1)
    assert (place / "out" / CODES).read_bytes() == (place / "other" / CODES).read_bytes()
    return place / "other" / ADAPTERS


def _options(**options: Any) -> LoraOptions:
    return LoraOptions(**{"format": "w4g32", "table": "w8g32", "rank": 2, **options})


def _request(
    place: Path, seed: int = 0, target: str = "cpu-x86", backend: str = "", **options: Any
) -> TrainRequest:
    schedule = Schedule(8 * 2 * 16, batch=2, rate=1e-2, seed=seed)
    return TrainRequest(
        str(place / "model"), _options(**options), schedule, place / "text", 16, target=target,
        backend=backend,
    )  # fmt: skip


def _finetune(place: Path, name: str, **options: Any) -> dict[str, Any]:
    training = make_training(_request(place, **options), place / "cache")
    return dict(finetune_lora(training, place / name, place / "cache").trained.figures)


def _compile(
    place: Path, name: str, out: Path, adapters: str = "", target: str = "cpu-x86", backend: str = ""
) -> Compiled:
    request = Request(
        str(place / name), target, budget="4", choices=Choices(adapters=adapters),
        calibration=place / "text", backend=backend,
    )  # fmt: skip
    return compile_model(make_plan(request, place / "cache"), out)


def _loss(compiled: Compiled) -> float:
    """Of the artifact on a window of the calibration text, in nats."""
    return math.log(_comparison(compiled).ppl)


def _comparison(compiled: Compiled) -> Comparison:
    assert isinstance(compiled.check, Check)
    found = compiled.check.against_original
    assert isinstance(found, Comparison)
    return found


def _loss_of_training(place: Path, file: Path) -> float:
    """The training graph's with adapters from a file, on the window that a compile checks with."""
    training = make_training(_request(place), place / "cache")
    trained = read_trained(place / "out")
    parts: dict[str, dict[str, Any]] = {}
    for key, tensor in load_file(place / "out" / CODES).items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = tensor
    base = {n: Quantized(parse_format(f), parts[n]) for n, f in trained.formats.items()}
    method = Lora(training.module, training.ctx, _options(), base)
    with torch.no_grad():
        for name, (a, b) in read_adapters(file).factors.items():
            method.learnt[f"{name}/a"].copy_(a)
            method.learnt[f"{name}/b"].copy_(b / 8)  # alpha / rank
    request = Request(str(place / "out"), "cpu-x86", "4", calibration=place / "text")
    calibration = calibration_of(make_plan(request, place / "cache"))
    assert calibration is not None
    return method.evaluate(Data(calibration.tokens[:1]))


def test_the_artifact_has_the_base_and_its_adapters_and_predicts_what_was_trained(
    place: Path, compiled: Compiled
) -> None:
    trained = _loss_of_training(place, place / "out" / ADAPTERS)
    assert _loss(compiled) == pytest.approx(trained, rel=0.005)
    # what it is compared with has the adapters, too
    assert math.log(_comparison(compiled).ppl_reference) == pytest.approx(trained, rel=1e-4)
    adapters = [w for w in compiled.module.weights.values() if "adapter" in w.attrs]
    assert adapters and not any("stored" in w.attrs for w in adapters)
    codes = load_file(place / "out" / CODES)
    store = WeightStore(place / "cache" / "weights")
    alone = [n for n in compiled.module.weights if f"{n}/codes" in codes]
    assert len(alone) >= 4
    for name in alone:
        found = load_quantized(compiled.module.weights[name], store)
        assert torch.equal(found.codes, codes[f"{name}/codes"])
    # adapters are counted: r (in + out) f32 for each linear beside what the codes take
    factors = read_adapters(place / "out" / ADAPTERS).factors
    weights = sum(b.shape[0] * a.shape[1] for a, b in factors.values())
    more = 32 * sum(a.numel() + b.numel() for a, b in factors.values()) / weights
    figures = read_trained(place / "out").figures
    assert figures["adapter_bits"] == pytest.approx(more)
    bare = sum(
        parse_format("w4g32").storage_bits(b.shape[0], a.shape[1]) for a, b in factors.values()
    ) / weights  # fmt: skip
    assert figures["true_bits"] == pytest.approx(bare + more) == compiled.manifest.true_bits
    assert set(compiled.manifest.not_quantized.values()) == {"of a low-rank adapter"}


def test_adapters_of_the_same_base_are_swapped_and_those_of_another_refused(
    place: Path, tmp_path: Path, compiled: Compiled, other: Path
) -> None:
    swapped = _compile(place, "out", tmp_path / "swapped", str(other))
    own = _compile(place, "other", tmp_path / "own")
    assert (tmp_path / "swapped" / "model.onnx.data").read_bytes() == (
        tmp_path / "own" / "model.onnx.data"
    ).read_bytes()
    assert _loss(swapped) == _loss(own) != _loss(compiled)
    found = read_adapters(other)
    write_adapters(tmp_path / "foreign", Adapters(found.method, "0" * 64, found.factors))
    with pytest.raises(CompileError, match="another base"):
        _compile(place, "out", tmp_path / "never", str(tmp_path / "foreign"))
    with pytest.raises(CompileError, match="no folder of a training"):
        _compile(place, "model", tmp_path / "never", str(other))


@pytest.mark.parametrize("backend", ["onnx", "tvm"])
def test_an_artifact_runs_with_other_adapters_of_its_base(
    backend: str, place: Path, tmp_path: Path, compiled: Compiled, other: Path
) -> None:
    if backend == "tvm":
        demand_tvm()
    kept = compiled if backend == "onnx" else _compile(place, "out", tmp_path / "kept", backend=backend)
    assert kept.manifest.emitter == backend and kept.manifest.true_bits == compiled.manifest.true_bits
    # as good as ONNX's, whose int8 has other groups
    assert _loss(kept) == pytest.approx(_loss(compiled), rel=0.005)
    compiled_in = _compile(place, "other", tmp_path / "own", backend=backend)
    tokens = np.arange(12)[None] % 40 + 3
    logits = [
        open_session(folder, 1, adapters=file).logits(tokens)
        for folder, file in ((kept.folder, other), (compiled_in.folder, None), (kept.folder, None))
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 1e-3


def demand_tvm() -> None:
    pytest.importorskip("tvm", reason="needs the extra tvm")
    if find_linker() is None:
        pytest.skip("nothing links a shared library")


def test_adapters_that_do_not_fit_an_artifact_are_refused(
    place: Path, tmp_path: Path, compiled: Compiled, other: Path
) -> None:
    found = read_adapters(other)

    def refused(factors: dict[str, Any], said: str, base: str = found.base) -> None:
        write_adapters(tmp_path / "file", Adapters(found.method, base, factors))
        run = ["run", str(compiled.folder), "--prompt", "The", "--adapters", str(tmp_path / "file")]
        done = CliRunner().invoke(main, run)
        assert done.exit_code == 1 and said in done.output, done.output

    factors = dict(found.factors)
    refused(factors, "trained on another base", "0" * 64)
    refused({n: (a[:1], b[:, :1]) for n, (a, b) in factors.items()}, "another rank")
    name, pair = factors.popitem()
    refused(factors, f"lacks {name}/a")
    refused(
        {**factors, name: pair, "elsewhere": (pair[0].clone(), pair[1].clone())},
        "has, and the artifact has not, elsewhere/a",
    )
    bare = _without_adapters(compiled.folder, tmp_path / "bare")
    done = CliRunner().invoke(main, ["run", str(bare), "--prompt", "The", "--adapters", str(other)])
    assert done.exit_code == 1 and "has no adapters that others could stand for" in done.output


def _without_adapters(folder: Path, to: Path) -> Path:
    """An artifact whose manifest speaks of none."""
    shutil.copytree(folder, to)
    said = json.loads((to / "manifest.json").read_text())
    (to / "manifest.json").write_text(json.dumps({**said, "adapters": {}, "adapter_base": ""}))
    return to


def test_merged_weights_are_quantized_again_and_the_cost_is_told(place: Path, tmp_path: Path) -> None:
    figures = _finetune(place, "merged", merge=True, format="nf4g32", merge_format="w4g32", quantizer="nf")
    assert not (place / "merged" / ADAPTERS).exists()
    assert set(read_trained(place / "merged").formats.values()) == {"w4g32", "w8g32"}
    assert figures["merge_kl"] > 0 and figures["adapter_bits"] == 0
    assert figures["held_out_loss_quantized"] != figures["held_out_loss_beside"]
    compiled = _compile(place, "merged", tmp_path / "artifact")
    assert not [w for w in compiled.module.weights.values() if "adapter" in w.attrs]


def test_what_no_kernel_runs_is_refused_before_training(place: Path) -> None:
    for target, options, message in (
        ("cpu-x86", {"format": "nf4g32-dq"}, "does not run nf4g32-dq"),
        ("cpu-x86", {"format": "nf4g32", "merge": True, "merge_format": "nf3g32"}, "does not run nf3g32"),
    ):
        with pytest.raises(CompileError, match=message):
            make_training(_request(place, target=target, **options), place / "cache")
    demand_tvm()
    refused = {"cpu-x86": "nf4g32-icq"}
    if find_linker("armv7l"):  # without one, that is what is said first
        refused["edge-armv7-rpi2"] = "nf4g32-dq"
    for target, format_ in refused.items():
        with pytest.raises(CompileError, match=f"does not run {format_}"):
            make_training(_request(place, target=target, backend="tvm", format=format_), place / "cache")
    make_training(_request(place, target="cuda", backend="tvm", format="nf4g32-dq"), place / "cache")


@pytest.mark.parametrize("trained", ["nf4g32-dq", "nf4g32-icq"])
def test_tvm_runs_a_doubly_quantized_base_with_plain_scales(
    trained: str, place: Path, tmp_path: Path
) -> None:
    demand_tvm()
    if not runs(parse_format("nf4g32"), load_target("cpu", "tvm"), True):
        pytest.skip("this processor looks no bytes up")
    figures = _finetune(place, trained, target="cpu", backend="tvm", format=trained)
    assert set(read_trained(place / trained).formats.values()) == {trained, "w8g32"}
    compiled = _compile(place, trained, tmp_path / "artifact", target="cpu", backend="tvm")
    plain = in_plain_scales(parse_format(trained))
    assert plain is not None and set(compiled.manifest.allocation.values()) == {plain.name, "w8g32"}
    # what is counted is what is stored
    bits = plain.storage_bits(64, 64) / 64**2 + figures["adapter_bits"]
    assert compiled.manifest.true_bits == pytest.approx(bits) and bits > figures["true_bits"] + 0.1
    assert f"{trained} is stored with f16 scales: tvm reads no others" in compiled.notes
    # and what is computed is what was trained
    comparison = _comparison(compiled)
    assert math.log(comparison.ppl) == pytest.approx(math.log(comparison.ppl_reference), rel=0.005)
    store = WeightStore(place / "cache" / "weights")
    for name, weight in compiled.module.weights.items():
        if weight.attrs.get("trained_as"):
            kept = load_quantized(weight, store).dequantize()
            before = load_file(place / trained / "model.safetensors")[name]
            assert 0 < (kept - before).abs().max() < 1e-3 * before.abs().max()


def test_the_command_trains_and_refuses_options_of_the_other_method(place: Path, tmp_path: Path) -> None:
    arguments = ["finetune", str(place / "model"), "--method", "qlora", "--tokens", "64", "--length", "16",
                 "--batch", "2", "--formats", "w4g32", "--table-format", "w8g32", "--rank", "2", "--text",
                 str(place / "text"), "--cache", str(place / "cache"), "-o",
                 str(tmp_path / "out")]  # fmt: skip
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "qlora: 64 tokens" in done.output and "for adapters" in done.output
    assert len((tmp_path / "out" / "history.csv").read_text().splitlines()) == 3
    refused = CliRunner().invoke(main, [*arguments[:-1], str(tmp_path / "two"), "--average-bits", "3"])
    assert refused.exit_code == 1 and "--average-bits: qlora has no such option" in refused.output
    refused = CliRunner().invoke(
        main, ["finetune", "tiny", "--rank", "4", "-o", str(tmp_path / "three")]
    )  # fmt: skip
    assert refused.exit_code == 1 and "--rank: dsa-qat has no such option" in refused.output


def test_the_pass_wants_codes() -> None:
    store = WeightStore()
    names = adapter_names("layers.0.up.weight")
    assert names == ("layers.0.up.lora_a.weight", "layers.0.up.lora_b.weight")
    with pytest.raises(CompileError, match="can't be read as adapters"):
        AddAdapters("nowhere").run(llama(store), Context(load_target("reference"), store))
