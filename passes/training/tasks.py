"""What a model is trained to do, and how well it does it: the next token, or a class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gammac.calibration import next_token_loss
from gammac.passes.training.trainer import Data

# a model's first result and the batch that it saw, to a scalar, in nats
TaskLoss = Callable[[Tensor, Data], Tensor]


def next_token(logits: Tensor, batch: Data) -> Tensor:
    """Mean cross entropy of each next token; logits f32 [batch, seq, vocab]."""
    return next_token_loss(logits, batch.tokens) / batch.tokens[:, 1:].numel()


def sequence_class(logits: Tensor, batch: Data) -> Tensor:
    """Mean cross entropy of the labels; logits f32 [batch, classes]."""
    assert batch.labels is not None
    return cross_entropy(logits, batch.labels)


@dataclass(frozen=True)
class ClassScores:
    """Shares between 0 and 1; precision, recall and F1 are means over the classes (macro)."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    examples: int


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
    return ClassScores(
        accuracy, sum(precisions) / classes, sum(recalls) / classes, sum(f1s) / classes, len(pairs)
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def classify(logits: Callable[[Tensor], Tensor], data: Data, batch: int = 32) -> ClassScores:
    """The scores of a model, tokens i64 [n, length] to logits [n, classes], on labelled data."""
    assert data.labels is not None
    with torch.no_grad():
        rows = torch.cat([logits(tokens) for tokens in torch.split(data.tokens, batch)])
    return class_scores(rows.argmax(-1).tolist(), data.labels.tolist(), rows.shape[-1])
