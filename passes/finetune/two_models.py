"""Two models behind the same segment: full precision as the teacher, and the one that learns.

Windows of calibration text flow through both, a segment at a time, so that memory holds one segment's
weights. Every so manieth batch is set apart: nothing is learnt from it, and errors are judged on it.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from gammac.calibration import BATCH_WINDOWS, Segment, Stream
from gammac.diagnostics import CompileError
from gammac.ir import Function
from gammac.ir.interpret import Env, Weights, run_ops
from gammac.pipeline import Context

APART: Final = 8


def windows_to_learn_from(who: str, ctx: Context) -> Tensor:
    """Calibration tokens i64 [windows, length]. Raises CompileError for less than two batches."""
    if ctx.calibration is None or len(ctx.calibration.tokens) < 2 * BATCH_WINDOWS:
        raise CompileError(
            f"{who} needs {2 * BATCH_WINDOWS} windows of calibration text or more",
            hint="give --calibration FILE and --calibration-windows",
        )
    return ctx.calibration.tokens


class TwoModels:
    """The states of both. With `forced`, the learning one reads what the teacher's blocks put out, and has
    no states of its own: blocks don't see each other's errors."""

    def __init__(self, function: Function, tokens: Tensor, *, forced: bool = False) -> None:
        self.teacher = Stream(function, tokens)
        self.teacher.start()
        self.student = self.teacher if forced else Stream(function, tokens)
        if not forced:
            self.student.start()
        self.segments = self.teacher.segments
        every = range(len(self.teacher.batches))
        self.apart = tuple(every)[::APART]
        self.used = tuple(b for b in every if b not in self.apart)

    def advance_teacher(self, index: int, weights: Weights) -> None:
        """Full precision through a segment; what it read stays until the student is through."""
        self._advance(self.teacher, index, weights)
        if self.student is not self.teacher:
            self.teacher.forget(index)

    def advance_student(self, index: int, weights: Weights) -> None:
        """The learning model through a segment, for the next one to read."""
        if self.student is not self.teacher:
            self._advance(self.student, index, weights)
        self.student.forget(index)

    def _advance(self, stream: Stream, index: int, source: Weights) -> None:
        weights = loaded_once(source)
        for batch in range(len(stream.batches)):
            env = stream.load(index, batch)
            with torch.no_grad():
                keep = stream.segments[index + 1].live_in
                run_ops(stream.segments[index].ops, env, stream.sizes[batch], weights, keep=keep)
            stream.save(index + 1, batch, env)

    def wanted(self, index: int, batch: int) -> Env:
        """What the full-precision segment puts out on full-precision inputs."""
        following = self.teacher.load(index + 1, batch)
        return {v: following[v] for v in self.segments[index].live_out if v in following}

    def put_out(self, index: int, batch: int, weights: Weights) -> Env:
        """What the segment puts out with these weights on what the learning model reads."""
        segment: Segment = self.segments[index]
        env = self.student.load(index, batch)
        run_ops(segment.ops, env, self.student.sizes[batch], weights, keep=segment.live_out)
        return {v: env[v] for v in segment.live_out}

    def lost(self, index: int, batches: list[int], weights: Weights) -> Tensor:
        """The squared error of what the segment puts out, over these batches."""
        loss = torch.zeros(())
        for batch in batches:
            wanted, out = self.wanted(index, batch), self.put_out(index, batch, weights)
            loss = loss + torch.stack([(out[v] - wanted[v]).square().sum() for v in wanted]).sum()
        return loss

    def error(self, index: int, tried: Mapping[str, Tensor], fixed: Weights) -> float:
        """Relative squared error on the batches that are set apart, with `tried` in place of `fixed`."""
        lost = size = 0.0
        for batch in self.apart:
            with torch.no_grad():
                lost += float(self.lost(index, [batch], in_place_of(tried, fixed)))
            size += float(sum(t.square().sum() for t in self.wanted(index, batch).values()))
        return lost / max(size, 1e-30)


def in_place_of(tried: Mapping[str, Tensor], fixed: Weights) -> Weights:
    """Weights of `fixed`, but for those in `tried`."""
    return lambda name: tried[name] if name in tried else fixed(name)


def loaded_once(source: Weights) -> Weights:
    """Each weight loaded once."""
    loaded: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        if name not in loaded:
            loaded[name] = source(name)
        return loaded[name]

    return get
