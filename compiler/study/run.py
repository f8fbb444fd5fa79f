"""Run a study row by row. A row that is finished stands in the cache, and costs nothing the second time.

A row that fails keeps its place, with what was said; so does one whose quantizer this build lacks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from gammac.cache import key_of
from gammac.diagnostics import CompileError
from gammac.driver import Plan, Request, context_of, demand_predictions, make_plan, model_digest
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.raise_patterns import RaisePatterns
from gammac.pipeline import Context, Pipeline
from gammac.progress import Progress, no_progress
from gammac.runtime.evaluate import WINDOW, windows_for
from gammac.runtime.tasks import read_task
from gammac.study.make import Seconds, key_of_row, make, passes_of, plan_of
from gammac.study.measure import Harness, OnText, Text
from gammac.study.rows import RowSpec
from gammac.study.storage import Storage, float_storage, storage_of
from gammac.texts import read_text

FULL: Final = "full precision"
# the study's order of columns; other tasks come behind these, by name
TASKS: Final = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
DONE, FAILED, MISSING = "done", "failed", "missing"


@dataclass(frozen=True)
class StudyRequest:
    """`request` is what rows leave open. Texts: the first `windows` windows of 1024 tokens of each.

    Tasks: every .jsonl file of a folder, or one such file; the first `items` examples, all if None.
    """

    request: Request
    rows: tuple[RowSpec, ...]
    texts: tuple[Path, ...] = ()
    windows: int = 100
    tasks: Path | None = None
    items: int | None = None


@dataclass(frozen=True)
class Figures:
    """What was found of one row."""

    storage: Storage
    seconds: Seconds
    peak_bytes: int | None
    texts: dict[str, OnText]
    tasks: dict[str, float]

    @property
    def mean_accuracy(self) -> float | None:
        """Over the tasks; None without any."""
        return sum(self.tasks.values()) / len(self.tasks) if self.tasks else None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Figures":
        """The inverse of `asdict`."""
        return cls(
            Storage(**record["storage"]),
            Seconds(**record["seconds"]),
            record["peak_bytes"],
            {name: OnText(**found) for name, found in record["texts"].items()},
            record["tasks"],
        )


@dataclass(frozen=True)
class Row:
    """A row of the table: `figures` when `status` is done, else `said` says why not."""

    spec: RowSpec
    status: str
    figures: Figures | None = None
    said: str = ""


@dataclass(frozen=True)
class Study:
    """All rows, full precision first. `windows`: text → (how many, tokens in each); `examples`: by task."""

    model: str
    model_digest: str
    target: str
    windows: dict[str, tuple[int, int]]
    examples: dict[str, int]
    calibration: tuple[int, int]  # windows, tokens in each
    options: dict[str, Any]
    rows: tuple[Row, ...] = field(default=())

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that ended in an error."""
        return tuple(row for row in self.rows if row.status == FAILED)


@dataclass(frozen=True)
class Prepared:
    """A study that has been found possible: nothing long has been done yet."""

    wish: StudyRequest
    plan: Plan
    ctx: Context
    harness: Harness

    def key(self, row: RowSpec) -> str:
        """Everything that the figures of a row depend on."""
        return key_of("study row", key_of_row(plan_of(row, self.plan), self.ctx), self.harness.digest)

    def is_done(self, row: RowSpec) -> bool:
        """Whether the cache has the row."""
        return self.ctx.cache.has_record(self.key(row))

    def study(self, rows: Sequence[Row] = ()) -> Study:
        """What is known before any row is run, and these rows."""
        calibration = self.ctx.calibration
        assert calibration is not None, "with a tokenizer there is calibration text"
        count, length = calibration.tokens.shape
        request = self.wish.request
        return Study(
            self.plan.source.name,
            model_digest(self.plan.module),
            self.plan.target.name,
            {t.name: (t.tokens.shape[0], t.tokens.shape[1]) for t in self.harness.texts},
            {t.name: len(t.examples) for t in self.harness.tasks},
            (count, length),
            {"seed": request.seed, "calibration": calibration.digest, **asdict(request.choices)},
            tuple(rows),
        )


def prepare(wish: StudyRequest, cache: Path | None = None, progress: Progress = no_progress) -> Prepared:
    """Find and check everything that can be known early. Raises CompileError."""
    if not wish.texts and wish.tasks is None:
        raise CompileError("nothing to measure rows on", hint="give --text FILE or --tasks DIR")
    _refuse_texts(wish.texts)
    tasks = [read_task(path, wish.items) for path in _task_files(wish.tasks)]
    plan = make_plan(FULL_ROW.request(wish.request), cache, artifact=False)
    demand_predictions(plan, "a study")
    for row in wish.rows:
        if not row.lacking:
            passes_of(plan_of(row, plan))
    ctx = context_of(plan, progress)
    texts = list(_texts(wish, plan))
    reference = Pipeline((FoldConstants(), RaisePatterns())).run(plan.module, ctx)
    context = int(str(plan.module.attrs.get("max_positions", WINDOW)))
    return Prepared(wish, plan, ctx, Harness(reference, ctx, plan.source.tokenizer, texts, tasks, context))


# no quantizer is asked for: its options only have to be ones that every model takes
FULL_ROW: Final = RowSpec(FULL, 32, "", "", {"quantizer": "rtn", "formats": "w8g64"})


def run_study(ready: Prepared, watch: Callable[[Study], None] = lambda _: None) -> Study:
    """Every row in order; `watch` sees the study after each. A row's CompileError stays in its row."""
    rows: list[Row] = []
    for row in _run(ready):
        rows.append(row)
        watch(ready.study(rows))
    return ready.study(rows)


def _run(ready: Prepared) -> Iterator[Row]:
    yield Row(FULL_ROW, DONE, _full(ready))
    for spec in ready.wish.rows:
        if spec.lacking:
            yield Row(spec, MISSING, said=f"this build has {spec.lacking}")
            continue
        try:
            found = ready.ctx.cache.record(ready.key(spec), partial(_measured, ready, spec))
        except CompileError as error:
            yield Row(spec, FAILED, said=str(error).splitlines()[0])
        else:
            yield Row(spec, DONE, Figures.from_record(found))


def _measured(ready: Prepared, spec: RowSpec) -> dict[str, Any]:
    plan = plan_of(spec, ready.plan)
    made = make(plan, ready.ctx)
    storage = storage_of(made.module, ready.ctx.store, plan.target, _parameters(ready))
    texts, tasks = ready.harness.on_texts(made.module), ready.harness.on_tasks(made.module)
    return asdict(Figures(storage, made.seconds, made.peak_bytes, texts, tasks))


def _full(ready: Prepared) -> Figures:
    harness = ready.harness
    storage = float_storage(ready.plan.module, _parameters(ready))
    texts, tasks = harness.on_texts(harness.reference), harness.on_tasks(harness.reference)
    return Figures(storage, Seconds(0.0, 0.0, 0.0), None, texts, tasks)


def _parameters(ready: Prepared) -> int:
    return sum(w.type.numel() for w in ready.plan.module.weights.values())


# ---- texts and tasks ----------------------------------------------------------------------------


def _refuse_texts(paths: Sequence[Path]) -> None:
    """Raise CompileError for a text that can't be read, and for two of one name."""
    names = [path.stem for path in paths]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice:
        raise CompileError(f"two texts are called {twice}", hint="rename one: columns have the files' names")
    for path in paths:
        read_text(path)


def _texts(wish: StudyRequest, plan: Plan) -> Iterator[Text]:
    length = min(WINDOW, int(str(plan.module.attrs.get("max_positions", WINDOW))))
    for path in wish.texts:
        yield Text(path.stem, windows_for(path, plan.source.tokenizer, wish.windows, length))


def _task_files(place: Path | None) -> list[Path]:
    if place is None:
        return []
    found = [place] if place.is_file() else list(place.glob("*.jsonl"))
    if not found:
        raise CompileError(
            f"{place} has no tasks", hint="give a folder of .jsonl files, as gammac eval reads"
        )
    order = {name: index for index, name in enumerate(TASKS)}
    return sorted(found, key=lambda path: (order.get(path.stem, len(order)), path.stem))
