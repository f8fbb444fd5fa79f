"""What a model is trained to do: the next token, or a class."""

from collections.abc import Callable

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
