"""DB-LLM's loss for distillation (Chen et al. 2024, arXiv 2402.11960, section 3.3, "Deviation-Aware
Distillation"): positions at which teacher and student are unsure weigh more.

The paper's exact weight is not stated in the sources that were at hand. Here it is the product of both
entropies, each as a share of the largest possible one, to the power of `focus`; no gradient flows through
it. The loss of the next token is added, as in the paper.
"""

import math

import torch
from torch import Tensor


def deviation_aware_loss(logits: Tensor, log_p: Tensor, tokens: Tensor, focus: float) -> Tensor:
    """mean((H(p) H(q) / H_max²)^focus · CE(p, q)) + mean(CE(token, q)), in nats a position.

    logits f32 [..., vocab] are the student's, q; log_p alike the teacher's; tokens i64 [...] come next.
    """
    log_q = logits.log_softmax(-1)
    with torch.no_grad():
        unsure = _entropy(log_p) * _entropy(log_q) / math.log(logits.shape[-1]) ** 2
    distilled = unsure**focus * -(log_p.exp() * log_q).sum(-1)
    own = -log_q.gather(-1, tokens[..., None])[..., 0]
    return distilled.mean() + own.mean()


def _entropy(log_p: Tensor) -> Tensor:
    """Nats, [...]."""
    return -(log_p.exp() * log_p).sum(-1)
