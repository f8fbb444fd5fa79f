"""Studies: rows are data, done once, kept when they fail; figures are those of the rest of gammac."""

import csv
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from llama_module import llama

from gammac.cli import main
from gammac.cli import study as cli
from gammac.diagnostics import CompileError
from gammac.driver import Plan, Request
from gammac.formats import candidates_of, parse_format
from gammac.ir import Module
from gammac.models_zoo.fetch import fetch
from gammac.passes import Choices
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.quantize import stored_as
from gammac.passes.quantizers import QUANTIZERS
from gammac.pipeline import Context
from gammac.runtime.evaluate import compare, windows_for
from gammac.runtime.reference import InterpreterSession, TransformersSession, load_model
from gammac.study import measure, plot, report, run
from gammac.study.estimate import estimate_rows
from gammac.study.make import Made, Seconds, make, plan_of
from gammac.study.measure import Harness, OnText, Text
from gammac.study.rows import RowSpec, chosen, parse_rows, read_rows
from gammac.study.run import (
    DONE,
    FAILED,
    FULL_ROW,
    MISSING,
    Figures,
    Prepared,
    Row,
    Study,
    StudyRequest,
    prepare,
)  # fmt: skip
from gammac.study.storage import Storage, check, storage_of
from gammac.targets.cost import module_cost
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.trials import Trial
from gammac.weights import WeightStore

TINY = fetch("tiny")
QUICK = ("--calibration-windows", "4", "--calibration-length", "128", "--windows", "2")
ROWS = """
[[row]]
name = "RTN"
bits = [4, 2]
group = [64, "channel"]
quantizer = "rtn"
clip = "none"

[[row]]
name = "GPTQ"
bits = 3
group = 64
quantizer = "gptq"
damping = 0.02

[[row]]
name = "Too tight"
bits = 4
group = 32
quantizer = "rtn"
budget = 3

[[row]]
name = "Elsewhere"
bits = 2
quantizer = "nobody-has-this"
formats = "no-format"
"""
EXAMPLES = [
    {"query": "The history of the", "choices": ["city is long", "xq zz"], "gold": 0},
    {"query": "He was born in", "choices": ["kk jj", "the town of"], "gold": 1},
    {"contexts": ["She said that", "Zq xx"], "continuation": "it was", "gold": 0},
]

Gammac = Callable[..., Result]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a folder of tasks, rows and a cache."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "text.txt").write_text((Path(TINY).parent / "calibration.txt").read_text()[:20_000])
    (folder / "rows.toml").write_text(ROWS)
    (folder / "tasks").mkdir()
    for name in ("own_task", "winogrande", "piqa"):
        lines = "\n".join(map(json.dumps, EXAMPLES))
        (folder / "tasks" / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def gammac(monkeypatch: pytest.MonkeyPatch, place: Path) -> Gammac:
    """Run the command line; no exception but an exit may come out of it."""
    monkeypatch.setenv("GAMMAC_CACHE", str(place / "cache"))

    def study(*arguments: object) -> Result:
        result = CliRunner().invoke(main, ["study", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return study


def asked(place: Path) -> list[str]:
    named = {"--text": "text.txt", "--tasks": "tasks", "--rows": "rows.toml"}
    given = [part for option, name in named.items() for part in (option, str(place / name))]
    return ["tiny", *given, "--task-items", "3", *QUICK]


@pytest.fixture(scope="module")
def studied(place: Path) -> Path:
    """The study of `tiny` over ROWS."""
    out = place / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAMMAC_CACHE", str(place / "cache"))
        result = CliRunner().invoke(main, ["study", *asked(place), "-o", str(out)])
    assert result.exit_code == 1, "a row failed"
    assert "failed: Too tight 4 g32" in result.stderr and "Traceback" not in result.output
    return out


def found_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "study.json").read_text())
    return found


def row_of(out: Path, name: str, bits: float, group: str = "64") -> dict[str, Any]:
    rows = found_in(out)["rows"]
    return next(
        r for r in rows if (r["spec"]["name"], r["spec"]["bits"], r["spec"]["group"]) == (name, bits, group)
    )


# ---- a study ------------------------------------------------------------------------------------


def test_every_row_keeps_its_place(studied: Path) -> None:
    rows = [(r["spec"]["name"], r["spec"]["bits"], r["status"]) for r in found_in(studied)["rows"]]
    assert rows == [
        ("full precision", 32, DONE), ("RTN", 4, DONE), ("RTN", 4, DONE), ("RTN", 2, DONE), ("RTN", 2, DONE),
        ("GPTQ", 3, DONE), ("Too tight", 4, FAILED), ("Elsewhere", 2, MISSING),
    ]  # fmt: skip
    assert "the smallest possible is 4.000" in row_of(studied, "Too tight", 4, "32")["said"]
    assert row_of(studied, "Elsewhere", 2, "")["said"] == "this build has no quantizer 'nobody-has-this'"


@pytest.fixture(scope="module")
def ready(place: Path, studied: Path) -> Prepared:
    """The same study, found possible once more."""
    base = Choices(table="w8g64", strategy="uniform")
    request = Request("tiny", calibration_windows=4, calibration_length=128, choices=base)
    rows = parse_rows(ROWS.replace("bits = 3", "bits = [3, 5, 6]"))
    wish = StudyRequest(request, rows, (place / "text.txt",), 2, place / "tasks", 3)
    return prepare(wish, place / "cache")


def spec_of(ready: Prepared, label: str) -> RowSpec:
    return next(row for row in ready.wish.rows if row.label == label)


def test_figures_are_those_of_eval(studied: Path, place: Path, ready: Prepared) -> None:
    """Bits as a manifest counts them; perplexity, KL and agreement as they are measured elsewhere."""
    plan = plan_of(spec_of(ready, "GPTQ 3 g64"), ready.plan)
    module = make(plan, ready.ctx).module
    cost = module_cost(module, plan.target)
    figures = row_of(studied, "GPTQ", 3)["figures"]
    assert figures["storage"]["payload_bits"] == cost.payload_bits == 3
    assert figures["storage"]["true_bits"] == cost.true_bits == 3.296875
    assert figures["storage"]["bytes"] == pytest.approx(cost.bytes, rel=0.01)
    assert figures["storage"]["packed_bytes"] == figures["storage"]["bytes"]
    session = InterpreterSession(module, plan.store)
    reference = TransformersSession(load_model(Path(TINY)))
    expected = compare(session, reference, windows_for(place / "text.txt", plan.source.tokenizer, 2))
    on = figures["texts"]["text"]
    assert on["ppl"] == pytest.approx(expected.ppl, rel=1e-4)
    assert on["kl"] == pytest.approx(expected.kl, rel=1e-2)
    assert on["top1"] == pytest.approx(expected.top1_agreement, abs=2e-3)
    full = found_in(studied)["rows"][0]["figures"]["texts"]["text"]
    assert full["ppl"] == pytest.approx(expected.ppl_reference, rel=1e-4)


def test_full_precision_is_at_no_distance_from_itself(studied: Path) -> None:
    full = found_in(studied)["rows"][0]["figures"]
    assert full["texts"]["text"]["kl"] == 0 and full["texts"]["text"]["top1"] == 1
    assert full["storage"]["true_bits"] == 32 and full["storage"]["whole_model_bits"] == pytest.approx(
        32, 0.01
    )


def test_more_bits_are_nearer(studied: Path) -> None:
    kl = [row_of(studied, "RTN", bits)["figures"]["texts"]["text"]["kl"] for bits in (4, 2)]
    assert 0 < kl[0] < kl[1] / 4
    coarse = row_of(studied, "RTN", 2, "channel")["figures"]
    assert coarse["texts"]["text"]["kl"] > kl[1]
    assert coarse["storage"]["true_bits"] < row_of(studied, "RTN", 2)["figures"]["storage"]["true_bits"]


def test_tasks_stand_in_the_order_of_the_study(studied: Path) -> None:
    assert list(found_in(studied)["examples"]) == ["piqa", "winogrande", "own_task"]
    for row in found_in(studied)["rows"]:
        if row["status"] == DONE:
            accuracies = row["figures"]["tasks"]
            assert accuracies["piqa"] == accuracies["own_task"], "one file, two names"
            assert row["figures"]["mean_accuracy"] == pytest.approx(sum(accuracies.values()) / 3)
    assert found_in(studied)["rows"][0]["figures"]["tasks"]["piqa"] > 0.5


def test_the_files_agree(studied: Path) -> None:
    rows = found_in(studied)["rows"]
    lines = list(csv.DictReader((studied / "study.csv").read_text().splitlines()))
    table = (studied / "study.md").read_text().split("## ")[1].splitlines()[4:]
    assert len(lines) == len(rows) == len([line for line in table if line.startswith("|")])
    for row, line, cells in zip(rows, lines, table, strict=False):
        assert (line["method"], line["status"]) == (row["spec"]["name"], row["status"])
        if row["status"] != DONE:
            assert line["ppl text"] == "" and f"| {row['status']} |" in cells
            continue
        figures = row["figures"]
        assert float(line["ppl text"]) == figures["texts"]["text"]["ppl"]
        assert int(line["bytes"]) == figures["storage"]["bytes"]
        shown = [cell.strip() for cell in cells.strip("|").split("|")]
        assert shown[4] == f"{figures['storage']['true_bits']:.3f}"
        assert shown[5] == report.ppl(figures["texts"]["text"]["ppl"])
        assert shown[-1] == f"{100 * float(line['mean_accuracy']):.1f}"


def test_a_second_study_does_nothing_and_writes_the_same(
    gammac: Gammac, studied: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "compare", lambda *_: pytest.fail("compared again"))
    monkeypatch.setattr(measure, "accuracy", lambda *_: pytest.fail("answered again"))
    made: list[str] = []
    monkeypatch.setattr(
        run, "make", lambda plan, ctx: made.append(plan.request.choices.block) or make(plan, ctx)
    )
    result = gammac(*asked(place), "-o", tmp_path)
    assert result.exit_code == 1, "the failed row is tried again, and fails again"
    names = sorted(p.name for p in studied.iterdir())
    assert names == ["study.csv", "study.json", "study.md", "study.png", "study.svg"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (studied / name).read_bytes(), name
    assert made == ["w4g32"]


def test_a_killed_study_goes_on_at_its_row(
    gammac: Gammac, ready: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    dying = [True]

    def counting(plan: Plan, ctx: Context) -> Made:
        if dying and len(made) == 2:
            raise KeyboardInterrupt
        made.append(plan.request.choices.block)
        return make(plan, ctx)

    short = [Text("text", ready.harness.texts[0].tokens[:1, :64])]
    harness = Harness(ready.harness.reference, ready.ctx, None, short, [], 1024)
    wish = replace(ready.wish, rows=chosen(ready.wish.rows, ["rtn"]))
    monkeypatch.setattr(run, "prepare", lambda *_: replace(ready, wish=wish, harness=harness))
    monkeypatch.setattr(run, "make", counting)
    gammac("tiny", "-o", tmp_path)
    assert made == ["w4g64", "w4channel"]
    assert [r["status"] for r in found_in(tmp_path)["rows"]] == [DONE] * 3, "what is done is on disk"
    dying.clear()
    assert gammac("tiny", "-o", tmp_path).exit_code == 0
    assert made == ["w4g64", "w4channel", "w2g64", "w2channel"]


def test_rows_share_their_calibration(studied: Path) -> None:
    assert row_of(studied, "RTN", 4)["figures"]["seconds"]["calibration"] == 0
    seconds = row_of(studied, "GPTQ", 3)["figures"]["seconds"]
    assert seconds["calibration"] > 0 and seconds["candidates"] > 0


def test_two_gram_rows_calibrate_once(ready: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    collect = CollectGrams.run

    def counting(self: CollectGrams, module: Module, ctx: Context) -> Module:
        ran.append(1)
        return collect(self, module, ctx)

    monkeypatch.setattr(CollectGrams, "run", counting)
    monkeypatch.setattr(Candidates, "run", lambda *_: pytest.fail("candidates"))
    ctx = replace(ready.ctx, calibration=Calibration(torch.arange(64).reshape(2, 32)))
    for label in ("GPTQ 5 g64", "GPTQ 6 g64"):
        with pytest.raises(pytest.fail.Exception, match="candidates"):
            make(plan_of(spec_of(ready, label), ready.plan), ctx)
    assert ran == [1]


# ---- rows ---------------------------------------------------------------------------------------


def test_an_entry_becomes_a_row_for_each_width_and_group() -> None:
    rows = parse_rows(ROWS)
    assert [row.label for row in rows][:5] == [
        "RTN 4 g64", "RTN 4 channel", "RTN 2 g64", "RTN 2 channel", "GPTQ 3 g64"
    ]  # fmt: skip
    request = rows[4].request(Request("tiny", choices=Choices(rotate=True)))
    assert request.budget == "32"
    assert request.choices == Choices(
        block="w3g64", strategy="uniform", quantizer="gptq", damping=0.02, rotate=True
    )


def test_options_are_those_of_the_command_line() -> None:
    text = """
    [[row]]
    name = "mixed"
    bits = 2.5
    formats = "w2g64,w3g64"
    strategy = "fisher{windows=8}"
    budget = 2.5
    learn-rounding = true
    table_formats = "w4g64,w8g64"
    """
    (row,) = parse_rows(text)
    request = row.request(Request("tiny"))
    assert request.budget == "2.5" and row.label == "mixed 2.5"
    assert request.choices == Choices(
        block="w2g64+w3g64", table="w4g64+w8g64", strategy="fisher{windows=8}", learn_rounding=True
    )
    assert row.recipe.startswith("--formats w2g64,w3g64 --strategy fisher{windows=8} --budget 2.5")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("row = 3", "no [[row]] entries"),
        ("[[row]\n", "is not TOML"),
        ('[[row]]\nname = "x"', "needs a name and bits"),
        ('[[row]]\nname = "x"\nbits = "3"', "'3' are no bits"),
        ('[[row]]\nname = "x"\nbits = 3\ngroup = "g64"', "'g64' is no group"),
        ('[[row]]\nname = "x"\nbits = 3\ndampening = 0.1', "x 3: no option 'dampening'"),
        ('[[row]]\nname = "x"\nbits = 3\nact-order = "no"', "act-order = 'no' is no bool"),
        ('[[row]]\nname = "x"\nbits = 3\nformats = "w9g64"', "'w9g64' is no weight format"),
        ('[[row]]\nname = "x"\nbits = [3, 3]', "x 3 stands there twice"),
        ('[[row]]\nname = "x, y"\nbits = 3', "'x, y' has a comma"),
    ],
)
def test_mistakes_in_rows_are_named(text: str, said: str) -> None:
    with pytest.raises(CompileError) as raised:
        parse_rows(text, "mine.toml")
    assert said in str(raised.value)


def test_the_shipped_rows_can_run_or_are_known_to_be_missing() -> None:
    rows = read_rows()
    assert {row.name for row in rows} >= {"RTN", "GPTQ", "AWQ", "SmoothQuant", "QuIP", "NormalFloat"}
    for row in rows:
        if not row.lacking:
            assert row.request(Request("tiny")).choices.quantizer.partition(":")[0] in QUANTIZERS
    assert {row.bits for row in rows if row.name == "RTN"} == {2, 3, 4, 8}
    assert {row.label: row.lacking for row in rows}["RTN 3 g64"] == ""


def test_what_a_build_lacks_makes_a_shipped_row_missing_and_is_a_mistake_elsewhere() -> None:
    text = '[[row]]\nname = "S"\nbits = [8, 4]\nwarp-drive = true\nactivations = "a{bits}tensor"'
    rows = parse_rows(text, may_lack=True)
    assert [(row.label, row.lacking) for row in rows] == [
        ("S 8 A8", "no option 'warp-drive'"), ("S 4 A4", "no option 'warp-drive'")
    ]  # fmt: skip
    with pytest.raises(CompileError, match="no option 'warp-drive'"):
        parse_rows(text)
    with pytest.raises(CompileError, match="this build has no option 'warp-drive'"):
        chosen(rows, ["s"])
    assert chosen(rows, bits=[8]) == rows[:1], "not asked for by name: listed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "RTN,Elsewhere"], ["no quantizer 'nobody-has-this'", "there are rtn"]),
        (["--methods", "RTN,GTPQ"], ["no method 'GTPQ'", "RTN, GPTQ"]),
        (["--bits", "7"], ["no row is left"]),
        (["--bits", "two"], ["'two' is no number of bits"]),
        (["--rows", "nowhere.toml"], ["nowhere.toml can't be read"]),
        (["--text", "nowhere.txt"], ["nowhere.txt can't be read"]),
        (["--tasks", "nowhere"], ["nowhere has no tasks"]),
        (["--target", "tpu"], ["no target 'tpu'"]),
    ],
)
def test_mistakes_are_found_before_the_work(
    gammac: Gammac, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    said: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(run, "_run", lambda *_: pytest.fail("too late"))
    result = gammac(*asked(place), "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
    for part in said:
        assert part in result.stderr, result.stderr


def test_nothing_to_measure_on_is_refused(gammac: Gammac, tmp_path: Path) -> None:
    result = gammac("tiny", "-o", tmp_path)
    assert result.exit_code == 1 and "give --text FILE or --tasks DIR" in result.stderr


def test_what_no_emitter_runs_can_be_studied(gammac: Gammac, place: Path, tmp_path: Path) -> None:
    planned = gammac(*asked(place), "-o", tmp_path / "out", "--target", "reference", "--dry-run")
    assert planned.exit_code == 0 and "(dry run): about" in planned.stdout, planned.output


# ---- estimates ----------------------------------------------------------------------------------


def test_a_dry_run_does_nothing(
    gammac: Gammac, ready: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "prepare", lambda *_: ready)
    monkeypatch.setattr(run, "_run", lambda *_: pytest.fail("done"))
    result = gammac("tiny", "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    for part in ("GPTQ 5 g64", "missing", "done", "(dry run): about"):
        assert part in result.stdout


def test_estimates_know_what_is_done_and_what_is_shared(ready: Prepared) -> None:
    found = {e.spec.label: e for e in estimate_rows(ready)}
    assert found["GPTQ 3 g64"].said == "done" and found["GPTQ 3 g64"].seconds == 0
    assert found["Elsewhere 2"].said == "missing"
    first, second = found["GPTQ 5 g64"], found["GPTQ 6 g64"]
    assert first.calibration > 0 == second.calibration
    assert first.quantization > 0 and second.evaluation > 0
    tokens = ready.harness.texts[0].tokens[:1]
    fewer = Harness(ready.harness.reference, ready.ctx, None, [Text("text", tokens)], [], 1024)
    assert not replace(ready, harness=fewer).is_done(spec_of(ready, "GPTQ 3 g64")), "other figures"


# ---- bits ---------------------------------------------------------------------------------------


def test_a_formula_that_forgets_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    store, target = WeightStore(), load_target("cpu")
    module = Candidates("w3g32", "w8g64", quantizer="rtn").run(llama(store), Context(target, store))
    quantized = [w for w in module.weights.values() if "candidates" in w.attrs]
    stored = [stored_as(w, *pair, 0.0) for w in quantized for pair in candidates_of(w).items()]
    module = module.with_weights(*stored)
    parameters = sum(w.type.numel() for w in module.weights.values())
    storage = storage_of(module, store, target, parameters)
    assert storage.payload_bits == 3 and storage.true_bits == 3 + 19 / 32
    assert storage.packed_bytes == pytest.approx(storage.bytes, rel=0.001)
    kind = type(parse_format("w3g32"))
    monkeypatch.setattr(kind, "storage_bits", lambda self, rows, columns: self.payload_bits(rows, columns))
    with pytest.raises(CompileError, match=r"counts .* true bits would be wrong"):
        storage_of(module, store, target, parameters)


@pytest.mark.parametrize(("packed", "fits"), [(1000, True), (1010, True), (1011, False), (989, False)])
def test_one_percent_is_allowed(packed: int, fits: bool) -> None:
    if fits:
        check("w3g64", 1000, packed)
    else:
        with pytest.raises(CompileError):
            check("w3g64", 1000, packed)


# ---- tables and the plot, from rows made by hand ------------------------------------------------


def by_hand(*, ppl: float | None = 1e7) -> Study:
    def row(name: str, bits: float, group: str, value: float | None) -> Row:
        storage = Storage(bits, bits + 0.3, 5.0, 10**6, 10**6)
        texts = {t: OnText(value, 0.5, 0.25) for t in ("a", "b")}
        spec = FULL_ROW if name == "" else RowSpec(name, bits, group, "", {})
        return Row(spec, DONE, Figures(storage, Seconds(1.0, None, 0.0), None, texts, {}))

    rows = (
        row("", 32, "", 9.0),
        row("RTN", 4, "64", 10.0),
        row("RTN", 2, "64", ppl),
        row("BiLLM", 1, "", 999.0),
    )
    return Study("m", "", "cpu", {"a": (1, 8), "b": (2, 8)}, {}, (1, 8), {"table": "w8g64"}, rows)


def test_perplexities_are_written_as_in_the_study() -> None:
    shown = [report.ppl(v) for v in (8.534, 127.94, 999.96, 66519.0, 1.7e6, None)]
    assert shown == ["8.53", "127.9", "1000.0", "6.7E4", "1.7E6", "not a number"]


def test_unknown_times_are_not_zero() -> None:
    cells = next(line for line in report.to_markdown(by_hand()).split("## ")[3].splitlines() if "RTN" in line)
    assert cells.endswith("| 1.0 | – | – | – |")
    assert json.loads(report.to_json(by_hand(ppl=None)))["rows"][2]["figures"]["texts"]["a"]["ppl"] is None


def test_the_plot_is_the_same_every_time(tmp_path: Path) -> None:
    first, again = (plot.draw(by_hand(), tmp_path / name) for name in "ab")
    assert [p.name for p in first] == ["study.png", "study.svg"]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert plot.methods(by_hand(ppl=None), "a") == {
        "RTN": {"64": [(4.3, 10.0)]},
        "BiLLM": {"": [(1.3, 999.0)]},
    }


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    study = replace(by_hand(), rows=by_hand().rows[:1])
    assert plot.draw(study, tmp_path) == []


def test_without_matplotlib_there_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli._drawn(by_hand(), tmp_path) == []
    assert "pip install 'gammac[plots]'" in capsys.readouterr().err


def test_a_collapse_has_no_perplexity_but_a_row() -> None:
    on = measure.on_text(Trial(kl=float("nan"), nll=1e4, top1=0.0))
    assert on == OnText(None, None, 0.0)
    assert torch.isfinite(
        torch.tensor(measure.on_text(Trial(1.0, 699.0, 0.0)).ppl or 0.0, dtype=torch.float64)
    )


def test_the_ladders_rows_can_be_read() -> None:
    rows = read_rows(Path(__file__).parents[1] / "benchmarks" / "ladder.toml")
    assert len(rows) == 29 and not any(row.lacking for row in rows)
