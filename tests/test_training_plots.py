"""Figures of a training: which there are, that they say what the history says, and that they repeat."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the extra plots")

from gammac.training_plots import _bits, _curves, draw_training

LOSSES = (3.0, 2.5, 2.75, 2.0)
HISTORY: list[dict[str, Any]] = [
    {"step": i, "loss": loss, "average_bits": 4 - i / 4, "lambda": i} for i, loss in enumerate(LOSSES)
]
LOOKS = [
    {"step": 0, "bits": {"a.weight": 4, "b.weight": 2}},
    {"step": 2, "bits": {"a.weight": 3, "b.weight": 2}},
]


def test_equal_histories_are_equal_files(tmp_path: Path) -> None:
    history = [row | next((look for look in LOOKS if look["step"] == row["step"]), {}) for row in HISTORY]
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
        draw_training(history, folder)
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["bits.png", "bits.svg", "training.png", "training.svg"]
    assert all((folders[0] / n).read_bytes() == (folders[1] / n).read_bytes() for n in names)


def test_what_a_method_does_not_have_is_left_out(tmp_path: Path) -> None:
    drawn = draw_training([{"step": i, "loss": loss} for i, loss in enumerate(LOSSES)], tmp_path)
    assert sorted(path.name for path in drawn) == ["training.png", "training.svg"]


def test_curves_and_widths_are_the_historys() -> None:
    panels = _curves(HISTORY).axes
    assert [axes.get_ylabel() for axes in panels] == ["loss, nats", "average bits", "λ"]
    assert list(panels[0].lines[0].get_ydata()) == list(LOSSES)
    assert list(panels[1].lines[0].get_ydata()) == [4.0, 3.75, 3.5, 3.25]
    axes = _bits(LOOKS).axes[0]
    assert axes.images[0].get_array().tolist() == [[4, 3], [2, 2]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_masks_have_panels_of_their_own_and_a_line_where_they_are_final() -> None:
    masks = [
        {"step": i, "loss": 1.0, "binarity": 1 - i / 4, "density": 0.5, "frozen": i > 2} for i in range(4)
    ]
    panels = _curves(masks).axes
    assert [axes.get_ylabel() for axes in panels] == ["loss, nats", "4 m (1 − m) of masks", "share kept"]
    assert [list(axes.lines[-1].get_xdata()) for axes in panels] == [[3, 3]] * 3
