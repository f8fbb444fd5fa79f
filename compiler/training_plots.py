"""Figures of a training, PNG and SVG: loss, λ and average bits, or binarity and density of masks, over the
steps, and the bits of each weight.

Equal histories give equal bytes. Imports matplotlib (the extra `plots`), so import this only where figures
are drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from gammac.passes.training.trainer import smoothed_losses
from gammac.plots import METADATA, RC, WIDTHS, save, width_colour

Rows = Sequence[Mapping[str, Any]]
PANELS: Final = (
    ("loss", "loss, nats"),
    ("average_bits", "average bits"),
    ("lambda", "λ"),
    ("binarity", "4 m (1 − m) of masks"),
    ("density", "share kept"),
)


def draw_training(history: Rows, folder: Path) -> list[Path]:
    """Every figure in both forms; the paths. Raises CompileError when one can't be written.

    What the history doesn't have, such as the bits of another method, is left out.
    """
    with rc_context(RC):
        figures = {"training": _curves(history)}
        looks = [row for row in history if "bits" in row]
        if looks:
            figures["bits"] = _bits(looks)
        return [save(f, folder / f"{name}.{kind}") for name, f in figures.items() for kind in METADATA]


def _curves(history: Rows) -> Figure:
    """A panel for each of loss, average bits and so on, over the steps; a line where masks are frozen."""
    panels = [(key, label) for key, label in PANELS if key in history[0]]
    figure = Figure((6.4, 0.6 + 1.9 * len(panels)), layout="constrained")
    steps = [row["step"] for row in history]
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for (key, label), one in zip(panels, axes, strict=True):
        one.plot(steps, [row[key] for row in history], color="C0", linewidth=0.8,
                 alpha=0.4 if key == "loss" else 1.0)  # fmt: skip
        if key == "loss":
            one.plot(steps, list(smoothed_losses(history)), color="C0", label="exponential mean")
            one.legend(frameon=False)
        one.set_ylabel(label)
        one.grid(True, axis="y", alpha=0.2)
    frozen = next((row["step"] for row in history if row.get("frozen")), None)
    for one in axes if frozen is not None else ():
        one.axvline(frozen, color="C7", linewidth=0.8, linestyle=":")
    axes[-1].set_xlabel("step" if frozen is None else "step (dotted: the final masks)")
    return figure


def _bits(looks: Rows) -> Figure:
    """A line a weight, a column a look of the controller, coloured by width."""
    names = list(looks[0]["bits"])
    figure = Figure((6.4, 1.2 + 0.16 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = ListedColormap([width_colour(bits) for bits in WIDTHS])
    norm = BoundaryNorm([bits - 0.5 for bits in (*WIDTHS, 9)], colours.N)
    table = [[row["bits"][name] for row in looks] for name in names]
    image = axes.imshow(table, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=6)
    places = sorted({0, len(looks) // 2, len(looks) - 1})
    axes.set_xticks(places, [str(looks[place]["step"]) for place in places])
    axes.set_xlabel("step at which the controller looked")
    figure.colorbar(image, ax=axes, ticks=list(WIDTHS), label="bits")
    return figure
