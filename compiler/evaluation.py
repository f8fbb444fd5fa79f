"""Evaluating an artifact: which sessions, tokenizers and texts a user's words stand for."""

from collections.abc import Sequence
from pathlib import Path

from gammac.driver import resolve
from gammac.progress import Progress
from gammac.runtime.artifact import is_artifact, open_artifact
from gammac.runtime.evaluate import compare, compare_outputs, perplexity, window_length, windows_for
from gammac.runtime.generate import load_tokenizer
from gammac.runtime.reference import TransformersSession, load_model
from gammac.runtime.session import open_session
from gammac.runtime.tasks import accuracy, read_task


def evaluate_artifact(
    folder: Path, text: Path | None, windows: int, reference: str | None, tasks: Sequence[Path],
    limit: int | None, threads: int | None, progress: Progress,
) -> dict[str, float | int | str]:  # fmt: skip
    """Figures by name. Raises CompileError for what can't be read or doesn't fit together."""
    session = open_session(folder, threads)
    tokenizer = load_tokenizer(folder)
    found: dict[str, float | int | str] = {}
    if is_artifact(folder):
        found["activations"] = open_artifact(folder, verify=False).manifest.activations or "unknown"
    if text is not None:
        tokens = windows_for(text, tokenizer, windows, window_length(session))
        if reference is not None:
            other = TransformersSession(load_model(resolve(reference).folder))
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
