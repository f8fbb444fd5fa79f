"""Calibration text through a module, one block at a time.

Each segment (a block, what stands before the blocks, what stands behind) runs over all batches
before the next one starts, so memory holds one segment's weights; what flows between segments is
kept on disk, one file a batch. `run_segment` and `backward_segments` are the two directions.
"""

import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gammac.formats import load_float
from gammac.ir import Function, Module, Op, Value, WeightRef
from gammac.ir.interpret import Env, Weights, bind, run_ops
from gammac.progress import Progress
from gammac.weights import WeightStore

# windows a batch: a constant, because sums over batches are part of the answer
BATCH_WINDOWS = 2


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive ops, the values they read from before and those that are read after."""

    name: str
    ops: tuple[Op, ...]
    live_in: tuple[Value, ...]
    live_out: tuple[Value, ...]

    def linears(self) -> list[Op]:
        """The ops with a weight that can be quantized."""
        return [op for op in self.ops if op.name in ("linear", "embedding") and op.weight() is not None]


def block_index(loc: str) -> int | None:
    """3 for `model.layers.3.mlp.up_proj`; None outside the blocks."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", loc)
    return int(match[1]) if match else None


def segments(function: Function) -> list[Segment]:
    """The function cut at its blocks, in order."""
    ops = function.ops
    numbered = [i for i, op in enumerate(ops) if block_index(op.loc) is not None]
    last = numbered[-1] if numbered else -1
    pieces: list[tuple[str, list[Op]]] = [("before the blocks", [])]
    current: int | None = None
    for index, op in enumerate(ops):
        block = block_index(op.loc)
        if block is not None and block != current:
            pieces.append((f"block {block}", []))
            current = block
        elif index == last + 1 and numbered:
            pieces.append(("behind the blocks", []))
        pieces[-1][1].append(op)
    return _with_liveness(function, [(name, piece) for name, piece in pieces if piece])


def _with_liveness(function: Function, pieces: list[tuple[str, list[Op]]]) -> list[Segment]:
    needed: set[Value] = {v for v in function.returns if isinstance(v, Value)}
    found: list[Segment] = []
    for name, ops in reversed(pieces):
        made = {v for op in ops for v in op.results}
        read = {o for op in ops for o in op.operands if isinstance(o, Value)}
        live_out = tuple(v for op in ops for v in op.results if v in needed)
        passed = needed - made
        needed = passed | (read - made)
        found.append(Segment(name, tuple(ops), _ordered(function, needed), live_out))
    return found[::-1]


def _ordered(function: Function, values: set[Value]) -> tuple[Value, ...]:
    every = [*function.params, *(v for op in function.ops for v in op.results)]
    return tuple(v for v in every if v in values)


# a weight's name and its floats, to the floats that are used in their place
Change = Callable[[str, Tensor], Tensor]


def unchanged(name: str, weight: Tensor) -> Tensor:
    """The weight as it is."""
    return weight


class SegmentWeights:
    """Float weights of one segment, loaded when first asked for, and changed if need be."""

    def __init__(self, module: Module, store: WeightStore, change: Change = unchanged) -> None:
        self.module, self.store, self.change = module, store, change
        self.loaded: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """The weight as f32, dequantized if it is stored as codes."""
        if name not in self.loaded:
            self.loaded[name] = self.change(name, load_float(self.module.weights[name], self.store))
        return self.loaded[name]


class Stream:
    """The state of all batches between two segments, on disk below a temporary folder."""

    def __init__(self, function: Function, tokens: Tensor, folder: Path | None = None) -> None:
        self.function = function
        self.segments = segments(function)
        self.batches = torch.split(tokens, BATCH_WINDOWS)
        self.folder = folder or Path(tempfile.mkdtemp(prefix="gammac-"))
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.sizes: list[dict[str, int]] = []
        for batch in self.batches:
            self.sizes.append(bind(function, inputs_of(function, batch))[1])

    def start(self) -> None:
        """Write what the first segment reads: the parameters."""
        for index, batch in enumerate(self.batches):
            env, _ = bind(self.function, inputs_of(self.function, batch))
            self.save(0, index, env)

    def load(self, segment: int, batch: int) -> Env:
        """What `segment` reads, for one batch."""
        arrays = load_file(self._path(segment, batch))
        return {v: arrays[str(i)] for i, v in enumerate(self.segments[segment].live_in)}

    def save(self, segment: int, batch: int, env: Env) -> None:
        """Keep what `segment` will read."""
        if segment < len(self.segments):
            # cloned, because safetensors refuses values that share memory
            arrays = {
                str(i): env[v].clone(memory_format=torch.contiguous_format)
                for i, v in enumerate(self.segments[segment].live_in)
            }
            save_file(arrays, self._path(segment, batch))

    def has(self, segment: int) -> bool:
        """Whether what `segment` reads is there, for every batch."""
        return all(self._path(segment, batch).exists() for batch in range(len(self.batches)))

    def forget(self, segment: int) -> None:
        """Delete what `segment` read."""
        for batch in range(len(self.batches)):
            self._path(segment, batch).unlink(missing_ok=True)

    def _path(self, segment: int, batch: int) -> Path:
        return self.folder / f"{segment}-{batch}.safetensors"


def inputs_of(function: Function, tokens: Tensor) -> dict[str, Tensor]:
    """Arguments for a function that takes tokens: positions count up, anything else is zero."""
    inputs = {"input_ids": tokens, "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens)}
    return {p.name: inputs.get(p.name, torch.zeros_like(tokens)) for p in function.params}


# a segment, its weights, one of its linears, and the values that the linear reads
Visit = Callable[[Segment, SegmentWeights, Op, list[Tensor]], None]


def run_segment(
    module: Module, stream: Stream, store: WeightStore, visit: Visit, index: int, forget: bool = True,
    change: Change = unchanged,
) -> None:  # fmt: skip
    """Run one segment over all batches; `visit` sees each linear with its operands' tensors.

    What follows the last linear of the last segment is not run: nobody reads it.
    """
    segment = stream.segments[index]
    weights = SegmentWeights(module, store, change)
    following = stream.segments[index + 1].live_in if index + 1 < len(stream.segments) else None
    for batch in range(len(stream.batches)):
        env = stream.load(index, batch)
        with torch.no_grad():
            _run_watched(segment, env, stream.sizes[batch], weights, visit, following)
        stream.save(index + 1, batch, env)
    if forget:
        stream.forget(index)


def _run_watched(
    segment: Segment, env: Env, sizes: dict[str, int], weights: SegmentWeights, visit: Visit,
    following: tuple[Value, ...] | None,
) -> None:  # fmt: skip
    """Run ops up to each linear, show it, go on."""
    linears = set(segment.linears())
    pending: list[Op] = []
    for index, op in enumerate(segment.ops):
        if op in linears:
            run_ops(pending, env, sizes, weights, keep=_still_read(segment.ops[index:], following or ()))
            pending = []
            visit(segment, weights, op, [env[o] for o in op.operands if isinstance(o, Value)])
        pending.append(op)
    if following is not None:
        run_ops(pending, env, sizes, weights, keep=following)


def _still_read(ops: tuple[Op, ...], following: tuple[Value, ...]) -> set[Value]:
    return {o for op in ops for o in op.operands if isinstance(o, Value)} | set(following)


def run_up_to_last(
    module: Module, stream: Stream, store: WeightStore, progress: Progress, title: str,
    change: Change = unchanged,
) -> None:  # fmt: skip
    """Leave behind what every segment reads, for a backward run."""
    stream.start()
    for index in progress(range(len(stream.segments) - 1), title):
        run_segment(module, stream, store, lambda *_: None, index, forget=False, change=change)


@dataclass(frozen=True)
class LinearGradient:
    """One linear in one batch: its input, and the loss's gradient at its output."""

    op: Op
    input: Tensor
    gradient: Tensor

    def output_change(self, delta: Tensor) -> Tensor:
        """What the output grows by when `delta`, of the weight's shape, is added to the weight."""
        if self.op.name == "embedding":
            return torch.nn.functional.embedding(self.input, delta)
        return torch.nn.functional.linear(self.input, delta)

    def at_weight(self, rows: int) -> Tensor:
        """The gradient at the weight, f32 [rows, columns]: Σ_tokens gradient ⊗ input."""
        outputs = self.gradient.flatten(0, -2)
        if self.op.name == "embedding":
            found = torch.zeros(rows, outputs.shape[-1])
            return found.index_add_(0, self.input.flatten(), outputs)
        return outputs.T @ self.input.flatten(0, -2)


# the model's output for a batch and the batch's index, to a scalar
Loss = Callable[[Tensor, int], Tensor]
# a segment's index, a batch's, and the gradients at the values that the segment puts out
Arriving = Callable[[int, int, dict[Value, Tensor]], None]


def backward_segments(
    module: Module, stream: Stream, store: WeightStore, progress: Progress, title: str,
    change: Change = unchanged, loss: Loss | None = None, arriving: Arriving | None = None,
) -> Iterator[tuple[Segment, SegmentWeights, Iterator[LinearGradient]]]:  # fmt: skip
    """From the last segment to the first: for each, the gradients of its linears, batch by batch.

    Without a `loss` it is the summed next-token cross entropy of the calibration tokens, in nats.
    `arriving` is shown the gradients at what a segment puts out, before the segment is run. The states
    that `run_up_to_last` left are read and deleted, unless something is shown: whoever wants gradients
    at states wants the states. Each inner iterator must be used up before the next segment is asked for.
    """
    loss = loss or (lambda logits, batch: next_token_loss(logits, stream.batches[batch]))
    gradients: list[dict[Value, Tensor] | None] = [None for _ in stream.batches]
    for index in progress(range(len(stream.segments) - 1, -1, -1), title):
        segment = stream.segments[index]
        weights = SegmentWeights(module, store, change)

        def batches(
            index: int = index, segment: Segment = segment, weights: SegmentWeights = weights
        ) -> Iterator[LinearGradient]:
            for batch in range(len(stream.batches)):
                flowing = gradients[batch]
                if arriving and flowing is not None:
                    arriving(index, batch, flowing)
                env = stream.load(index, batch)
                found, gradients[batch] = backward(segment, env, stream, batch, loss, weights, flowing)
                yield from found

        yield segment, weights, batches()
        if arriving is None:
            stream.forget(index)


def backward(
    segment: Segment, env: Env, stream: Stream, batch: int, loss: Loss, weights: Weights,
    gradients: dict[Value, Tensor] | None,
) -> tuple[list[LinearGradient], dict[Value, Tensor]]:  # fmt: skip
    """Gradients at the outputs of a segment's linears, and at the values that flow into it.

    `gradients` are those at the values that flow out; None behind the last segment.
    """
    inputs = {v: t.requires_grad_() for v, t in env.items() if t.is_floating_point()}
    linears = segment.linears()
    watched = [o for op in linears for o in (op.operands[0], op.result) if isinstance(o, Value)]
    run_ops(
        segment.ops,
        env,
        stream.sizes[batch],
        _tracked(weights, linears),
        [*watched, *segment.live_out, *inputs],
    )
    if gradients is None:
        roots, at_roots = [loss(env[segment.live_out[-1]], batch)], None
    else:
        # rotary tables come from positions alone: nothing flows back through them
        pairs = [(env[v], g) for v, g in gradients.items() if env[v].requires_grad]
        roots, at_roots = [root for root, _ in pairs], [g for _, g in pairs]
    wanted = [env[op.result] for op in linears] + list(inputs.values())
    found = torch.autograd.grad(roots, wanted, at_roots, allow_unused=True)
    per_linear = [
        LinearGradient(op, env[op.operands[0]].detach(), gradient)
        for op, gradient in zip(linears, found, strict=False)
        if isinstance(op.operands[0], Value) and gradient is not None
    ]
    before = zip(inputs, found[len(linears) :], strict=True)
    return per_linear, {v: g for v, g in before if g is not None}


def _tracked(weights: Weights, linears: list[Op]) -> Callable[[str], Tensor]:
    """Weights as they are, but embeddings must take part in autograd: ids carry no gradient."""
    tables = {
        o.name for op in linears if op.name == "embedding" for o in op.operands if isinstance(o, WeightRef)
    }
    return lambda name: weights(name).detach().requires_grad_() if name in tables else weights(name)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Summed cross entropy of each next token, nats; logits [batch, seq, vocab], tokens [batch, seq]."""
    flat = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="sum")
