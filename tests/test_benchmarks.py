"""What the benchmarks count with: BLEU, and the classification task that is made of source files."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are scripts: they import what lies beside them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_bleu_of_continuations_that_were_counted_by_hand() -> None:
    from bleu import bleu

    assert bleu([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]]) == pytest.approx(1.0)
    assert bleu([[1, 2, 3, 4]], [[5, 6, 7, 8]]) == 0.0
    # 1-grams 5 of 6 (one 1 too many), 2-grams 4 of 5, 3-grams 3 of 4, 4-grams 2 of 3; equal lengths
    found = bleu([[1, 2, 3, 4, 5, 1]], [[1, 2, 3, 4, 5, 6]])
    assert found == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # all that is there is right, and a quarter is missing
    assert bleu([[1, 2, 3, 4, 5, 6]], [[1, 2, 3, 4, 5, 6, 7, 8]]) == pytest.approx(math.exp(1 - 8 / 6))


def test_lines_of_the_test_come_from_other_files_and_are_no_comments(tmp_path: Path) -> None:
    import source_lines

    train, test = source_lines.write(tmp_path, 40)
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (train, test)]
    assert [len(part) for part in rows] == [120, 30]
    texts = [{row["text"] for row in part} for part in rows]
    assert not texts[0] & texts[1]
    for label in ("python", "english", "c++"):
        assert sum(row["label"] == label for row in rows[0]) == 40
    assert not any(row["text"].startswith(("#", "//")) for part in rows for row in part)
    assert [path.read_bytes() for path in source_lines.write(tmp_path / "again", 40)] == [
        train.read_bytes(), test.read_bytes(),
    ]  # fmt: skip


def test_sweeps_of_other_formats_are_refused(tmp_path: Path) -> None:
    from predicted_kl import main as predicted_kl

    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps({"rows": [], "options": {"block": "w2g64+w8g64"}}))
    refused = CliRunner().invoke(predicted_kl, ["tiny", str(sweep), "--calibration", str(sweep)])
    assert refused.exit_code == 2 and "sweeps of w8g64: only" in refused.output


def test_scores_that_predict_exactly_and_scores_that_are_twice_as_large() -> None:
    from predicted_kl import apart, prediction

    scores = {"a": {"w2g64": 0.4, "w3g64": 0.1}, "b": {"w2g64": 0.2, "w3g64": 0.05}}
    double = {name: {f: 2 * x for f, x in own.items()} for name, own in scores.items()}
    formats = [("w2g64", "w3g64"), ("w3g64", "w2g64"), ("w3g64", "w3g64")]
    rows = [
        {
            "budget": "2.5",
            "kl": scores["a"][a] + scores["b"][b],
            "assignment": {"a": a, "b": b, "head": "w8g64"},
        }
        for a, b in formats
    ]
    assert prediction(rows, scores) == pytest.approx((1.0, 0.0, 1.0))
    assert prediction(rows, double) == pytest.approx((0.5, 0.0, 1.0))
    assert apart(scores, double) == pytest.approx(0.0)
    assert apart(scores, {"a": scores["b"], "b": scores["a"]}) == pytest.approx(math.log(2))
