"""Sequence classification for finetune(): from a model and a .jsonl file of labelled texts to what trains.

A causal model or an encoder gets a head for the file's labels, as transformers would make it, with the
request's seed; a model that has a head for just these labels keeps it. Every eighth row of each label is
held out.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForSequenceClassification

from gammac.cache import key_of
from gammac.diagnostics import CompileError
from gammac.driver import tokenizer_files
from gammac.files import write_atomically
from gammac.frontend.export import Source, load_source
from gammac.frontend.facts import class_names
from gammac.frontend.source import nonsense_is_an_error, quiet
from gammac.passes.training.labelled import LabelledData, by_length
from gammac.runtime.classify import ClassScores, LabelledText, class_scores, encode, indices
from gammac.runtime.staging import staging

CLASSIFICATION: Final = "classification"
HELD_OUT: Final = "held_out.jsonl"
APART: Final = 8  # every so manieth row of a label is held out
HEAD: Final = "ForSequenceClassification"


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows that are held out, in the file's order; labels in the order of the logits."""

    used: tuple[LabelledText, ...]
    held_out: tuple[LabelledText, ...]
    labels: tuple[str, ...]


def split_rows(rows: Sequence[LabelledText]) -> Split:
    """Every eighth row of each label apart. Raises CompileError for less than two labels or a label with
    less than two rows."""
    seen: dict[str, int] = {}
    used: list[LabelledText] = []
    held_out: list[LabelledText] = []
    for row in rows:
        count = seen[row.label] = seen.get(row.label, 0) + 1
        (held_out if count % APART == 2 else used).append(row)  # the second: each label has a first to use
    if len(seen) < 2:
        raise CompileError(f"all rows have the label {rows[0].label!r}", hint="classes are two at least")
    rare = [label for label, count in seen.items() if count < 2]
    if rare:
        raise CompileError(f"label {rare[0]!r} has one row", hint="one is trained on, another held out")
    return Split(tuple(used), tuple(held_out), tuple(sorted(seen)))


def make_classifier(source: Source, labels: Sequence[str], seed: int, cache: Path) -> Source:
    """The model with a head for the labels, in a folder of the cache.

    Raises CompileError for a model that transformers gives no such head, or that has one for other labels.
    """
    names = getattr(source.config, "architectures", None) or [""]
    if str(names[0]).endswith(HEAD):
        found = class_names(source.config)
        if found != tuple(labels):
            raise CompileError(
                f"{source.name} has the classes {', '.join(found)}; the text has {', '.join(labels)}",
                hint="give the model without its head, or rows with its labels",
            )
        return source
    if source.gguf is not None:
        raise CompileError(f"{source.name} is a .gguf file", hint="give a transformers folder")
    weights = (
        hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(source.folder.glob("*.safetensors"))
    )
    key = key_of(source.config.to_json_string(), repr(list(labels)), str(seed), *weights)
    folder = cache / "classifiers" / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staging(folder, overwrite=False) as fresh:
            _write(source, labels, seed, fresh)
    return replace(load_source(str(folder), trust_remote_code=source.trust_remote_code), name=source.name)


def _write(source: Source, labels: Sequence[str], seed: int, folder: Path) -> None:
    config = deepcopy(source.config)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    load: Any = AutoModelForSequenceClassification.from_pretrained
    with quiet(), nonsense_is_an_error(source.folder, "a classifier of "), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        load(source.folder, config=config, dtype=torch.float32, local_files_only=True,
             trust_remote_code=source.trust_remote_code).save_pretrained(folder)  # fmt: skip
    for path in tokenizer_files(source):
        shutil.copyfile(path, folder / path.name)


def tokenized(
    rows: Sequence[LabelledText], labels: Sequence[str], tokenizer: Any, length: int
) -> LabelledData:
    """Rows as tokens, `length` at most. Raises CompileError for a text without tokens."""
    texts = [encode(tokenizer, row.text, length) for row in rows]
    empty = [row for row, text in zip(rows, texts, strict=True) if not len(text)]
    if empty:
        raise CompileError(f"the text {empty[0].text!r} has no tokens", hint="leave the row out")
    return by_length(texts, indices(rows, labels))


def scores_of(
    predict: Callable[[torch.Tensor], torch.Tensor], data: LabelledData, classes: int
) -> ClassScores:
    """The scores of a model, tokens i64 [n, seq] to logits f32 [n, classes]."""
    predicted: list[int] = []
    gold: list[int] = []
    for part in data.parts(8):
        assert part.labels is not None
        predicted += predict(part.tokens).argmax(-1).tolist()
        gold += part.labels.tolist()
    return class_scores(predicted, gold, classes)


def write_held_out(rows: Sequence[LabelledText], folder: Path) -> None:
    """The rows that were held out, for `gammac eval ARTIFACT --text`."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    write_atomically(folder / HELD_OUT, ("\n".join(lines) + "\n").encode())
