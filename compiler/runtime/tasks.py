"""Zero-shot accuracy: the choice that a model finds likeliest.

A task is a .jsonl file of either form:

    {"query": "Question: …", "choices": ["…", "…"], "gold": 1}
    {"contexts": ["… so Sarah", "… so Maria"], "continuation": "always got …", "gold": 0}

In the first, each choice follows the query and its log-likelihood is divided by its length in
characters (acc_norm); in the second, one continuation follows each context, undivided. A space
joins the two unless the first ends in white space.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from gammac.diagnostics import CompileError
from gammac.progress import Progress, no_progress
from gammac.runtime.session import Predictor
from gammac.texts import read_text

BATCH_TOKENS: Final = 1024
"""Tokens of a batch, padding included: their logits over a large vocabulary are what fills the memory."""

FORMS: Final = 'a line is {"query", "choices", "gold"} or {"contexts", "continuation", "gold"}'


@dataclass(frozen=True)
class Option:
    """A text and what may follow it; the log-likelihood is divided by `weight`."""

    before: str
    after: str
    weight: int = 1


@dataclass(frozen=True)
class Example:
    """Options of which `gold` is right."""

    options: tuple[Option, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """The examples of a file; its name is the file's."""

    name: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Accuracy:
    """The share of `examples` whose right option is the likeliest."""

    task: str
    accuracy: float
    examples: int


def read_task(path: Path, limit: int | None = None) -> Task:
    """The first `limit` examples of a file. Raises CompileError naming the line that can't be read."""
    lines = [line for line in read_text(path).split("\n") if line.strip()][:limit]
    examples = []
    for number, line in enumerate(lines, 1):
        try:
            examples.append(_example(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise CompileError(
                f"no example of a task: {error!r}", loc=f"{path}:{number}", hint=FORMS
            ) from error
    if not examples:
        raise CompileError(f"{path} has no examples", hint=FORMS)
    return Task(path.stem, tuple(examples))


def _example(data: dict[str, Any]) -> Example:
    gold = int(data["gold"])
    if "choices" in data:
        options = tuple(_option(data["query"], choice, len(choice)) for choice in data["choices"])
    else:
        options = tuple(_option(context, data["continuation"], 1) for context in data["contexts"])
    if not 0 <= gold < len(options):
        raise ValueError(f"gold is {gold}, there are {len(options)} options")
    return Example(options, gold)


def _option(before: str, after: str, weight: int) -> Option:
    joint = "" if before[-1:].isspace() else " "
    return Option(before, joint + after, max(1, weight))


def accuracy(session: Predictor, tokenizer: Any, task: Task, progress: Progress = no_progress) -> Accuracy:
    """The share of right answers of a decoder."""
    options = [option for example in task.examples for option in example.options]
    scores = iter(log_likelihoods(session, tokenizer, options, progress))
    right = 0
    for example in task.examples:
        ranked = [next(scores) / option.weight for option in example.options]
        right += int(np.argmax(ranked)) == example.gold
    return Accuracy(task.name, right / len(task.examples), len(task.examples))


@dataclass(frozen=True)
class _Row:
    """Tokens of an option, of which those from `first` on are scored."""

    index: int
    tokens: Sequence[int]
    first: int


def log_likelihoods(
    session: Predictor, tokenizer: Any, options: Sequence[Option], progress: Progress = no_progress
) -> list[float]:
    """log P(after | before) in nats for each option."""
    rows = [_row(tokenizer, index, option, session.context) for index, option in enumerate(options)]
    found = [0.0] * len(options)
    for batch in progress(list(_batches(rows)), "log-likelihoods"):
        found_here = _score(session, batch)
        for row, score in zip(batch, found_here, strict=True):
            found[row.index] = score
    return found


def _row(tokenizer: Any, index: int, option: Option, context: int) -> _Row:
    whole = tokenizer(option.before + option.after, add_special_tokens=False)["input_ids"]
    before = tokenizer(option.before, add_special_tokens=False)["input_ids"]
    # a token may reach over the joint; then it belongs to what is scored
    same = next((i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), len(before))
    cut = max(0, len(whole) - context)
    return _Row(index, whole[cut:], max(1, min(same, len(whole) - 1) - cut))


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda r: -len(r.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _score(session: Predictor, batch: Sequence[_Row]) -> list[float]:
    tokens = np.zeros((len(batch), len(batch[0].tokens)), np.int64)
    for line, row in zip(tokens, batch, strict=True):
        # padding stands behind, where a causal model never looks
        line[: len(row.tokens)] = row.tokens
    logits = torch.from_numpy(session.logits(tokens))
    return [_log_likelihood(logits[i], row) for i, row in enumerate(batch)]


def _log_likelihood(logits: torch.Tensor, row: _Row) -> float:
    targets = torch.tensor(row.tokens[row.first :])
    log_p = logits[row.first - 1 : len(row.tokens) - 1].log_softmax(-1)
    return log_p.gather(1, targets[:, None]).double().sum().item()
