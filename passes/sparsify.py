"""Learn 2:4 masks and what stays, block by block, from what the dense block puts out.

    weight @up : f32[512,192] = sha256:aa {role = "block"}
->
    weight @up : f32[512,192] = sha256:bb {role = "block", sparse = "2:4"}
    and the module's attribute `sparsifying` = {magnitude = 0.021, learnt = 0.006}

The methods of `gammac sparsify` (SparseForge, arXiv 2605.06402, and its rivals), with a block's squared
error in place of the whole model's loss: one block with its gradients and moments is in memory. Each block
reads what dense blocks put out (teacher forcing) or, with `forced` off, what the sparse blocks before it do,
so that it makes up for their errors. Norms and biases of a block learn along. The attribute's figures are
the blocks' mean relative errors on windows set apart, with magnitude's masks and nothing learnt, and behind
training; a block that has not become better than that stays dense, for the sweep that rounds it to prune.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gammac.cache import key_of
from gammac.calibration import BATCH_WINDOWS, Segment
from gammac.diagnostics import CompileError, Diagnostic
from gammac.formats import TWO_FOUR, is_two_four, keep_two, load_float, parse_format
from gammac.formats.two_four import FOUR
from gammac.ir import Module, Weight, WeightRef, to_text
from gammac.passes.finetune.student import READ_BY
from gammac.passes.finetune.two_models import TwoModels, in_place_of, loaded_once, windows_to_learn_from
from gammac.passes.masks.methods import METHODS, Dense, SparseForge
from gammac.passes.masks.trainer import Trainer
from gammac.passes.sensitivity.scores import check_range, rounded
from gammac.pipeline import Context, Invariant, full_options_text

TRAINED_MASKS = tuple(name for name, method in METHODS.items() if method.sparse)


def sparse_weights_stay_sparse(module: Module) -> Iterator[Diagnostic]:
    """A weight that became 2:4 is stored so."""
    for weight in module.weights.values():
        name = weight.attrs.get("stored", weight.attrs.get("format"))
        if "sparse" in weight.attrs and name and parse_format(str(name)).kind != TWO_FOUR:
            yield Diagnostic(f"is 2:4, and stored as {name}", weight.name, "give --sparsity 2:4")


@dataclass(frozen=True)
class Sparsify:
    """`steps` of `batch` windows in a block, Adam's first step `rate`; `score` ranks for SparseForge."""

    name: ClassVar[str] = "sparsify"
    reads: ClassVar[tuple[str, ...]] = ("calibration", "seed")
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    keeps: ClassVar[tuple[Invariant, ...]] = (sparse_weights_stay_sparse,)
    method: str = "sparseforge"
    steps: int = 200
    batch: int = 4
    rate: float = 3e-3
    score: str = "hessian_obd"
    forced: bool = True

    def __post_init__(self) -> None:
        """Raises CompileError for options that make no sense."""
        if self.method not in TRAINED_MASKS:
            raise CompileError(f"no method {self.method!r}", hint=f"there are {', '.join(TRAINED_MASKS)}")
        check_range(self.name, "steps", self.steps, 1)
        check_range(self.name, "batch", self.batch, BATCH_WINDOWS)
        check_range(self.name, "rate", self.rate, 0, 1)
        self.made()

    def made(self) -> Dense:
        """The method, as it is before the first step."""
        kind: Any = METHODS[self.method]
        made: Dense = kind(score=self.score) if kind is SparseForge else kind()
        return made

    @staticmethod
    def unread_by(method: str) -> frozenset[str]:
        """The options that a method has no use for."""
        kind = METHODS[method]
        return frozenset(
            (["score"] if kind is not SparseForge else []) + (["rate"] if not kind.trains_weights else [])
        )

    def run(self, module: Module, ctx: Context) -> Module:
        """Each finished block is remembered. Raises CompileError without two batches of calibration text."""
        tokens = windows_to_learn_from(self.name, ctx)
        key = key_of(to_text(module), full_options_text(self), ctx.fingerprint(self.reads))
        blocks = _Blocks(self, module, ctx, tokens)
        errors: list[tuple[float, float]] = []
        for index in ctx.progress(range(len(blocks.models.segments) - 1), f"sparsifying ({self.method})"):
            blocks.models.advance_teacher(index, blocks.dense)
            found = ctx.cache.record(key_of(key, str(index)), partial(blocks.learn, index), ctx.store)
            blocks.adopt(found)
            blocks.models.advance_student(index, blocks.current)
            if "learnt" in found:
                errors.append((found["magnitude"], found["learnt"]))
        if not errors:
            if any("sparse" in w.attrs for w in blocks.module.weights.values()):
                return blocks.module
            raise CompileError("the model has no linears in numbered blocks that could be sparse")
        magnitude, learnt = (rounded(math.fsum(e) / len(errors)) for e in zip(*errors, strict=True))
        return blocks.module.with_attrs(sparsifying={"magnitude": magnitude, "learnt": learnt})


class _Blocks:
    """The dense model, and the one whose blocks become sparse."""

    def __init__(self, options: Sparsify, module: Module, ctx: Context, tokens: Tensor) -> None:
        self.options, self.original, self.module, self.ctx = options, module, module, ctx
        self.models = TwoModels(module.functions["forward"], tokens, forced=options.forced)
        self.adopted: set[str] = set()

    def dense(self, name: str) -> Tensor:
        """A weight as it was."""
        return load_float(self.original.weights[name], self.ctx.store)

    def current(self, name: str) -> Tensor:
        """A weight as it is by now."""
        return load_float(self.module.weights[name], self.ctx.store)

    def adopt(self, found: Mapping[str, Any]) -> None:
        """Take on what a block has learnt."""
        for name in (*found["digests"], *found["sparse"]):
            old = self.module.weights[name]
            attrs = {**old.attrs, "sparse": "2:4"} if name in found["sparse"] else old.attrs
            digest = found["digests"].get(name, old.digest)
            self.module = self.module.with_weights(Weight(name, old.type, digest, attrs))
        self.adopted |= {*found["digests"], *found["sparse"]}

    def learn(self, index: int) -> dict[str, Any]:
        """Digests of what was learnt by weight name, which weights are sparse now, and the errors.

        A weight that is 2:4 already keeps its zeros and its values; one that an earlier block shares is done.
        """
        options, segment = self.options, self.models.segments[index]
        sparse = [n for n in _sparse(segment, self.module) if n not in self.adopted]
        wanted = tuple(n for n in sparse if not bool(is_two_four(self.current(n)).all()))
        if not wanted:
            return {"digests": {}, "sparse": sparse}
        trains = options.made().trains_weights
        vectors = [n for n in _vectors(segment, self.module) if trains and n not in self.adopted]
        problem = _Block(self, index, wanted, vectors)
        pruned = {n: problem.parameters[n] * keep_two(problem.parameters[n].abs()) for n in wanted}
        magnitude = problem.judged(pruned)
        problem.unit = max(magnitude * problem.size, 1e-30)
        trainer = Trainer(problem, options.made(), options.steps, options.rate, self.ctx.seed * 7919 + index)
        trainer.run()
        learnt = problem.judged(problem.parameters)
        if learnt >= magnitude:
            return {"digests": {}, "sparse": [], "magnitude": magnitude, "learnt": magnitude}
        digests = {n: self.ctx.store.put({"data": p.contiguous()}) for n, p in problem.parameters.items()}
        return {"digests": digests, "sparse": sparse, "magnitude": magnitude, "learnt": learnt}


class _Block:
    """A block as something to train; see Problem. Losses are in units of what magnitude's masks lose."""

    def __init__(self, blocks: _Blocks, index: int, sparse: tuple[str, ...], vectors: Sequence[str]) -> None:
        self.blocks, self.models, self.index, self.sparse = blocks, blocks.models, index, sparse
        self.fixed = loaded_once(blocks.current)
        self.parameters = {n: self.fixed(n).float().clone() for n in (*sparse, *vectors)}
        self.count = max(1, blocks.options.batch // BATCH_WINDOWS)
        self.unit = 1.0
        batch = self.models.used[0]
        self.size = float(sum(t.square().sum() for t in self.models.wanted(index, batch).values()))

    def loss(self, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See Problem."""
        generator = torch.Generator().manual_seed(self.blocks.ctx.seed * 7919 + self.index * 104729 + step)
        picked = torch.randint(len(self.models.used), (self.count,), generator=generator).tolist()
        batches = [self.models.used[i] for i in picked]
        with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            lost = self.models.lost(self.index, batches, in_place_of(parameters, self.fixed))
        return lost / (self.count * self.unit)

    def error(self, parameters: Mapping[str, Tensor]) -> float:
        """See Problem."""
        return self.judged(parameters) * self.size / self.unit

    def judged(self, parameters: Mapping[str, Tensor]) -> float:
        """Relative squared error on what is set apart."""
        return self.models.error(self.index, parameters, self.fixed)


def _sparse(segment: Segment, module: Module) -> tuple[str, ...]:
    """Block weights of linears whose rows are whole fours."""
    refs = [op.weight() for op in segment.linears() if op.name == "linear"]
    names = dict.fromkeys(ref.name for ref in refs if ref is not None)
    return tuple(
        n for n in names if _is_block(module, n) and int(str(module.weights[n].type.shape[1])) % FOUR == 0
    )


def _is_block(module: Module, name: str) -> bool:
    return module.weights[name].attrs.get("role") == "block"


def _vectors(segment: Segment, module: Module) -> tuple[str, ...]:
    """Gains of norms and biases that a block reads."""
    read = (o for op in segment.ops if op.name in READ_BY for o in op.operands if isinstance(o, WeightRef))
    return tuple(dict.fromkeys(ref.name for ref in read if module.weights[ref.name].type.rank == 1))
