"""Formats that no emitter runs: refused at once by compile, measured on the target `reference` by sweep."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from test_cli import QUICK, Run, fails
from test_cli import cache as cache  # fixtures
from test_cli import gammac as gammac

from gammac import driver
from gammac.cli import main
from gammac.formats import parse_format
from gammac.passes import Choices, default_pipeline
from gammac.targets import cost
from gammac.targets.target import BLOCK, TABLE, load_target

FORMATS = ["w3g64", "w5g96-sym", "nf3g64", "nf4g64-dq", "fdb2g64", "pb1.7g128", "bi1.1g128"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("role", [BLOCK, TABLE])
def test_it_takes_every_format_as_it_is(name: str, role: str) -> None:
    target, format_ = load_target("reference"), parse_format(name)
    assert target.fit(format_, role, 1152) == format_
    assert 8 * cost.stored_bytes(96, 1152, format_, target, role) == pytest.approx(
        format_.storage_bits(96, 1152), rel=0.01
    )
    assert cost.linear_seconds(96, 1152, format_, target) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "reference"], ["nothing can be compiled for reference", "gammac sweep"]),
        (
            ["--formats", "nf4g64", "--quantizer", "nf"],
            ["(onnx) does not run nf4g64", "dual_binary and integer", "--target reference"],
        ),
        (["--formats", "w3g64,pb1.7g128"], ["does not run pb1.7g128 as block weights"]),
        (["--table-formats", "fdb2g64"], ["does not run fdb2g64 as table weights", "integer codes"]),
        (
            ["--formats", "fdb2g64", "--quantizer", "db_llm", "--portable"],
            ["does not run fdb2g64 as block weights without a C++ compiler"],
        ),
    ],
)
def test_compile_refuses_before_it_begins(
    gammac: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: list[str]
) -> None:
    monkeypatch.setattr(driver, "capture", None)  # whoever gets that far fails otherwise
    fails(gammac("compile", "tiny", "-o", tmp_path / "out", *QUICK, *arguments), *said)
    assert not list(tmp_path.iterdir())


def test_its_weights_stay_whole_without_a_compiler() -> None:
    passes = default_pipeline(Choices("pb2g64", quantizer="pb_llm"), "none", compiler=False)
    assert not {"split_rows", "legalize_onnx"} & {p.name for p in passes}


def test_a_sweep_measures_what_no_emitter_runs(tmp_path: Path, cache: Path) -> None:
    arguments = ["sweep", "tiny", "--target", "reference", "--formats", "pb1.7g64,pb2g64", *QUICK]
    asked = ["--quantizer", "pb_llm", "--budgets", "1.7,2", "--strategies", "uniform", "--windows", "1"]
    result = CliRunner().invoke(main, [*arguments, *asked, "-o", str(tmp_path / "b"), "--cache", str(cache)])
    assert result.exit_code == 0, result.output
    table = (tmp_path / "b").glob("*.csv")
    rows = [line.split(",") for line in next(table).read_text().splitlines()]
    head = {name: i for i, name in enumerate(rows[0])}
    narrow, wide = rows[2:4]
    assert [float(r[head["payload_bits"]]) for r in (narrow, wide)] == pytest.approx([1.7, 2.0], abs=1e-5)
    assert float(narrow[head["true_bits"]]) > 3, "what is stored is more than the headline"
    assert float(narrow[head["kl"]]) > float(wide[head["kl"]]) > 0
