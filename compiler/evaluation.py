"""Evaluating an artifact: which sessions, tokenizers and texts a user's words stand for."""

from collections.abc import Sequence
from pathlib import Path

from gammac.diagnostics import CompileError
from gammac.driver import resolve
from gammac.frontend.source import Source
from gammac.progress import Progress
from gammac.runtime.artifact import is_artifact, open_artifact
from gammac.runtime.classify import classify, read_rows
from gammac.runtime.evaluate import compare, compare_outputs, perplexity, window_length, windows_for
from gammac.runtime.generate import load_tokenizer
from gammac.runtime.peers import open_predictor
from gammac.runtime.reference import TransformersSession, load_model
from gammac.runtime.tasks import accuracy, read_task


def evaluate_artifact(
    folder: Path, text: Path | None, windows: int, reference: str | None, tasks: Sequence[Path],
    limit: int | None, threads: int | None, progress: Progress, adapters: Path | None = None,
) -> dict[str, float | int | str]:  # fmt: skip
    """Figures by name. Raises CompileError for what can't be read or doesn't fit together."""
    if adapters is not None and not is_artifact(folder):
        raise CompileError(f"{folder} is no artifact: nothing else takes --adapters")
    session = open_predictor(folder, threads, adapters)
    original = resolve(reference) if reference is not None else None
    tokenizer = load_tokenizer(_tokenizer_folder(folder, original))
    found: dict[str, float | int | str] = {}
    labels: tuple[str, ...] = ()
    if is_artifact(folder):
        manifest = open_artifact(folder, verify=False).manifest
        found["activations"], labels = manifest.activations or "unknown", manifest.labels
    if labels and text is not None and original is None:
        found.update(vars(classify(session, tokenizer, read_rows(text), labels, progress)))
    elif text is not None:
        tokens = windows_for(text, tokenizer, windows, window_length(session))
        if original is not None:
            other = TransformersSession(load_model(original.folder))
            result = (compare_outputs if session.kind == "encoder" else compare)(
                session, other, tokens, progress
            )
        else:
            result = perplexity(session, tokens, progress)  # type: ignore[assignment]
        found.update({name.replace("_", " "): value for name, value in vars(result).items()})
    for path in tasks:
        result_ = accuracy(session, tokenizer, read_task(path, limit), progress)
        found[path.stem] = result_.accuracy
        found[f"{path.stem} examples"] = result_.examples
    return found


def _tokenizer_folder(path: Path, original: Source | None) -> Path:
    """An artifact has its own tokenizer; a file of another runtime takes that of the model that it is of."""
    if path.is_dir() or not path.exists():
        return path
    if original is None:
        raise CompileError(f"{path} has no tokenizer beside it", hint="give --reference MODEL")
    return original.folder
