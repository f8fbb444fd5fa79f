"""From a model's name to a checkpoint folder whose block linears are 2:4, for `gammac compile` to take on."""

import csv
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import torch

from gammac.cache import key_of
from gammac.diagnostics import CompileError
from gammac.driver import resolve, tokenizer_files
from gammac.files import write_atomically
from gammac.formats import is_two_four
from gammac.frontend.source import quiet
from gammac.models_zoo.texts import default_calibration_text
from gammac.passes.masks.bypass import write_bypass
from gammac.passes.masks.methods import METHODS, Dense
from gammac.passes.masks.trainer import Trainer
from gammac.progress import Progress, no_progress
from gammac.runtime.staging import check_writable, staging
from gammac.sparsify.model import LanguageModel, load_model
from gammac.texts import read_text, token_windows
from gammac.weights import digest_of

CURVES: Final = "curves.csv"
REPORT: Final = "sparsify.json"


@dataclass(frozen=True)
class SparsifyRequest:
    """Everything that decides a sparsified checkpoint. `options` are fields of the method."""

    model: str
    method: str = "sparseforge"
    tokens: int = 1_000_000
    length: int = 256
    batch: int = 4
    rate: float = 1e-4
    seed: int = 0
    text: Path | None = None
    distill: bool = True
    bypass: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps that the tokens are enough for."""
        return self.tokens // (self.batch * self.length)


def make_method(name: str, options: Mapping[str, Any]) -> Dense:
    """A method by name. Raises CompileError for an unknown one, and for options that it lacks."""
    if name not in METHODS:
        raise CompileError(f"no method {name!r}", hint=f"there are {', '.join(METHODS)}")
    known = {f.name for f in fields(METHODS[name])} - {"state"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise CompileError(
            f"{name} has no {', '.join(unknown)}", hint=f"it has {', '.join(sorted(known)) or 'no options'}"
        )
    return METHODS[name](**options)


def sparsify(request: SparsifyRequest, out: Path, progress: Progress = no_progress) -> Trainer:
    """Train, and leave a checkpoint with its curves at `out`. A killed run goes on from its last checkpoint.

    Raises CompileError; then nothing is left at `out`.
    """
    check_writable(out, True)
    method = make_method(request.method, request.options)
    if request.steps < 1:
        raise CompileError(
            f"{request.tokens} tokens are less than a step of {request.batch} windows of {request.length}",
            hint="grant more --tokens, or a smaller --batch or --length",
        )
    if request.bypass and not (method.sparse and method.trains_weights):
        raise CompileError(
            f"{method.name} trains no bypass", hint="leave out --bypass, or train another method"
        )
    text = read_text(request.text) if request.text else default_calibration_text()
    source = resolve(request.model)
    model = load_model(source)
    windows = token_windows(text, source.tokenizer, request.length, None)
    problem = LanguageModel(model, windows, request.batch, request.seed, request.distill, request.bypass)
    trainer = Trainer(problem, method, request.steps, request.rate, request.seed)
    key = key_of(repr(method), repr(request), digest_of(problem.parameters), digest_of({"windows": windows}))
    saved = out.parent / f"{out.name}.training.safetensors"
    trainer.run(saved, key, progress)
    with staging(out) as folder:
        _write(folder, trainer, request)
        for path in tokenizer_files(source):
            shutil.copyfile(path, folder / path.name)
    saved.unlink(missing_ok=True)
    return trainer


def _write(folder: Path, trainer: Trainer, request: SparsifyRequest) -> None:
    problem = trainer.problem
    assert isinstance(problem, LanguageModel)
    for name in trainer.sparse:
        if not bool(is_two_four(problem.parameters[name]).all()):
            raise CompileError("is not 2:4 behind its training", loc=name, hint="report this: it is a bug")
    saving: Any = problem.adopt()
    with quiet():
        saving.save_pretrained(folder)
    write_bypass(folder, problem.parameters)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(trainer.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(trainer.rows)
    write_atomically(folder / CURVES, table.getvalue().encode())
    told = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(request).items()}
    told |= {"steps": request.steps, "sparse": list(trainer.sparse), "loss": trainer.report}
    write_atomically(folder / REPORT, (json.dumps(told, indent=1) + "\n").encode())


def perplexity(loss: float) -> float:
    """Of a cross-entropy in nats a token."""
    return float(torch.tensor(loss).exp())
