"""What a sweep found as tables and files: sweep.json, sweep.md, sweep.csv. Prints nothing."""

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gammac import __version__
from gammac.diagnostics import CompileError
from gammac.files import write_atomically
from gammac.sweep import CALIBRATION, Row, Sweep

NOTHING: Final = "–"


@dataclass(frozen=True)
class Grid:
    """A table of texts; `best` are the cells (row, column) to be set in bold."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()

    def to_markdown(self) -> str:
        """As GitHub reads it."""
        lines = [f"## {self.title}", "", _line(self.head), _line(["---"] * len(self.head))]
        for r, row in enumerate(self.rows):
            lines.append(_line([f"**{c}**" if (r, i) in self.best else c for i, c in enumerate(row)]))
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def grids(sweep: Sweep) -> Iterator[Grid]:
    """Perplexity, KL, agreement and bits by strategy and budget; costs by strategy."""
    yield _measure(sweep, "Perplexity", lambda r: r.ppl, min)
    yield _measure(sweep, "KL to full precision, nats", lambda r: r.kl, min)
    yield _measure(sweep, "Share of positions where the top token agrees", lambda r: r.top1, max)
    yield _measure(sweep, "Payload bits", lambda r: r.payload_bits)
    yield _measure(sweep, "True bits", lambda r: r.true_bits)
    yield _measure(sweep, "MB of weights", lambda r: r.bytes / 1e6)
    yield _costs(sweep)


def strategies(sweep: Sweep) -> list[str]:
    """In the order that they were asked for."""
    return list(dict.fromkeys(row.strategy for row in sweep.rows))


def budgets(sweep: Sweep) -> list[str]:
    """In the order that they were asked for."""
    return list(dict.fromkeys(row.budget for row in sweep.rows))


def rows_of(sweep: Sweep, strategy: str, budget: str) -> list[Row]:
    """One for each seed."""
    return [row for row in sweep.rows if (row.strategy, row.budget) == (strategy, budget)]


def _measure(
    sweep: Sweep, title: str, value: Callable[[Row], float],
    better: Callable[[list[float]], float] | None = None,
) -> Grid:  # fmt: skip
    """Strategies by budgets; means over the seeds, with the standard deviation where there are several."""
    columns = budgets(sweep)
    values = [[[value(r) for r in rows_of(sweep, s, b)] for b in columns] for s in strategies(sweep)]
    cells = [(s, *map(_cell, row)) for s, row in zip(strategies(sweep), values, strict=True)]
    best = set()
    for column in range(len(columns)) if better else ():
        means = [statistics.fmean(row[column]) for row in values]
        best |= {(r, column + 1) for r, mean in enumerate(means) if better and mean == better(means)}
    return Grid(title, ("strategy", *columns), tuple(cells), frozenset(best))


def _cell(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):#.4g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"


def _costs(sweep: Sweep) -> Grid:
    """Seconds by strategy: the most that a seed or budget took."""
    head = ("candidates", "scoring", "allocation", "total")
    rows = []
    for strategy in strategies(sweep):
        taken = [row.seconds for row in sweep.rows if row.strategy == strategy]
        rows.append((strategy, *(_longest([getattr(t, name) for t in taken]) for name in head)))
    return Grid("Seconds of the compile", ("strategy", *head), tuple(rows))


def _longest(seconds: Sequence[float | None]) -> str:
    known = [s for s in seconds if s is not None]
    return f"{max(known):.1f}" if known else NOTHING


def headline(sweep: Sweep) -> str:
    """What was measured, on what, and what full precision reaches."""
    count, length = sweep.windows
    text = f"{sweep.model} on {sweep.text}, {count} windows of {length} tokens: "
    text += f"perplexity {sweep.full.ppl:.3f} in full precision"
    if sweep.text == CALIBRATION:
        text += ". This is the text that chose the codes and scores: give --text FILE for a figure to report"
    return text


# ---- files --------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raise CompileError now if nothing could be written there after hours of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompileError(
            f"{folder} can't be written: {error.strerror}", hint="choose another folder"
        ) from error


def write(sweep: Sweep, folder: Path) -> list[Path]:
    """sweep.json with everything, sweep.csv a line a row, sweep.md the tables. Raises CompileError."""
    texts = {"sweep.json": to_json(sweep), "sweep.csv": to_csv(sweep), "sweep.md": to_markdown(sweep)}
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [folder / name for name in texts]


def to_json(sweep: Sweep) -> str:
    """All that is known, assignments included."""
    return json.dumps({"gammac": __version__, **asdict(sweep)}, indent=1, ensure_ascii=False) + "\n"


def to_csv(sweep: Sweep) -> str:
    """A line for each row, full precision first, without assignments."""
    lines = [_flat(row) for row in (sweep.full, *sweep.rows)]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    fields = {k: v for k, v in asdict(row).items() if k not in ("assignment", "seconds")}
    seconds = {**asdict(row.seconds), "total": row.seconds.total}
    return {**fields, **{f"{name}_seconds": value for name, value in seconds.items()}}


def to_markdown(sweep: Sweep) -> str:
    """The tables under a headline."""
    return "\n".join(
        [f"# Sweep: {sweep.model}\n", headline(sweep) + ".\n", *(g.to_markdown() for g in grids(sweep))]
    )
