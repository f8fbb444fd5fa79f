"""A study as tables and files: study.md, study.csv, study.json. Prints nothing."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from gammac import __version__
from gammac.files import write_atomically
from gammac.study.estimate import RowEstimate
from gammac.study.run import FULL, Figures, Row, Study
from gammac.sweep_report import NOTHING, Grid

# how the study heads its columns; other files keep their names
TITLES: Final = {
    "piqa": "PIQA", "arc_easy": "ARC-e", "arc_challenge": "ARC-c", "hellaswag": "HellaSwag",
    "winogrande": "Wino",
}  # fmt: skip
FULL_BITS: Final = "32"
ESTIMATED: Final = ("calibration", "quantization", "evaluation")
Cell = Callable[[Figures], str]


def grids(study: Study) -> Iterator[Grid]:
    """The study's table; distances to full precision; what rows take, in bits, bytes and time."""
    yield _grid(study, "Perplexity and zero-shot accuracy", _quality(study))
    if study.windows:
        yield _grid(study, "Distance to full precision", _distance(study))
    yield _grid(study, "Storage and cost", COSTS)


def _grid(study: Study, title: str, columns: dict[str, Cell]) -> Grid:
    head = ("method", "#W", "#A", "#G", *columns)
    rows, before = [], ""
    for row in study.rows:
        name = "" if row.spec.name == before else row.spec.name
        before = row.spec.name
        rows.append((name, *_bits(row), *_cells(row, columns)))
    return Grid(title, head, tuple(rows))


def _bits(row: Row) -> tuple[str, str, str]:
    """Headline bits of weights, bits of activations, group."""
    if row.spec.name == FULL:
        return FULL_BITS, FULL_BITS, NOTHING
    group = row.spec.group if row.spec.group.isdigit() else NOTHING
    return f"{row.spec.bits:g}", row.spec.activations or FULL_BITS, group


def _cells(row: Row, columns: dict[str, Cell]) -> Iterator[str]:
    """What was found; for a row without figures what became of it, in the first cell."""
    if row.figures is not None:
        yield from (cell(row.figures) for cell in columns.values())
        return
    yield row.status
    yield from [NOTHING] * (len(columns) - 1)


def _quality(study: Study) -> dict[str, Cell]:
    columns: dict[str, Cell] = {"true bits": lambda f: f"{f.storage.true_bits:.3f}"}
    for name in study.windows:
        columns[f"PPL {name}"] = lambda f, name=name: ppl(f.texts[name].ppl)  # type: ignore[misc]
    for name in study.examples:
        columns[TITLES.get(name, name)] = lambda f, name=name: _percent(f.tasks[name])  # type: ignore[misc]
    if study.examples:
        columns["Avg."] = lambda f: _percent(f.mean_accuracy)
    return columns


def _distance(study: Study) -> dict[str, Cell]:
    columns: dict[str, Cell] = {}
    for name in study.windows:
        columns[f"KL {name}, nats"] = lambda f, name=name: _number(f.texts[name].kl)  # type: ignore[misc]
        columns[f"same top token {name}"] = lambda f, name=name: _percent(f.texts[name].top1)  # type: ignore[misc]
    return columns


COSTS: Final[dict[str, Cell]] = {
    "payload bits": lambda f: f"{f.storage.payload_bits:.3f}",
    "true bits": lambda f: f"{f.storage.true_bits:.3f}",
    "whole-model bits": lambda f: f"{f.storage.whole_model_bits:.3f}",
    "MB": lambda f: f"{f.storage.bytes / 1e6:.1f}",
    "calibration, s": lambda f: _seconds(f.seconds.calibration),
    "candidates, s": lambda f: _seconds(f.seconds.candidates),
    "quantization, s": lambda f: _seconds(f.seconds.total),
    "peak GB": lambda f: NOTHING if f.peak_bytes is None else f"{f.peak_bytes / 1e9:.1f}",
}


def estimate_grid(model: str, found: Sequence[RowEstimate]) -> Grid:
    """What a dry run tells."""
    rows = [
        (e.spec.label, *(_duration(getattr(e, name)) for name in ESTIMATED), e.said)
        if not e.said
        else (e.spec.label, NOTHING, NOTHING, NOTHING, e.said)
        for e in found
    ]
    total = ("all", *(_duration(sum(getattr(e, name) for e in found)) for name in ESTIMATED), "")
    title = f"{model} (dry run): about {_duration(sum(e.seconds for e in found))}"
    return Grid(title, ("row", *ESTIMATED, ""), (*rows, total))


def ppl(value: float | None) -> str:
    """As the study writes it: 8.53, 127.9, 6.7E4."""
    if value is None:
        return "not a number"
    if value < 1000:
        return f"{value:.2f}" if value < 100 else f"{value:.1f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}E{int(exponent)}"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:#.3g}"


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def line(row: Row) -> str:
    """A finished row in a line."""
    if row.figures is None:
        return f"{row.spec.label}: {row.status}"
    found = [f"{row.figures.storage.true_bits:.3f} true bits"]
    found += [f"perplexity {ppl(on.ppl)} on {name}" for name, on in row.figures.texts.items()]
    if row.figures.tasks:
        found.append(f"accuracy {_percent(row.figures.mean_accuracy)}")
    return f"{row.spec.label}: {', '.join(found)}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def headline(study: Study) -> str:
    """What was measured, and on what."""
    texts = [f"{name} ({n} windows of {length} tokens)" for name, (n, length) in study.windows.items()]
    tasks = [f"{TITLES.get(name, name)} ({n} examples)" for name, n in study.examples.items()]
    windows, length = study.calibration
    return (
        f"{study.model}, measured on {', '.join([*texts, *tasks])}; calibrated on {windows} windows of "
        f"{length} tokens; embedding and head in {study.options['table'].replace('+', ' or ')}"
    )


NOTES: Final = (
    "#W: headline bits, #A: bits of activations, #G: group. True bits: everything stored for the linears of "
    "the blocks, by their number of weights; payload bits: the codes alone; whole-model bits and MB: all "
    "weights, norms in 32 bits. Tasks: accuracy in percent, zero-shot. Seconds are those of the run that did "
    "the work; calibration is shared by rows."
)


def remarks(study: Study) -> Iterator[str]:
    """Why rows have no figures."""
    for said, rows in groupby((r for r in study.rows if r.said), key=lambda row: (row.status, row.said)):
        yield f"{said[0]}: {', '.join(row.spec.label for row in rows)}: {said[1]}"


def recipes(study: Study) -> Iterator[str]:
    """How each method is made, as options of `gammac compile`."""
    made = dict.fromkeys((row.spec.name, row.spec.recipe) for row in study.rows if row.spec.recipe)
    yield from (f"- {name}: `{recipe}`" for name, recipe in made)


# ---- files --------------------------------------------------------------------------------------


def write(study: Study, folder: Path) -> list[Path]:
    """study.json with everything, study.csv a line a row, study.md the tables. Raises CompileError."""
    texts = {"study.md": to_markdown(study), "study.csv": to_csv(study), "study.json": to_json(study)}
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [folder / name for name in texts]


def to_markdown(study: Study) -> str:
    """The tables under a headline."""
    tables = [grid.to_markdown() for grid in grids(study)]
    made = "\n".join(recipes(study))
    return (
        "\n".join([f"# Study: {study.model}\n", f"{headline(study)}.\n", *tables, f"{NOTES}\n", made]) + "\n"
    )


def to_json(study: Study) -> str:
    """All that is known."""
    found = asdict(study)
    for entry, row in zip(found["rows"], study.rows, strict=True):
        if row.figures is not None:
            entry["figures"]["mean_accuracy"] = row.figures.mean_accuracy
    return json.dumps({"gammac": __version__, **found}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(study: Study) -> str:
    """A line a row; what is not known is empty."""
    lines = [_flat(study, row) for row in study.rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(study: Study, row: Row) -> dict[str, Any]:
    spec, figures = row.spec, row.figures
    own = {"method": spec.name, "bits": spec.bits, "activations": spec.activations, "group": spec.group}
    return {**own, "status": row.status, **_flat_figures(study, figures), "said": row.said}


def _flat_figures(study: Study, figures: Figures | None) -> dict[str, Any]:
    names = _columns(study)
    if figures is None:
        return dict.fromkeys(names)
    values: list[Any] = [*asdict(figures.storage).values()]
    for name in study.windows:
        on = figures.texts[name]
        values += [on.ppl, on.kl, on.top1]
    values += [*(figures.tasks[name] for name in study.examples), figures.mean_accuracy]
    values += [*asdict(figures.seconds).values(), figures.seconds.total, figures.peak_bytes]
    return dict(zip(names, values, strict=True))


def _columns(study: Study) -> Sequence[str]:
    storage = ("payload_bits", "true_bits", "whole_model_bits", "bytes", "packed_bytes")
    texts = [f"{what} {name}" for name in study.windows for what in ("ppl", "kl", "top1")]
    seconds = [f"{name}_seconds" for name in ("calibration", "candidates", "rest", "total")]
    return (*storage, *texts, *study.examples, "mean_accuracy", *seconds, "peak_bytes")
