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
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gammac.plots import METADATA, RC, logarithmic, save
from gammac.study.run import FULL, Row, Study

# light and dark in turns, so that neighbours differ in grey
COLOURS: Final = (
    "#1b3a6b", "#d1495b", "#2a9d8f", "#8a5a00", "#6a4c93", "#e08e00", "#3d3d3d", "#5fa8d3", "#7a9e2f",
    "#b5179e",
)  # fmt: skip
MARKERS: Final = "osD^vP*Xph"
LABEL_HEIGHT: Final = 11.0  # points between two names
LEADER: Final = {"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 1, "shrinkB": 3}
TICKS: Final = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8)
WIDEN: Final = 1.45
MANY: Final = 100.0  # a perplexity so many times another leaves no room for lines between powers of ten
BOX: Final = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
Point = tuple[float, float]
Label = tuple[Point, str, str]  # where a line begins, its name, its colour


def draw(study: Study, folder: Path) -> list[Path]:
    """study.png and study.svg; nothing where no row has a perplexity. Raises CompileError."""
    if not any(methods(study, name) for name in study.windows):
        return []
    with rc_context(RC):
        figure = Figure((0.6 + 5.6 * len(study.windows), 4.6), layout="constrained")
        panels = figure.subplots(1, len(study.windows), squeeze=False).flat
        figure.suptitle(f"{study.model}: perplexity over true bits", fontsize=10)
        labels = [_panel(study, name, axes) for name, axes in zip(study.windows, panels, strict=True)]
        # names are placed in points, which only a figure that has been laid out has
        figure.draw_without_rendering()
        for axes, found in zip(figure.axes, labels, strict=True):
            _name(axes, found)
        return [save(figure, folder / f"study.{kind}") for kind in METADATA]


def _panel(study: Study, text: str, axes: Axes) -> list[Label]:
    """One text; the names that are still to be written."""
    labels: list[Label] = []
    for index, (method, lines) in enumerate(methods(study, text).items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        for group, points in lines.items():
            grouped = group.isdigit()
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1,
                linestyle="-" if grouped else "--", markerfacecolor=colour if grouped else "white",
            )  # fmt: skip
            labels.append((points[0], f"{method} g{group}" if grouped else method, colour))
    _line(study, text, axes)
    _scale(axes)
    count, length = study.windows[text]
    axes.set_ylabel(f"perplexity, {text}")
    axes.set_title(f"{count} windows of {length} tokens; dashed, hollow: no groups", fontsize=8)
    return labels


def _line(study: Study, text: str, axes: Axes) -> None:
    """What full precision reaches."""
    found = [row.figures.texts[text].ppl for row in study.rows if row.spec.name == FULL and row.figures]
    for value in found:
        if value is not None:
            axes.axhline(value, color="black", linestyle=":", linewidth=1)
            axes.annotate(
                f"full precision {value:.2f}", (1, value), xycoords=("axes fraction", "data"),
                xytext=(0, -3), textcoords="offset points", ha="right", va="top", fontsize=8,
            )  # fmt: skip


def _scale(axes: Axes) -> None:
    """Both axes logarithmic, ticks in plain numbers; room for names on the left."""
    axes.margins(y=0.08)
    logarithmic(axes)
    low, high = axes.get_ylim()
    if high / low > MANY:
        axes.grid(False, which="minor")
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    axes.set_xlim(low / WIDEN, high * 1.05)
    axes.xaxis.set_major_locator(FixedLocator([t for t in TICKS if low / WIDEN <= t <= high * 1.05]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("true bits (linears of the blocks)")


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


def _name(axes: Axes, labels: Sequence[Label]) -> None:
    """Names left of where lines begin, from the top down, each below the one before, in a column."""
    assert axes.figure is not None
    scale = 72 / axes.figure.dpi
    left = min((bits for (bits, _), _, _ in labels), default=1.0)
    edge = axes.transData.transform((left, 1))[0] * scale
    below = float("inf")
    for (bits, value), name, colour in sorted(labels, key=lambda label: (-label[0][1], label[1])):
        x, y = axes.transData.transform((bits, value)) * scale
        below = min(y, below - LABEL_HEIGHT)
        axes.annotate(
            name, (bits, value), xytext=(edge - x - 14, below - y), textcoords="offset points", ha="right",
            va="center", fontsize=8, color=colour, arrowprops=LEADER | {"color": colour}, bbox=BOX,
        )  # fmt: skip
