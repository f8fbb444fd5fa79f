"""QLoRA: low-rank adapters learn beside weights that stay the codes that they are (Dettmers et al. 2023,
arXiv 2305.14314, section 3; LoRA: Hu et al. 2021, arXiv 2106.09685).

The base is dequantized once, for it never changes; what learns are a and b of each of the blocks' linears.
IR-QLoRA's elastic connection (Qin et al. 2024, arXiv 2402.05445, section 3.3) adds shortcuts without
parameters but their weights: u = a x + β₁ pool(x) and Δ = b u + β₂ repeat(u). Both are linear, so that they
are added to a and b, and what is stored and run are two factors all the same.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from gammac.formats import Quantized, load_float
from gammac.ir import Module, Op, WeightRef
from gammac.ir.interpret import Weights
from gammac.passes.add_adapters import adapter_names, with_adapters
from gammac.passes.training.adapters import Adapters, Factors, digest_of_base
from gammac.passes.training.graph import Adjust, TrainingGraph
from gammac.passes.training.lora_options import LoraOptions
from gammac.passes.training.tasks import TaskLoss, next_token
from gammac.passes.training.trainer import Batches, Data, Row, Schedule
from gammac.pipeline import Context
from gammac.targets.target import BLOCK

JUDGED: Final = 8  # windows at a time, where no gradient is asked for


@cache
def pooling(rank: int, columns: int) -> Tensor:
    """P f32 [rank, columns]: P x are the means of `rank` runs of columns."""
    return torch.eye(rank).repeat_interleave(columns // rank, 1) * (rank / columns)


@cache
def repeating(rows: int, rank: int) -> Tensor:
    """R f32 [rows, rank]: R u is u again and again."""
    return torch.eye(rank).repeat(rows // rank, 1)


class Lora:
    """The method for a trainer. `base` has the codes of each weight with a role."""

    def __init__(
        self, module: Module, ctx: Context, options: LoraOptions, base: Mapping[str, Quantized],
        task: TaskLoss = next_token,
    ) -> None:  # fmt: skip
        self.name, self.options, self.seed = options.method, options, ctx.seed
        self.base, self.task = base, task
        self.fixed = {
            n: base[n].dequantize() if n in base else load_float(w, ctx.store).clone()
            for n, w in module.weights.items()
        }
        self.names = [n for n, w in module.weights.items() if w.attrs.get("role") == BLOCK]
        self.learnt = self._start()
        self.plain = TrainingGraph(module)
        self.graph = TrainingGraph(with_adapters(module, self._detached(), ctx.store))

    def _start(self) -> dict[str, Tensor]:
        """a uniform within 1/√in, b zero: at first nothing is added."""
        generator, found = torch.Generator().manual_seed(self.seed), {}
        for name in self.names:
            rows, columns = self.fixed[name].shape
            a = (torch.rand(self.options.rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
            found[f"{name}/a"] = a.requires_grad_()
            found[f"{name}/b"] = torch.zeros(rows, self.options.rank).requires_grad_()
            for beta in ("beta1", "beta2") if self.options.connects else ():
                found[f"{name}/{beta}"] = torch.zeros(()).requires_grad_()
        return found

    def parameters(self) -> Mapping[str, Tensor]:
        """a and b of each weight, and the weights of its shortcuts."""
        return self.learnt

    def factors(self, name: str) -> Factors:
        """What the graph multiplies by: Δ is the second times the first."""
        a, b = self.learnt[f"{name}/a"], self.learnt[f"{name}/b"]
        if self.options.connects:
            a = a + self.learnt[f"{name}/beta1"] * pooling(*a.shape)
            b = b + self.learnt[f"{name}/beta2"] * repeating(*b.shape)
        return a, b * (self.options.alpha / self.options.rank)

    def _detached(self) -> dict[str, Factors]:
        with torch.no_grad():
            return {n: self.factors(n) for n in self.names}

    def adapters(self) -> Adapters:
        """What was learnt, for a file."""
        return Adapters(self.name, digest_of_base(self.base), self._detached())

    def merged(self, name: str) -> Tensor:
        """A block weight with what its adapter adds, f32 [out, in]."""
        with torch.no_grad():
            a, b = self.factors(name)
            return self.fixed[name] + b @ a

    # ---- forwards -------------------------------------------------------------------------------

    def loss(self, batch: Data, step: int) -> tuple[Tensor, Row]:
        """The task's loss of a batch, in nats a predicted position."""
        return self.task(self.graph.run(batch.tokens, self.weights(), adjust=self._dropping(step)), batch), {}

    def weights(self) -> Weights:
        """Base and adapters by their names in the graph."""
        used = dict(self.fixed)
        for name in self.names:
            used.update(zip(adapter_names(name), self.factors(name), strict=True))
        return used.__getitem__

    def _dropping(self, step: int) -> Adjust | None:
        """Drops what each adapter reads, anew at each step; the seed and the step say what."""
        rate = self.options.dropout
        if not rate:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        firsts = {adapter_names(name)[0] for name in self.names}

        def drop(op: Op, operands: list[Tensor]) -> list[Tensor]:
            if len(op.operands) < 2 or not isinstance(op.operands[1], WeightRef):
                return operands
            if op.operands[1].name not in firsts:
                return operands
            kept = torch.rand(operands[0].shape, generator=generator) >= rate
            return [operands[0] * kept / (1 - rate), *operands[1:]]

        return drop

    @torch.no_grad()
    def logits(self, data: Data, weights: Weights | None = None) -> Tensor:
        """The first result; of the graph without adapters where there are `weights`."""
        if weights is None:
            return self.graph.run(data.tokens, self.weights())
        return self.plain.run(data.tokens, weights)

    def evaluate(self, data: Data, weights: Weights | None = None) -> float:
        """The mean task loss over data, in nats; without adapters where there are `weights`."""
        return _mean(data, lambda part: self.task(self.logits(part, weights), part))

    def kl(self, data: Data, from_: Weights | None, to: Weights | None) -> float:
        """Mean KL(from_ ‖ to) over data, in nats a token; None: the graph with adapters."""
        return _mean(data, lambda part: _kl(self.logits(part, from_), self.logits(part, to)))

    # ---- what a trainer asks besides --------------------------------------------------------------

    def prepare(self, data: Batches, schedule: Schedule) -> None:
        """Nothing to keep."""

    def begin(self, batch: Data) -> None:
        """Nothing to find out."""

    def after(self, gradients: Mapping[str, Tensor], batch: Data, step: int, steps: int, loss: float) -> Row:
        """Nothing to do."""
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        """Nothing besides the parameters: the base is made again, bit by bit."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Parameters are all that there is."""


def _mean(data: Data, measure: Callable[[Data], Tensor]) -> float:
    """Over windows, some of them at a time."""
    parts = [data.take(slice(start, start + JUDGED)) for start in range(0, len(data), JUDGED)]
    return sum(float(measure(part)) * len(part) for part in parts) / len(data)


def _kl(logits: Tensor, others: Tensor) -> Tensor:
    p, q = logits.log_softmax(-1), others.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()
