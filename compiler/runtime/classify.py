"""Classification of texts: rows of a .jsonl file, what a model says of them, and four scores.

    {"text": "…", "label": "…"}

A label is a string or a number. Texts run alone, so that nothing is padded; longer ones are cut at the end.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.progress import Progress, no_progress
from gammac.runtime.session import Predictor
from gammac.texts import read_text

FORM: Final = 'a line is {"text": "…", "label": "…"}'


@dataclass(frozen=True)
class LabelledText:
    """A text and the name of its class."""

    text: str
    label: str


@dataclass(frozen=True)
class ClassScores:
    """Shares between 0 and 1; precision, recall and F1 are means over the classes (macro)."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    examples: int


def read_rows(path: Path) -> list[LabelledText]:
    """The rows of a file. Raises CompileError naming the line that can't be read."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_row(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise CompileError(f"no labelled text: {error!r}", loc=f"{path}:{number}", hint=FORM) from error
    if not found:
        raise CompileError(f"{path} has no rows", hint=FORM)
    return found


def _row(data: dict[str, Any]) -> LabelledText:
    text, label = data["text"], data["label"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("text is no text")
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise ValueError(f"label is {type(label).__name__}")
    return LabelledText(text, str(label))


def encode(tokenizer: Any, text: str, length: int) -> Tensor:
    """A text as the model reads it, i64 [tokens], with the tokenizer's special tokens; `length` at most."""
    ids = tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def indices(rows: Sequence[LabelledText], labels: Sequence[str]) -> list[int]:
    """The place of each row's label. Raises CompileError for a label that the model has not."""
    places = {label: index for index, label in enumerate(labels)}
    foreign = sorted({row.label for row in rows} - places.keys())
    if foreign:
        raise CompileError(
            f"the model has no class {foreign[0]!r}", hint=f"its classes are {', '.join(labels)}"
        )
    return [places[row.label] for row in rows]


def class_scores(predicted: Sequence[int], gold: Sequence[int], classes: int) -> ClassScores:
    """Accuracy, and macro precision TP/(TP+FP), recall TP/(TP+FN), F1 = 2PR/(P+R); 0/0 counts as 0.

    Raises ValueError for no examples, or for lists of two lengths.
    """
    if not gold or len(predicted) != len(gold):
        raise ValueError(f"{len(predicted)} predictions for {len(gold)} examples")
    pairs = list(zip(predicted, gold, strict=True))
    precisions, recalls, f1s = [], [], []
    for label in range(classes):
        hits = sum(p == g == label for p, g in pairs)
        precision = _share(hits, sum(p == label for p in predicted))
        recall = _share(hits, sum(g == label for g in gold))
        precisions.append(precision)
        recalls.append(recall)
        f1s.append(_share(2 * precision * recall, precision + recall))
    accuracy = sum(p == g for p, g in pairs) / len(pairs)
    precision, recall, f1 = (sum(values) / classes for values in (precisions, recalls, f1s))
    return ClassScores(accuracy, precision, recall, f1, len(pairs))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def classify(
    session: Predictor, tokenizer: Any, rows: Sequence[LabelledText], labels: Sequence[str],
    progress: Progress = no_progress,
) -> ClassScores:  # fmt: skip
    """The scores of a model on rows. Raises CompileError for a label that the model has not."""
    gold = indices(rows, labels)
    texts = [encode(tokenizer, row.text, session.context) for row in rows]
    predicted = [
        int(session.logits(text[None].numpy())[0].argmax()) for text in progress(texts, "classification")
    ]
    return class_scores(predicted, gold, len(labels))
