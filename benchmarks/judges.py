"""By what benchmarks of training judge weights: the next tokens of a text, or the classes of its rows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gammac.classification import scores_of
from gammac.passes.training.graph import TrainingGraph
from gammac.passes.training.labelled import LabelledData
from gammac.passes.training.tasks import sequence_class

BATCH: Final = 8

Weights = Mapping[str, Tensor]
Scores = dict[str, float]
Judge = Callable[[Weights], Scores]  # losses and divergences in nats


@dataclass
class TextJudge:
    """Windows i64 [n, length], and two references: KL(original ‖ weights) and KL(tuned ‖ weights)."""

    graph: TrainingGraph
    windows: Tensor
    references: tuple[Weights, Weights]

    @torch.no_grad()
    def __call__(self, weights: Weights) -> Scores:
        """Over all windows."""
        sums = torch.zeros(3, dtype=torch.float64)
        for part in torch.split(self.windows, BATCH):
            log_q = self.predicted(weights, part)
            sums[0] -= log_q.gather(2, part[:, 1:, None]).sum()
            for place, reference in enumerate(self.references, 1):
                log_p = self.predicted(reference, part)
                sums[place] += (log_p.exp() * (log_p - log_q)).sum()
        loss, original, tuned = (sums / self.windows[:, 1:].numel()).tolist()
        return {"loss": loss, "perplexity": math.exp(loss), "KL(original)": original, "KL(tuned)": tuned}

    def predicted(self, weights: Weights, part: Tensor) -> Tensor:
        """Log-probabilities of each next token [windows, length - 1, vocab]."""
        return self.graph.run(part, weights.__getitem__)[:, :-1].log_softmax(-1)


@dataclass
class ClassJudge:
    """Labelled rows; precision, recall and F1 are means over the classes."""

    graph: TrainingGraph
    data: LabelledData
    classes: int

    @torch.no_grad()
    def __call__(self, weights: Weights) -> Scores:
        """Over all rows."""

        def predict(tokens: Tensor) -> Tensor:
            return self.graph.run(tokens, weights.__getitem__)

        losses = (float(sequence_class(predict(p.tokens), p)) * len(p) for p in self.data.parts(BATCH))
        found = scores_of(predict, self.data, self.classes)
        shares = {n: 100 * getattr(found, n) for n in ("accuracy", "precision", "recall", "f1")}
        return {"loss": sum(losses) / len(self.data), **{f"{n} %": share for n, share in shares.items()}}
