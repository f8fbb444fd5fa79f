"""What the controller asks of a model in training: DSA-QAT's "Layer-wise Sensitivity Analyzer".

One batch runs in full precision and once more with every block weight at the probe width. Where activations
stay floats, A_l is what the layer puts out and Q(A_l) what it puts out with its weight rounded; where they
are rounded, A_l is what the layer reads, as the paper says.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gammac.formats import IntegerFormat
from gammac.ir import Op, Value
from gammac.ir.interpret import visible
from gammac.passes.quantizers.grid import choose_grid, round_to_grid
from gammac.passes.training.fake_quantize import round_activations, straight_through
from gammac.passes.training.graph import TrainingGraph, block_weight
from gammac.passes.training.losses import relative_noise
from gammac.passes.training.sensitivity import PROBE_BITS, attention_distortion
from gammac.passes.training.tasks import TaskLoss
from gammac.passes.training.trainer import Data

PROBE_GROUP = 64


@dataclass
class Analyser:
    """`latent` gives a weight by name; `reads`: whether activations are rounded; `attention`: whether scores'
    distortion is wanted."""

    graph: TrainingGraph
    latent: Callable[[str], Tensor]
    reads: bool
    attention: bool
    scored: dict[Op, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scored = _weights_behind_scores(self.graph) if self.attention else {}

    def gradients(self, batch: Data, task: TaskLoss) -> dict[str, Tensor]:
        """∇W at the probe width, by block weight name."""
        leaves: dict[str, Tensor] = {}

        def weight(name: str) -> Tensor:
            if not self._is_block(name):
                return self.latent(name).detach()
            if name not in leaves:
                leaves[name] = self.latent(name).detach().requires_grad_()
            return straight_through(leaves[name], probed(leaves[name].detach()))

        loss = task(self.graph.run(batch.tokens, weight), batch)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    @torch.no_grad()
    def look(self, batch: Data) -> tuple[dict[str, float], dict[str, float]]:
        """The relative squared error of A_l by weight name; the attention's distortion by names of what makes
        scores, if that is asked for."""
        errors: dict[str, float] = {}
        full: dict[Op, Tensor] = {}
        rounded: dict[str, Tensor] = {}

        def weight(name: str) -> Tensor:
            if name not in rounded:
                rounded[name] = probed(self.latent(name)) if self._is_block(name) else self.latent(name)
            return rounded[name]

        def watch_full(op: Op, operands: list[Tensor], results: tuple[Tensor, ...]) -> None:
            name = block_weight(op, self.graph.module)
            if name:
                errors[name] = self._error(operands, results[0], weight(name))
            if op in self.scored:
                full[op] = attention_scores(op, operands)

        distortions: dict[str, float] = {}

        def watch_rounded(op: Op, operands: list[Tensor], results: tuple[Tensor, ...]) -> None:
            for name in self.scored.get(op, ()):
                distortions[name] = attention_distortion(full[op], attention_scores(op, operands))

        self.graph.run(batch.tokens, self.latent, watch=watch_full)
        if self.scored:
            self.graph.run(batch.tokens, weight, watch=watch_rounded)
        return errors, distortions

    def _error(self, operands: list[Tensor], output: Tensor, rounded: Tensor) -> float:
        if self.reads:
            return float(relative_noise(operands[0], round_activations(operands[0], PROBE_BITS)))
        found = torch.nn.functional.linear(operands[0], rounded, *operands[2:])
        return float(relative_noise(output, found))

    def _is_block(self, name: str) -> bool:
        return self.graph.module.weights[name].attrs.get("role") == "block"


def probed(weight: Tensor) -> Tensor:
    """The weight [rows, columns] at the probe width, min-max in groups of PROBE_GROUP."""
    format_ = IntegerFormat(PROBE_BITS, PROBE_GROUP).fit(weight.shape[1])
    return round_to_grid(weight, choose_grid(weight, format_, "none"), format_).dequantize()


def attention_scores(op: Op, operands: list[Tensor]) -> Tensor:
    """Probabilities f32 [batch, heads, queries, keys] of an `attention` op, softcap left out."""
    q, k = operands[0], operands[1].repeat_interleave(operands[0].shape[1] // operands[1].shape[1], 1)
    scale, window = op.attrs["scale"], op.attrs.get("window", 0)
    assert isinstance(scale, int | float) and isinstance(window, int)
    scores = q @ k.transpose(-1, -2) * scale
    seen = visible(q.shape[2], k.shape[2], bool(op.attrs["causal"]), window)
    return (scores if seen is None else scores.masked_fill(~seen, float("-inf"))).softmax(-1)


def _weights_behind_scores(graph: TrainingGraph) -> dict[Op, tuple[str, ...]]:
    """For each attention, the block weights that its queries and keys come from."""
    producers = graph.function.producers()
    found: dict[Op, tuple[str, ...]] = {}
    for op in graph.function.ops:
        if op.name == "attention":
            names: dict[str, None] = {}
            for source in op.operands[:2]:
                _walk(source, producers, graph, names)
            found[op] = tuple(names)
    return found


def _walk(
    source: object, producers: Mapping[Value, Op], graph: TrainingGraph, names: dict[str, None]
) -> None:
    op = producers.get(source) if isinstance(source, Value) else None
    if op is None:
        return
    name = block_weight(op, graph.module)
    if name:
        names[name] = None
        return
    for operand in op.operands:
        _walk(operand, producers, graph, names)
