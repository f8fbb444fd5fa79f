"""A row's model beside the full-precision one: perplexity and KL on texts, accuracy on tasks.

What the full-precision model makes of a text is kept, up to what its head reads, for all rows to be compared
with. Programs may differ (rotations, quantized activations): only the logits are compared. Positions and
measures are those of `runtime.evaluate` and `runtime.tasks`. Results are remembered by content: the program,
the bytes of its weights, the tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from gammac.cache import key_of
from gammac.calibration import SegmentWeights, Stream, run_segment
from gammac.ir import Module, Value, to_text
from gammac.ir.interpret import run_ops
from gammac.pipeline import Context
from gammac.runtime.reference import InterpreterSession
from gammac.runtime.tasks import Task, accuracy
from gammac.trials import ROWS, Trial, divergence, predicting_rows
from gammac.weights import digest_of

# a perplexity above e^700 is no float any more
LARGEST: Final = 700.0


@dataclass(frozen=True, eq=False)
class Text:
    """A text's windows, i64 [windows, length]."""

    name: str
    tokens: Tensor


@dataclass(frozen=True)
class OnText:
    """A model on a text: see `Trial`. `ppl` is None where it is not a number."""

    ppl: float | None
    kl: float | None
    top1: float


class Harness:
    """The full-precision module and what every row is measured on."""

    def __init__(
        self, reference: Module, ctx: Context, tokenizer: Any, texts: Sequence[Text], tasks: Sequence[Task],
        context: int,
    ) -> None:  # fmt: skip
        self.reference, self.ctx, self.tokenizer = reference, ctx, tokenizer
        self.texts, self.tasks, self.context = texts, tasks, context
        self.streams: dict[str, Stream] = {}
        self.digests = {t.name: digest_of({"tokens": t.tokens}) for t in texts}
        self.task_digests = {t.name: key_of(repr(t), str(context)) for t in tasks}

    @property
    def digest(self) -> str:
        """What every row is measured on."""
        measured = [f"{name} {digest}" for name, digest in (self.digests | self.task_digests).items()]
        return key_of(program(self.reference), *measured)

    def on_texts(self, module: Module) -> dict[str, OnText]:
        """Text → figures."""
        return {text.name: self._on_text(module, text) for text in self.texts}

    def on_tasks(self, module: Module) -> dict[str, float]:
        """Task → share of right answers."""
        session = InterpreterSession(module, self.ctx.store, context=self.context)
        return {task.name: self._on_task(module, session, task) for task in self.tasks}

    def _on_text(self, module: Module, text: Text) -> OnText:
        key = key_of("study text", program(self.reference), program(module), self.digests[text.name])
        return OnText(**self.ctx.cache.record(key, lambda: asdict(self._compared(module, text))))

    def _on_task(self, module: Module, session: InterpreterSession, task: Task) -> float:
        key = key_of("study task", program(module), self.task_digests[task.name])
        found: float = self.ctx.cache.record(
            key, lambda: asdict(accuracy(session, self.tokenizer, task, self.ctx.progress))
        )["accuracy"]
        return found

    def _compared(self, module: Module, text: Text) -> OnText:
        if text.name not in self.streams:
            self.streams[text.name] = self._up_to_head(self.reference, text.tokens, f"{text.name}, reference")
        reference = Head(self.reference, self.streams[text.name], self.ctx)
        if module is self.reference:
            return on_text(compare(reference, reference, self.ctx))
        stream = self._up_to_head(module, text.tokens, text.name)
        return on_text(compare(Head(module, stream, self.ctx), reference, self.ctx))

    def _up_to_head(self, module: Module, tokens: Tensor, title: str) -> Stream:
        """What the last segment reads, for every batch."""
        stream = Stream(module.functions["forward"], tokens)
        stream.start()
        for index in self.ctx.progress(range(len(stream.segments) - 1), title):
            run_segment(module, stream, self.ctx.store, lambda *_: None, index)
        return stream


class Head:
    """The last segment of a module that has been run up to it."""

    def __init__(self, module: Module, stream: Stream, ctx: Context) -> None:
        self.stream = stream
        self.weights = SegmentWeights(module, ctx.store)
        function = module.functions["forward"]
        logits = function.returns[function.return_names.index("logits")]
        assert isinstance(logits, Value)
        self.output: Value = logits

    def logits(self, batch: int) -> Tensor:
        """Logits [windows, length, vocab] of one batch."""
        last = len(self.stream.segments) - 1
        env = self.stream.load(last, batch)
        with torch.no_grad():
            run_ops(
                self.stream.segments[last].ops, env, self.stream.sizes[batch], self.weights, (self.output,)
            )
        return env[self.output]


def compare(own: Head, reference: Head, ctx: Context) -> Trial:
    """Means over all predicted positions of both, batch by batch."""
    sums = []
    count = 0
    for batch in ctx.progress(range(len(own.stream.batches)), "comparing"):
        theirs = reference.logits(batch)
        ours = theirs if own is reference else own.logits(batch)
        tokens = own.stream.batches[batch]
        targets = [rows for window in tokens for rows in window[1:].split(ROWS)]
        for p, q, target in zip(predicting_rows(theirs), predicting_rows(ours), targets, strict=True):
            log_p = p.log_softmax(-1)
            sums.append(divergence(log_p, log_p.exp(), q.log_softmax(-1), target))
        count += tokens[:, 1:].numel()
    return Trial(*(math.fsum(column) / count for column in zip(*sums, strict=True)))


def on_text(trial: Trial) -> OnText:
    """The figures that a table shows."""
    ppl = math.exp(trial.nll) if trial.nll < LARGEST else None
    return OnText(ppl, trial.kl if math.isfinite(trial.kl) else None, trial.top1)


def program(module: Module) -> str:
    """What is run: the forward function, and weights with nothing but their format."""
    stored = {
        name: replace(w, attrs={k: v for k, v in w.attrs.items() if k == "stored"})
        for name, w in module.weights.items()
    }
    forward = {"forward": module.functions["forward"]}
    return to_text(Module("m", forward, stored).without_unused_weights())
