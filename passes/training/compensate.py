"""Latents that round to GPTQ's codes: training then starts where the best rounding of the weights ends.

Each latent is the weight itself, moved into the cell of the code that GPTQ chose, as in learned rounding.
"""

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from gammac.formats import IntegerFormat, spread
from gammac.ir import Op, Operand
from gammac.ir.interpret import Weights
from gammac.passes.finetune.latents import MARGIN
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
def gram_matrices(graph: TrainingGraph, weights: Weights, batches: Iterable[Data]) -> dict[str, Tensor]:
    """By weight name, the sum of x xᵀ f32 [inputs, inputs] over what each block linear reads.

    Linears that read one value share one matrix.
    """
    sums: dict[Operand, Tensor] = {}
    first: dict[Operand, str] = {}
    reads: dict[str, Operand] = {}

    def watch(op: Op, operands: list[Tensor], results: tuple[Tensor, ...]) -> None:
        name = block_weight(op, graph.module)
        source = op.operands[0] if name else None
        if source is not None:
            reads[name] = source
            if first.setdefault(source, name) == name:
                x = operands[0].flatten(0, -2)
                sums[source] = sums[source] + x.T @ x if source in sums else x.T @ x

    for batch in batches:
        graph.run(batch.tokens, weights, watch=watch)
    return {name: sums[source] for name, source in reads.items()}


def compensated(weight: Tensor, gram: Tensor, format_: IntegerFormat) -> tuple[Tensor, Grid]:
    """Latents [rows, columns] of a weight, and the grid on which they round to GPTQ's codes."""
    found = Gptq().quantize(weight, gram, [format_])[0]
    scales, zeros = found.scales.float(), found.zeros
    grid = Grid(
        scales, torch.full_like(scales, format_.midpoint) if zeros is None else zeros.float()
    )  # fmt: skip
    reach = MARGIN * spread(scales, format_.inputs_per_scale(weight.shape[1]), weight.shape[1])
    rounded = found.dequantize()
    return torch.minimum(torch.maximum(weight, rounded - reach), rounded + reach), grid
