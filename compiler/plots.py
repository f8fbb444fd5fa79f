"""Figures of a sweep, PNG and SVG: curves of quality over bits, maps of bits, shares of widths.

Equal sweeps give equal bytes: no time, no version and no random name stands in a file. Imports
matplotlib (the extra `plots`), so import this only where figures are drawn.
"""

import io
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from gammac.calibration import block_index
from gammac.files import write_atomically
from gammac.formats import parse_format
from gammac.summary import without_block
from gammac.sweep import Row, Sweep
from gammac.sweep_report import budgets, rows_of, strategies

# width → its place in the colour map, further apart where most widths are
WIDTHS: Final = {1: 0.0, 2: 0.12, 3: 0.37, 4: 0.62, 5: 0.74, 6: 0.84, 7: 0.92, 8: 1.0}
PANELS: Final = 3  # in a line
MARKERS: Final = "osD^vP*X"
# SVG: ids from this and not from chance
RC: Final[Any] = {
    "svg.hashsalt": "gammac",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
METADATA: Final[dict[str, dict[str, Any]]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
}


def draw(sweep: Sweep, folder: Path) -> list[Path]:
    """Every figure in both forms; the paths. Raises CompileError when one can't be written."""
    with rc_context(RC):
        figures = {
            "perplexity": _curves(sweep, "perplexity", lambda row: row.ppl, sweep.full.ppl),
            "kl": _curves(sweep, "KL to full precision, nats", lambda row: row.kl, None),
            "shares": _shares(sweep),
            **{f"bits-{_plain(s)}": _maps(sweep, s) for s in strategies(sweep)},
        }
        return [save(f, folder / f"{name}.{kind}") for name, f in figures.items() for kind in METADATA]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the form that the path's ending names; equal figures give equal bytes."""
    kind = path.suffix[1:]
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150, metadata=METADATA[kind])
    write_atomically(path, content.getvalue())
    return path


def _plain(strategy: str) -> str:
    """A strategy with its options as part of a file's name."""
    return "".join(c if c.isalnum() or c in "_-" else "-" for c in strategy).strip("-")


def _figure(width: float, height: float) -> Figure:
    return Figure((width, height), layout="constrained")


# ---- curves -------------------------------------------------------------------------------------


def _curves(sweep: Sweep, label: str, value: Callable[[Row], float], full: float | None) -> Figure:
    """A line a strategy over the payload bits reached; rings where every weight has one width."""
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    for index, strategy in enumerate(strategies(sweep)):
        points = sorted(_point(rows_of(sweep, strategy, b), value) for b in budgets(sweep))
        bits, low, mean, high = zip(*points, strict=True)
        colour = f"C{index % 10}"
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(bits, mean, marker=marker, markersize=4, color=colour, label=strategy)
        if low != high:
            axes.fill_between(bits, low, high, color=colour, alpha=0.15, linewidth=0)
    even = [row for row in sweep.rows if len(widths(sweep, row)) == 1]
    if even:
        places = [row.payload_bits for row in even], [value(row) for row in even]
        axes.plot(*places, "o", mfc="none", mec="black", markersize=9, label="one width everywhere")
    if full is not None:
        axes.axhline(full, color="black", linestyle=":", linewidth=1, label="full precision")
    logarithmic(axes)
    axes.set_xlabel("payload bits")
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    axes.set_title(f"{sweep.model}, {sweep.windows[0]} windows of {sweep.text}", fontsize=9)
    return figure


def _point(rows: Sequence[Row], value: Callable[[Row], float]) -> tuple[float, float, float, float]:
    """Bits, and the least, mean and greatest value over the seeds."""
    values = [value(row) for row in rows]
    bits = math.fsum(row.payload_bits for row in rows) / len(rows)
    return bits, min(values), math.fsum(values) / len(values), max(values)


def logarithmic(axes: Axes) -> None:
    """Log y, its ticks as plain numbers, also between powers of ten."""
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:.6g}")
    axes.yaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(plain if high / low < 20 else NullFormatter())
    axes.grid(True, which="both", axis="y", alpha=0.2)


# ---- where the bits went ------------------------------------------------------------------------


def widths(sweep: Sweep, row: Row) -> dict[float, int]:
    """Bits of a code → parameters of the block linears that got them, narrow ones first."""
    found: dict[float, int] = defaultdict(int)
    for name, parameters in sweep.parameters.items():
        found[parse_format(row.assignment[name]).bits] += parameters
    return dict(sorted(found.items()))


def _shares(sweep: Sweep) -> Figure:
    """A panel a strategy, a bar a budget: the share of the blocks' parameters at each width."""
    names, columns = strategies(sweep), budgets(sweep)
    lines = math.ceil(len(names) / PANELS)
    figure = _figure(2.0 + 2.6 * min(PANELS, len(names)), 0.6 + 2.4 * lines)
    panels = figure.subplots(lines, min(PANELS, len(names)), squeeze=False, sharey=True).flat
    total = sum(sweep.parameters.values())
    used = sorted({bits for row in sweep.rows for bits in widths(sweep, row)})
    for strategy, axes in zip(names, panels, strict=False):
        found = [widths(sweep, rows_of(sweep, strategy, budget)[0]) for budget in columns]
        bottom = [0.0] * len(columns)
        for bits in used:
            share = [row.get(bits, 0) / total for row in found]
            axes.bar(columns, share, bottom=bottom, color=width_colour(bits), label=f"{bits} bits", width=0.8)
            bottom = [a + b for a, b in zip(bottom, share, strict=True)]
        axes.set_title(strategy)
        axes.tick_params(axis="x", rotation=45)
    _hide_rest(panels)
    figure.supxlabel("budget")
    figure.supylabel("share of the blocks' parameters")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    return figure


def _maps(sweep: Sweep, strategy: str) -> Figure:
    """A panel a budget, projections over blocks, coloured by width: GAMMA's figures 4 and 5."""
    projections = list(dict.fromkeys(_projection(name) for name in sweep.parameters))
    blocks = sorted({index for name in sweep.parameters if (index := block_index(name)) is not None})
    columns = budgets(sweep)
    wide, lines = min(PANELS, len(columns)), math.ceil(len(columns) / PANELS)
    figure = _figure(2.2 + wide * (0.8 + 0.09 * len(blocks)), 0.8 + lines * (0.6 + 0.2 * len(projections)))
    panels = figure.subplots(lines, wide, squeeze=False, sharey=True).flat
    colours = ListedColormap([width_colour(bits) for bits in WIDTHS])
    norm = BoundaryNorm([bits - 0.5 for bits in (*WIDTHS, 9)], colours.N)
    image = None
    for budget, axes in zip(columns, panels, strict=False):
        row = rows_of(sweep, strategy, budget)[0]
        table = _table(sweep, row, projections, blocks)
        image = axes.imshow(table, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        axes.set_title(f"{budget}: {row.payload_bits:.3f} bits", fontsize=8)
        axes.set_yticks(range(len(projections)), [p.rpartition(".")[2] for p in projections], fontsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _hide_rest(panels)
    assert image is not None, "a sweep has a budget"
    figure.colorbar(image, ax=figure.axes, ticks=list(WIDTHS), label="bits")
    figure.suptitle(strategy)
    figure.supxlabel("block")
    return figure


def _table(sweep: Sweep, row: Row, projections: list[str], blocks: list[int]) -> list[list[float]]:
    """Mean bits, a line a projection, a column a block; nan where there is no such weight."""
    sums = [[0.0] * len(blocks) for _ in projections]
    counts = [[0] * len(blocks) for _ in projections]
    for name, parameters in sweep.parameters.items():
        index = block_index(name)
        if index is not None:
            y, x = projections.index(_projection(name)), blocks.index(index)
            sums[y][x] += parameters * parse_format(row.assignment[name]).bits
            counts[y][x] += parameters
    return [
        [s / n if n else math.nan for s, n in zip(*lines, strict=True)]
        for lines in zip(sums, counts, strict=True)
    ]


def _projection(weight: str) -> str:
    """The weight's path without its block; all parts of a weight that was cut by rows count together."""
    return without_block(weight.partition(".weight")[0])


def width_colour(bits: float) -> Any:
    """One colour a width, the same in every figure: dark is narrow."""
    return colormaps["viridis"](WIDTHS[max(1, round(bits))])


def _hide_rest(panels: Any) -> None:
    """What the iterator over panels has left stays empty."""
    for axes in panels:
        axes.set_axis_off()
