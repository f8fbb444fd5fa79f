"""Sweeps: rows that keep their budgets, nothing done twice, files that come out the same."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from llama_module import VOCAB, llama

from gammac import plots, sweep
from gammac.cache import PassCache
from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.driver import Request
from gammac.formats import parse_format
from gammac.ir import Module
from gammac.models_zoo.fetch import fetch
from gammac.passes import Choices, default_pipeline
from gammac.passes.candidates import Candidates
from gammac.passes.sensitivity import STRATEGIES, WeightMse
from gammac.pipeline import Context
from gammac.runtime.evaluate import perplexity, windows_for
from gammac.runtime.generate import load_tokenizer
from gammac.runtime.reference import TransformersSession, load_model
from gammac.sweep import FULL, Row, Seconds, Sweep, SweepRequest, run_sweep, try_all, up_to_allocation
from gammac.sweep_report import grids, to_csv, to_json, to_markdown
from gammac.targets.target import load_target
from gammac.trials import Trial, run_trials
from gammac.weights import WeightStore

TINY = fetch("tiny")
QUICK = ["--calibration-windows", "4", "--calibration-length", "128", "--quantizer", "rtn"]
ASKED = ["--strategies", "fisher,weight_mse", "--budgets", "2.5,3,2.5MB", "--windows", "2", *QUICK]

Gammac = Callable[..., Result]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((Path(TINY).parent / "calibration.txt").read_text()[:20_000])
    return path


@pytest.fixture
def gammac(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Gammac:
    """Run the command line; no exception but an exit may come out of it."""
    monkeypatch.setenv("GAMMAC_CACHE", str(cache))

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path, text: Path) -> Path:
    """`tiny` by two strategies at three budgets."""
    out = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAMMAC_CACHE", str(cache))
        result = CliRunner().invoke(main, ["sweep", "tiny", *ASKED, "--text", str(text), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "Perplexity" in result.stdout and "in full precision" in result.stdout
    return out


def rows_in(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["rows"]
    return found


# ---- the command --------------------------------------------------------------------------------


def test_rows_keep_their_budgets(swept: Path) -> None:
    found = json.loads((swept / "sweep.json").read_text())
    rows, parameters = found["rows"], found["parameters"]
    assert [(r["strategy"], r["budget"]) for r in rows] == [
        (s, b) for s in ("fisher", "weight_mse") for b in ("2.5", "3", "2.5MB")
    ]
    for row in rows:
        bits = sum(n * parse_format(row["assignment"][name]).bits for name, n in parameters.items())
        assert row["payload_bits"] == pytest.approx(bits / sum(parameters.values()), abs=1e-6)
        if row["budget"] == "2.5MB":
            assert row["bytes"] < 2_500_000, "the tokenizer and the graph have their share"
        else:
            assert float(row["budget"]) - 0.2 < row["payload_bits"] <= float(row["budget"])
        assert row["seconds"]["scoring"] >= 0 and row["seconds"]["allocation"] >= 0
    assert all(r["seconds"]["scoring"] == rows[0]["seconds"]["scoring"] for r in rows[:3]), "one scoring run"


def test_more_bits_are_nearer(swept: Path) -> None:
    by = {(r["strategy"], r["budget"]): r for r in rows_in(swept)}
    for strategy in ("fisher", "weight_mse"):
        assert by[strategy, "3"]["kl"] < by[strategy, "2.5"]["kl"]
        assert 0 < by[strategy, "2.5"]["top1"] < by[strategy, "3"]["top1"] < 1


def test_full_precision_is_the_model_itself(swept: Path, text: Path) -> None:
    full = json.loads((swept / "sweep.json").read_text())["full"]
    session = TransformersSession(load_model(Path(TINY)))
    expected = perplexity(session, windows_for(text, load_tokenizer(Path(TINY)), 2))
    assert full["ppl"] == pytest.approx(expected.ppl, rel=1e-4)
    assert full["kl"] == pytest.approx(0, abs=1e-6) and full["top1"] == 1
    assert full["payload_bits"] == 32


def test_a_second_sweep_tries_nothing_and_writes_the_same(
    gammac: Gammac, swept: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "run_trials", lambda *_: pytest.fail("tried again"))
    for kind in STRATEGIES.values():
        monkeypatch.setattr(kind, "run", lambda *_: pytest.fail("scored again"))
    result = gammac("sweep", "tiny", *ASKED, "--text", text, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in swept.iterdir())
    assert names == sorted(p.name for p in tmp_path.iterdir())
    assert {"sweep.json", "sweep.md", "sweep.csv", "perplexity.svg", "kl.png", "shares.svg"} <= set(names)
    assert {"bits-fisher.png", "bits-weight_mse.svg"} <= set(names)
    for name in names:
        assert (tmp_path / name).read_bytes() == (swept / name).read_bytes(), name


def test_a_killed_sweep_goes_on_behind_its_last_trials(
    cache: Path, text: Path, swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def dying(module: Any, store: Any, tokens: Any, assignments: Sequence[Any], *rest: Any) -> list[Trial]:
        if tried:
            raise KeyboardInterrupt
        tried.append(len(assignments))
        return run_trials(module, store, tokens, assignments)

    request = Request("tiny", calibration_windows=4, calibration_length=128, choices=Choices(quantizer="rtn"))
    wish = SweepRequest(request, ("weight_mse",), ("2.5", "2.75", "3"), text=text, windows=1)
    monkeypatch.setattr(sweep, "GROUP", 2)
    monkeypatch.setattr(sweep, "run_trials", dying)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(wish, cache)
    assert tried == [2]
    tried.clear()
    found = run_sweep(wish, cache)
    assert tried == [2], "full precision and three budgets, of which two rows were done"
    assert len(found.rows) == 3 and found.text == "text.txt" and found.windows == (1, 1024)


def test_only_strategies_that_read_the_seed_run_for_each(cache: Path, swept: Path) -> None:
    request = Request("tiny", calibration_windows=4, calibration_length=128, choices=Choices(quantizer="rtn"))
    wish = SweepRequest(request, ("weight_mse", "random"), ("2.5",), seeds=(0, 7), windows=1)
    found = run_sweep(wish, cache)
    assert [(r.strategy, r.seed) for r in found.rows] == [("weight_mse", None), ("random", 0), ("random", 7)]
    assert found.rows[1].assignment != found.rows[2].assignment
    assert found.text == "the calibration text" and "give --text FILE" in to_markdown(found)


def test_each_seed_is_tried_on_weights_that_it_turned(cache: Path, swept: Path) -> None:
    """A random rotation reads the seed, so that candidates differ: the last seed's serve no other."""
    choices = Choices(quantizer="rtn", incoherence="hadamard")
    request = Request("tiny", calibration_windows=4, calibration_length=128, choices=choices, backend="tvm")
    alone = [
        run_sweep(SweepRequest(replace(request, seed=s), ("weight_mse",), ("2.5",), (s,), windows=1), cache)
        for s in (0, 7)
    ]
    found = run_sweep(SweepRequest(request, ("weight_mse",), ("2.5",), (0, 7), windows=1), cache)
    assert [r.seed for r in found.rows] == [0, 7] and found.rows[0].kl != found.rows[1].kl
    assert [(r.kl, r.assignment) for r in found.rows] == [(s.rows[0].kl, s.rows[0].assignment) for s in alone]


def test_a_strategy_that_reads_the_budget_scores_for_each(
    cache: Path, swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    run = WeightMse.run

    def counting(self: WeightMse, module: Module, ctx: Context) -> Module:
        scored.append(str(ctx.budgets[0]))
        return run(self, module, ctx)

    monkeypatch.setattr(WeightMse, "run", counting)
    monkeypatch.setattr(WeightMse, "reads", ("budget", "seed"))
    request = Request("tiny", calibration_windows=4, calibration_length=128, choices=Choices(quantizer="rtn"))
    run_sweep(SweepRequest(request, ("weight_mse",), ("2.5", "3"), seeds=(3,), windows=1), cache)
    assert scored == ["2.5", "3"]
    monkeypatch.setattr(WeightMse, "reads", ("seed",))
    run_sweep(SweepRequest(request, ("weight_mse",), ("2.5", "3"), seeds=(4,), windows=1), cache)
    assert scored == ["2.5", "3", "2.5"], "one scoring run for every budget"


def test_without_matplotlib_everything_else_is_written(
    gammac: Gammac, swept: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = gammac("sweep", "tiny", *ASKED, "--text", text, "-o", tmp_path)
    assert result.exit_code == 0 and "pip install 'gammac[plots]'" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sweep.csv", "sweep.json", "sweep.md"]


def test_the_cut_is_before_quantize() -> None:
    names = [p.name for p in up_to_allocation(default_pipeline(Choices(), "onnx", compiler=True))]
    assert "allocate" in names and "quantize" not in names and "legalize_onnx" not in names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategies", "fisher,gama"], ["no strategy 'gama'", "fisher"]),
        (["--strategies", ","], ["empty list"]),
        (["--budgets", "2.5,lots"], ["'lots' is no budget"]),
        (["--budgets", "3,1.5"], ["the smallest possible is 2.000 payload bits"]),
        (["--seeds", "0,x"], ["'x' is no seed", "--seeds 0,1,2"]),
        (["--seeds", "²"], ["'²' is no seed"]),
        (["--text", "nowhere.txt"], ["nowhere.txt can't be read"]),
        (["--target", "tpu"], ["no target 'tpu'"]),
    ],
)
def test_mistakes_are_found_before_the_work(
    gammac: Gammac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: list[str]
) -> None:
    monkeypatch.setattr(sweep, "_allocate_all", lambda *_: pytest.fail("too late"))
    result = gammac("sweep", "tiny", "-o", tmp_path / "out", *QUICK, *arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output
    for part in said:
        assert part in result.stderr, result.stderr


def test_an_output_folder_that_can_t_be(gammac: Gammac, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = gammac("sweep", "tiny", "-o", tmp_path / "file" / "out")
    assert result.exit_code == 1 and "can't be written" in result.stderr


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=2048, max_position_embeddings=128, **sizes)).save_pretrained(
        tmp_path
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY) / name, tmp_path / name)
    wish = SweepRequest(Request(str(tmp_path)), ("fisher",), ("3",))
    with pytest.raises(CompileError, match="is an encoder: a sweep compares predictions of the next token"):
        run_sweep(wish, tmp_path / "cache")


# ---- trials that are known ----------------------------------------------------------------------


def test_a_damaged_record_is_tried_again(tmp_path: Path) -> None:
    module, ctx, tokens = candidates_of_a_small_llama(tmp_path)
    assignments = [{}, {"layers.0.q.weight": "w2g32"}, {}]
    first = try_all(module, ctx, tokens, assignments)
    assert first[0] == first[2] != first[1]
    for path in (tmp_path / "cache" / "records").rglob("*.json"):
        path.write_text("{")
    assert try_all(module, ctx, tokens, assignments) == first


def test_other_words_and_other_codes_are_other_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ctx, tokens = candidates_of_a_small_llama(tmp_path)
    seen: list[int] = []
    monkeypatch.setattr(sweep, "run_trials", lambda m, s, t, a, *_: seen.append(1) or run_trials(m, s, t, a))
    assignment = {"layers.0.q.weight": "w2g32"}
    try_all(module, ctx, tokens, [assignment])
    scored = module.with_weights(module.weights["layers.0.q.weight"].with_attrs(scores={"w2g32": 1.0}))
    try_all(scored, ctx, tokens, [assignment])
    assert len(seen) == 1, "scores change nothing that is run"
    try_all(module, ctx, tokens + 1, [assignment])
    weight = module.weights["layers.0.q.weight"]
    candidates: Any = weight.attrs["candidates"]
    swapped = module.with_weights(weight.with_attrs(candidates={"w2g32": candidates["w4g32"]}))
    try_all(swapped, ctx, tokens, [assignment])
    assert len(seen) == 3


def candidates_of_a_small_llama(folder: Path) -> tuple[Module, Context, torch.Tensor]:
    store = WeightStore(folder / "weights")
    ctx = Context(load_target("cpu-x86"), store, cache=PassCache(folder / "cache"))
    module = Candidates("w2g32+w4g32", "w8g64", quantizer="rtn").run(llama(store), ctx)
    return module, ctx, torch.randint(0, VOCAB - 1, (2, 24), generator=torch.Generator().manual_seed(0))


# ---- tables and plots, from rows made by hand ---------------------------------------------------


def by_hand(strategies: tuple[str, ...] = ("gamma{steps=3}", "random")) -> Sweep:
    """Two blocks of two linears, one of them cut into parts; two seeds of the last strategy."""
    parameters = {
        f"layers.{i}.{p}": 64 for i in (0, 1) for p in ("q.weight", "up.weight.part0", "up.weight.part1")
    }
    rows = []
    for s, strategy in enumerate(strategies):
        for seed in (0, 1) if strategy == "random" else (None,):
            for bits in (2, 4):
                assignment = dict.fromkeys(parameters, f"w{bits}g64") | {"layers.0.q.weight": "w4g64"}
                kl = 1.0 / bits + 0.1 * s + 0.05 * (seed or 0)
                rows.append(
                    Row(strategy, str(bits), seed, bits, bits + 0.3, 10**6 * bits, 1e-3, kl, 20 + kl, 0.9,
                        Seconds(1.0, 2.0, None if s else 0.5), assignment)
                )  # fmt: skip
    full = Row(FULL, "", None, 32, 32, 10**7, 2e-3, 0.0, 19.5, 1.0)
    return Sweep("m", "cpu", "text.txt", (4, 1024), {}, parameters, full, tuple(rows))


def test_the_best_of_a_budget_is_bold() -> None:
    perplexity_, kl = list(grids(by_hand()))[:2]
    assert perplexity_.head == ("strategy", "2", "4")
    assert perplexity_.best == kl.best == {(0, 1), (0, 2)}
    assert kl.rows[1][1] == "0.6250 ± 0.035"
    assert "| gamma{steps=3} | **0.5000** | **0.2500** |" in kl.to_markdown()


def test_unknown_seconds_are_not_zero() -> None:
    costs = list(grids(by_hand()))[-1]
    assert costs.rows == (("gamma{steps=3}", "1.0", "2.0", "0.5", "3.5"), ("random", "1.0", "2.0", "–", "–"))
    lines = to_csv(by_hand()).splitlines()
    assert lines[0].startswith("strategy,budget,seed,") and lines[0].endswith(
        "allocation_seconds,total_seconds"
    )
    assert lines[1].startswith("full precision,,,32,") and lines[-1].endswith("1.0,2.0,,")
    assert json.loads(to_json(by_hand()))["rows"][0]["assignment"]["layers.0.q.weight"] == "w4g64"


def test_plots_are_the_same_every_time(tmp_path: Path) -> None:
    first, again = (plots.draw(by_hand(), tmp_path / name) for name in "ab")
    assert [p.name for p in first] == [
        f"{name}.{kind}"
        for name in ("perplexity", "kl", "shares", "bits-gamma-steps-3", "bits-random")
        for kind in ("png", "svg")
    ]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert first[0].read_bytes().startswith(b"\x89PNG")
    svg = first[1].read_text()
    assert "matplotlib.org/" not in svg and "<dc:date>" not in svg


def test_widths_count_parameters() -> None:
    sweep_ = by_hand(("fisher",))
    assert plots.widths(sweep_, sweep_.rows[0]) == {2: 320, 4: 64}
    assert plots.widths(sweep_, sweep_.rows[1]) == {4: 384}
