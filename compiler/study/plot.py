"""The figure of a study: perplexity over true bits, a panel a text; PNG and SVG.

A method is told apart by its marker, its name beside its line, and only then by its colour. Equal studies
give equal bytes. Imports matplotlib (the extra `plots`), so import this only where a figure is drawn.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gammac.plots import METADATA, RC, logarithmic, save
from gammac.study.run import FULL, Row, Study

# light and dark in turns, so that neighbours differ in grey
COLOURS: Final = (
    "#1b3a6b", "#d1495b", "#2a9d8f", "#8a5a00", "#6a4c93", "#e08e00", "#3d3d3d", "#5fa8d3", "#7a9e2f", "#b5179e",
)  # fmt: skip
MARKERS: Final = "osD^vP*Xph"
LABEL_HEIGHT: Final = 11.0  # points between two names
Point = tuple[float, float]


def draw(study: Study, folder: Path) -> list[Path]:
    """study.png and study.svg; nothing for a study without texts. Raises CompileError."""
    if not study.windows:
        return []
    with rc_context(RC):
        figure = Figure((0.6 + 5.6 * len(study.windows), 4.6), layout="constrained")
        panels = figure.subplots(1, len(study.windows), squeeze=False).flat
        for name, axes in zip(study.windows, panels, strict=True):
            _panel(study, name, axes)
        figure.suptitle(f"{study.model}: perplexity over true bits", fontsize=10)
        return [save(figure, folder / f"study.{kind}") for kind in METADATA]


def _panel(study: Study, text: str, axes: Axes) -> None:
    full = [row for row in study.rows if row.spec.name == FULL]
    for row in full:
        value = row.figures.texts[text].ppl if row.figures else None
        if value is not None:
            axes.axhline(value, color="black", linestyle=":", linewidth=1)
            axes.annotate(
                f"full precision {value:.2f}", (1, value), xycoords=("axes fraction", "data"),
                xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8,
            )  # fmt: skip
    labels = []
    for index, (method, lines) in enumerate(methods(study, text).items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        for group, points in lines.items():
            hollow = {} if group.isdigit() else {"markerfacecolor": "white"}
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=5,
                linewidth=1, linestyle="-" if group.isdigit() else "--", **hollow,
            )  # fmt: skip
            labels.append((points[0], f"{method} g{group}" if group.isdigit() else method, colour))
    logarithmic(axes)
    axes.margins(x=0.2)
    axes.set_xlabel("true bits (linears of the blocks)")
    axes.set_ylabel(f"perplexity, {text}")
    count, length = study.windows[text]
    axes.set_title(f"{count} windows of {length} tokens; dashed, hollow: no groups", fontsize=8)
    _name(axes, labels)


def methods(study: Study, text: str) -> dict[str, dict[str, list[Point]]]:
    """Method → group → points (true bits, perplexity), by bits; methods in the order of the table."""
    found: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for row in study.rows:
        point = _point(row, text)
        if point is not None:
            found[row.spec.name][row.spec.group].append(point)
    return {name: {group: sorted(points) for group, points in lines.items()} for name, lines in found.items()}


def _point(row: Row, text: str) -> Point | None:
    if row.spec.name == FULL or row.figures is None:
        return None
    value = row.figures.texts[text].ppl
    return None if value is None else (row.figures.storage.true_bits, value)


def _name(axes: Axes, labels: Sequence[tuple[Point, str, str]]) -> None:
    """Names left of where lines begin, from the top down, each below the one before."""
    assert axes.figure is not None
    scale = 72 / axes.figure.dpi
    below = float("inf")
    for (bits, value), name, colour in sorted(labels, key=lambda label: -label[0][1]):
        height = float(axes.transData.transform((bits, value))[1]) * scale
        place = min(height, below - LABEL_HEIGHT)
        below = place
        axes.annotate(
            name, (bits, value), xytext=(-8, place - height), textcoords="offset points", ha="right",
            va="center", fontsize=8, color=colour,
        )  # fmt: skip
