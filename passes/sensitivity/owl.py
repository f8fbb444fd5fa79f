"""Score sparse formats so that blocks with outliers keep more of their weights.

    weight @up : f32[512,192] = sha256:… {role = "block", candidates = {s38w4g64 = "…", s58w4g64 = "…"}}
->
    weight @up : f32[512,192] = sha256:… {…, scores = {s38w4g64 = 259584.0, s58w4g64 = 185856.0}}

OWL (Yin et al. 2023, arXiv 2310.05175): a block's outlier ratio is the share of its weights whose Wanda score
|w| · ‖x‖ exceeds `m` times the block's mean. Ratios, stretched over a range of 2 · `spread` and centred, are
added to the density that all blocks would share. A score is the squared distance from that density, times the
number of weights: where a budget binds, it does not matter which density is shared.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gammac.diagnostics import CompileError
from gammac.formats import candidates_of, load_float, parse_format
from gammac.ir import Module, Weight
from gammac.passes.candidates import gram_of, weights_have_candidates
from gammac.passes.sensitivity.first_last_high import blocks_of_weights
from gammac.passes.sensitivity.scores import check_range, rounded, weights_have_scores
from gammac.passes.sensitivity.uniform import with_even_scores
from gammac.pipeline import Context, Invariant


@dataclass(frozen=True)
class Owl:
    """`m` and `spread` are the paper's M and λ: 5 and 0.08; for n of eight it takes 6 and 0.25. Embedding and
    head, and formats of one density, are as in `uniform`."""

    name: ClassVar[str] = "owl"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)
    m: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        """Raises CompileError for options out of range."""
        check_range(self.name, "m", self.m, 1)
        check_range(self.name, "spread", self.spread, 0, 1)

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError where no weight has formats of several densities."""
        block_of = {
            n: b for n, b in blocks_of_weights(module).items() if _differ_in_density(module.weights[n])
        }
        if not block_of:
            raise CompileError(
                f"{self.name} says how sparse a block is, and all formats keep as many weights",
                hint="offer several, as --sparsity n:8 and --sparsity unstructured do",
            )
        for name in block_of:
            _demand_one_width(module.weights[name])
        blocks = {
            b: [module.weights[n] for n in block_of if block_of[n] == b] for b in set(block_of.values())
        }
        ratios = {
            b: outlier_ratio(blocks[b], self.m, ctx) for b in ctx.progress(sorted(blocks), "scoring (owl)")
        }
        least, most = min(ratios.values()), max(ratios.values())
        scaled = {b: (r - least) / (most - least) if most > least else 0.0 for b, r in ratios.items()}
        sizes = {b: sum(w.type.numel() for w in weights) for b, weights in blocks.items()}
        mean = sum(scaled[b] * sizes[b] for b in blocks) / sum(sizes.values())
        module = with_even_scores(module, {})
        return module.with_weights(
            *(_scored(w, 2 * self.spread * (scaled[b] - mean)) for b in blocks for w in blocks[b])
        )


def outlier_ratio(weights: list[Weight], m: float, ctx: Context) -> float:
    """The share of a block's weights whose Wanda score exceeds m times their mean."""
    scores = []
    for weight in weights:
        gram = gram_of(weight, ctx)
        norms = torch.ones(1) if gram is None else gram.diagonal().clamp(min=0).sqrt()
        scores.append((load_float(weight, ctx.store).abs() * norms).flatten())
    joined = torch.cat(scores)
    return float((joined > m * joined.mean()).double().mean())


def _differ_in_density(weight: Weight) -> bool:
    """Whether formats of several densities compete for a weight."""
    return "candidates" in weight.attrs and len({parse_format(n).density for n in candidates_of(weight)}) > 1


def _demand_one_width(weight: Weight) -> None:
    """Raises CompileError where two formats keep as many weights: nothing would tell them apart."""
    of_density: dict[float, str] = {}
    for name in candidates_of(weight):
        other = of_density.setdefault(parse_format(name).density, name)
        if other != name:
            raise CompileError(
                f"owl tells densities apart, and {other} and {name} have the same",
                loc=weight.name,
                hint="offer one width: --formats w4g64",
            )


def _scored(weight: Weight, offset: float) -> Weight:
    # all of it is wanted, and the budget decides: a squared distance from any density above ranks alike
    wanted, size = 2 + offset, weight.type.numel()
    densities = {name: parse_format(name).density for name in candidates_of(weight)}
    return weight.with_attrs(scores={n: rounded(size * (wanted - d) ** 2) for n, d in densities.items()})
