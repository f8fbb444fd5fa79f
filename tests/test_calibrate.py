"""Figures of kernels: timed on this machine, or analysed for another core."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gammac import calibrate, model_costs
from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.formats import parse_format
from gammac.ir import Module, parse
from gammac.model_costs import Timed, fitted
from gammac.target_rows import table_of, with_figure
from gammac.targets import cost
from gammac.targets.target import Target, load_target, parse_target, target_text

pytest.importorskip("tvm", reason="needs the extra tvm")

from gammac.targets.tvm.analysis import count_cycles, find_mca, hot_loop
from gammac.targets.tvm.kernels import isa_of
from gammac.targets.tvm.toolchain import find_linker

Run = Callable[..., Result]
MCA = any(shutil.which(name) for name in ("llvm-mca", *(f"llvm-mca-{n}" for n in range(14, 30))))


@pytest.fixture
def gammac() -> Run:
    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.mark.parametrize("format_", ["w4g64", "tcq2"])
def test_a_calibrated_target_predicts_what_was_measured(
    gammac: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    monkeypatch.setattr(calibrate, "read_bandwidth", lambda threads: 5e9 * threads)
    out = tmp_path / "mine.toml"
    wanted = ["--quick", "--threads", 1, "--formats", format_, "--shapes", "64x64,256x128"]
    said = gammac("targets", "calibrate", "cpu-x86", "-o", out, *wanted)
    assert said.exit_code == 0, said.output
    assert "4 rows in" in said.stdout.replace("\n", " ")
    mine, base = load_target(str(out), "tvm"), load_target("cpu-x86", "tvm")
    assert (mine.name, mine.threads, mine.emitter) == ("mine", 1, "tvm") and len(mine.measured) == 4
    assert mine.kernels == base.kernels and mine.dram_gbps == 5.0
    for row in mine.measured:
        found = cost.linear_seconds(row.rows, row.columns, parse_format(format_), mine, row.tokens)
        assert found == row.seconds > 0
    # the other backend's figures are not touched by them
    assert load_target(str(out)).measured == ()
    assert gammac("targets", "show", out, "--backend", "tvm").exit_code == 0


def timed_on(target: Target, module: Module) -> Timed:
    """What would be measured on a machine that is as a target says."""
    decode = [cost.seconds(module, cost.decode_function(module, past), target) for past in (512, 1)]
    prefill = [cost.seconds(module, cost.prefill_function(module, tokens), target) for tokens in (512, 128)]
    return Timed(512, *decode, *prefill, cost.peak_bytes(module, target))


@pytest.mark.parametrize("name", ["edge", "cpu-x86"])
def test_a_models_times_and_memory_come_out(name: str) -> None:
    text = target_text(name)
    golden = (Path(__file__).parent / "ir" / "legalize_tvm.gir").read_text()
    module = parse("module @m" + golden.rpartition("module @m")[2])
    base = load_target(name, "tvm")
    true = replace(base, attention_gbps=3.0, attention_gflops=7.0, runtime_bytes=12345678)

    timed = timed_on(true, module)
    for table, figures in fitted(module, base, timed).items():
        for key, figure in figures.items():
            text = with_figure(text, table_of(text, table), key, figure)
    found = parse_target(text, "mine.toml", "tvm")
    assert found.attention_gbps == pytest.approx(3.0, rel=0.01)
    assert found.attention_gflops == pytest.approx(7.0, rel=0.01)
    assert found.overhead_us == true.overhead_us
    assert cost.module_cost(module, found).decode_seconds == pytest.approx(timed.decode, rel=0.01)
    assert cost.module_cost(module, found).peak_bytes == timed.added_bytes
    slow = timed_on(replace(true, overhead_us={"default": 90.0}), module)
    calls = fitted(module, replace(base, overhead_us={"default": 2.0}), slow)["overhead_us"]
    assert calls["default"] == pytest.approx(90.0)
    # nonsense of a busy machine changes no rate
    odd = fitted(module, base, replace(timed, decode_empty=2 * timed.decode, prefill_short=timed.prefill))
    assert (odd[""]["attention_gbps"], odd[""]["attention_gflops"]) == (
        base.attention_gbps, base.attention_gflops,
    )  # fmt: skip


def test_a_model_is_timed_and_fitted(gammac: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_linker() is None:
        pytest.skip("nothing links a shared library")
    monkeypatch.setattr(calibrate, "read_bandwidth", lambda threads: 5e9 * threads)
    seen: list[Timed] = []
    timing = model_costs.time_model
    monkeypatch.setattr(model_costs, "time_model", lambda *a: (seen.append(timing(*a)), seen[-1])[1])
    out = tmp_path / "mine.toml"
    wanted = ["--quick", "--threads", 1, "--formats", "w4g64", "--shapes", "64x64,256x128"]
    said = gammac(
        "targets", "calibrate", "cpu-x86", "-o", out, *wanted, "--model", "tiny", "--cache", tmp_path
    )
    assert said.exit_code == 0, said.output
    (timed,) = seen
    assert timed.context == cost.CONTEXT and timed.decode > 0 and timed.prefill > timed.prefill_short > 0
    mine = load_target(str(out), "tvm")
    assert 0 < mine.runtime_bytes < timed.added_bytes < 1 << 30
    assert (
        mine.measured and mine.overhead_us["default"] != load_target("cpu-x86", "tvm").overhead_us["default"]
    )


ROWS = """
[[measured]]
op = "linear"
format = "w4g64"
rows = {rows}
columns = 128
threads = 4
seconds = {seconds}
tokens = {tokens}
"""


def test_between_measured_shapes_seconds_follow_the_weights() -> None:
    timed = ((100, 2e-5, 1), (300, 4e-5, 1), (100, 1e-3, 64))
    rows = "".join(ROWS.format(rows=r, seconds=s, tokens=t) for r, s, t in timed)
    pi, w4 = parse_target(target_text("edge") + rows), parse_format("w4g64")
    seconds = {rows: cost.linear_seconds(rows, 128, w4, pi) for rows in (1, 100, 200, 300, 600)}
    call = pi.overhead_us["default"] * 1e-6
    assert seconds[1] == pytest.approx(call + (2e-5 - call) / 100)
    assert [seconds[n] for n in (100, 200, 300, 600)] == pytest.approx([2e-5, 3e-5, 4e-5, 8e-5])
    assert cost.linear_seconds(100, 128, w4, pi, 128) == pytest.approx(2e-3)
    assert cost.linear_seconds(100, 128, parse_format("w3g64"), pi) != seconds[100]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cpu", "-o", "mine.txt"], "mine.txt is no .toml file"),
        (["edge", "-o", "mine.toml"], "edge can't be timed here: the artifact is for aarch64"),
        (["cpu", "-o", "mine.toml", "--shapes", "64"], "'64' is no shape"),
        (["cpu", "-o", "mine.toml", "--threads", "two"], "'two' are no numbers of threads"),
        (["cpu", "-o", "mine.toml", "--formats", "bi1.1g128"], "bi1.1g128 has no TVM kernel"),
    ],
)
def test_mistakes_are_told_at_once(gammac: Run, arguments: list[str], said: str) -> None:
    result = gammac("targets", "calibrate", *arguments)
    assert result.exit_code == 1 and said in result.stderr


# ---- analysis -----------------------------------------------------------------------------------

ASSEMBLY = """
\t.text
.LBB0_1:
\tadd\tx1, x1, #1
\tb.ne\t.LBB0_1
.LBB0_2:
\tmov\tx3, x4
.LBB0_3:
\t.loc\t1 2 3
\tldr\tq0, [x0]
\tsdot\tv1.4s, v0.16b, v2.16b
\tsubs\tx2, x2, #1
\tb.ne\t.LBB0_3
\tcbnz\tx3, .LBB0_2
\tret
"""


def test_the_hot_loop_is_the_longest_of_the_inner_ones() -> None:
    found = [line.split("\t")[0] for line in hot_loop(ASSEMBLY)]
    assert found == ["ldr", "sdot", "subs", "b.ne"]


@pytest.mark.skipif(not MCA, reason="no llvm-mca: apt-get install llvm")
def test_cycles_are_those_of_the_core() -> None:
    isa, mca = isa_of(load_target("edge")), find_mca()
    # one sum that each dot product waits for: at least a cycle each, and more the longer the loop
    loop = [line for line in hot_loop(ASSEMBLY) if not line.startswith("b.ne")]
    one, many = (count_cycles(loop[:1] + loop[1:2] * n + loop[2:], isa, mca, "cortex-a76") for n in (1, 16))
    assert 1 <= one < many and many >= 16
    with pytest.raises(CompileError, match=r"can't analyse code for cortex-a7x"):
        count_cycles(loop, isa, mca, "cortex-a7x")


@pytest.mark.skipif(not MCA, reason="no llvm-mca: apt-get install llvm")
def test_rows_of_a_shipped_file_come_from_its_code(gammac: Run) -> None:
    """The versions of llvm-mca differ in cycles; the instructions are LLVM's inside TVM."""
    said = gammac("targets", "analyse", "edge", "--bits", 4, "--groups", 64)
    assert said.exit_code == 0, said.output
    (made,) = parse_target(target_text("edge-aarch64-rpi4").split("[[analysed]]")[0] + said.stdout).analysed
    (shipped,) = [a for a in load_target("edge").analysed if (a.bits, a.group) == (4, 64)]
    assert "as cortex-a76 at 2.4 GHz" in made.source
    count = [source.source.split(" instructions")[0].split(": ")[1] for source in (made, shipped)]
    assert count[0] == count[1]
    assert shipped.gweights / 2 < made.gweights < 2 * shipped.gweights


def test_without_llvm_mca_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompileError, match=r"no llvm-mca here[^$]*apt-get install llvm"):
        find_mca()


def test_fewer_bits_are_not_always_less_work() -> None:
    """What the formats' order of cost on a core hangs on: three bits are unpacked from two planes."""
    pi = {(a.bits, a.group): a.gweights for a in load_target("edge").analysed}
    assert pi[4, 64] > pi[3, 64] and pi[2, 64] > pi[7, 64]
