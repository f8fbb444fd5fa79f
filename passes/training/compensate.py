"""Latents that round to GPTQ's codes: training then starts where the best rounding of the weights ends.

Each latent is the weight itself, moved into the cell of the code that GPTQ chose, as in learned rounding.
"""

from collections.abc import Collection, Iterable
from typing import Final

import torch
from torch import Tensor

from gammac.formats import IntegerFormat, spread
from gammac.ir import Op
from gammac.ir.interpret import Weights
from gammac.passes.collect_grams import GramSums
from gammac.passes.finetune.latents import GridLatents
from gammac.passes.quantizers import Gptq
from gammac.passes.quantizers.grid import Grid
from gammac.passes.training.graph import TrainingGraph, block_weight
from gammac.passes.training.trainer import Batches, Data, Schedule

TOKENS: Final = 16384  # of the training text, for Gram matrices


def gram_batches(data: Batches, schedule: Schedule) -> Iterable[Data]:
    """The first batches of a training, TOKENS in all or what one pass has."""
    tokens = 0
    for step in range(-(-len(data) // schedule.batch)):
        if tokens >= TOKENS:
            return
        batch = data.batch(step, schedule.batch, schedule.seed)
        tokens += batch.tokens.numel()
        yield batch


@torch.no_grad()
def gram_matrices(
    graph: TrainingGraph, weights: Weights, batches: Iterable[Data], names: Collection[str]
) -> dict[str, Tensor]:
    """By the names of block weights, the mean of x xᵀ f32 [inputs, inputs] over what their linears read."""
    sums = GramSums(graph.module)

    def watch(op: Op, operands: list[Tensor], results: tuple[Tensor, ...]) -> None:
        if block_weight(op, graph.module) in names:
            sums.add(op, operands)

    for batch in batches:
        graph.run(batch.tokens, weights, watch=watch)
    return {name: sums.mean(name) for name in names}


def compensated(weight: Tensor, gram: Tensor, format_: IntegerFormat) -> tuple[Tensor, Grid]:
    """Latents [rows, columns] of a weight, and the grid on which they round to GPTQ's codes."""
    found = Gptq().quantize(weight, gram, [format_])[0]
    size, columns = format_.inputs_per_scale(weight.shape[1]), weight.shape[1]
    begun, scales = GridLatents(weight, found), found.scales.float()
    latents = (begun.latent - spread(begun.zeros, size, columns)) * spread(scales, size, columns)
    return latents, Grid(scales, begun.zeros)
