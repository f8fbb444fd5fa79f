"""Quality by one definition: perplexity, distance to a reference, over windows of tokens.

A window of 1024 tokens gives 1023 predictions (positions 1 to 1023, each from the tokens before it);
no token is put before it. One window is in memory at a time, logits are f32, sums f64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.progress import Progress, no_progress
from gammac.runtime.session import Predictor
from gammac.texts import read_text, token_windows

WINDOW: Final = 1024
ROWS: Final = 128
"""Positions whose probabilities are worked out at a time: bounds the memory, not the result."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) of `tokens` predicted tokens."""

    ppl: float
    nll: float
    tokens: int
    windows: int
    length: int


@dataclass(frozen=True)
class Comparison:
    """Two models on the same windows. `kl` is the mean KL(reference || compiled) in nats."""

    ppl: float
    ppl_reference: float
    kl: float
    top1_agreement: float
    tokens: int
    windows: int
    length: int


@dataclass(frozen=True)
class OutputComparison:
    """Two encoders on the same windows: mean absolute difference, mean cosine of a token's output, or of a
    window's class logits."""

    mean_abs: float
    cosine: float
    tokens: int
    windows: int
    length: int


def windows_for(text: Path, tokenizer: Any, windows: int | None, length: int = WINDOW) -> Tensor:
    """The first windows of a text file, i64 [windows, length]. Raises CompileError for too short a text."""
    return token_windows(read_text(text), tokenizer, length, windows)


def window_length(session: Predictor) -> int:
    """1024 tokens, or the context of a model that has less."""
    return min(WINDOW, session.context)


def perplexity(session: Predictor, windows: Tensor, progress: Progress = no_progress) -> Perplexity:
    """Perplexity over windows i64 [windows, length]. Raises CompileError for a model that is no decoder."""
    _want_decoder(session)
    total = 0.0
    for window in progress(list(windows), "perplexity"):
        for log_p, targets in _predictions(_output(session, window), window):
            total += _nll(log_p, targets)
    count = windows[:, 1:].numel()
    return Perplexity(math.exp(total / count), total / count, count, *windows.shape)


def compare(
    session: Predictor, reference: Predictor, windows: Tensor, progress: Progress = no_progress
) -> Comparison:
    """Both perplexities, KL divergence and agreement of the top token, over windows i64 [windows, length].

    Raises CompileError when one is no decoder or their vocabularies differ.
    """
    _want_decoder(session, reference)
    _want_same_width(session, reference)
    nll = nll_reference = kl = agree = 0.0
    for window in progress(list(windows), "comparison"):
        ours, theirs = _output(session, window), _output(reference, window)
        pairs = zip(_predictions(ours, window), _predictions(theirs, window), strict=True)
        for (log_q, targets), (log_p, _) in pairs:
            nll += _nll(log_q, targets)
            nll_reference += _nll(log_p, targets)
            kl += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
            agree += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    count = windows[:, 1:].numel()
    ppl, ppl_reference = math.exp(nll / count), math.exp(nll_reference / count)
    return Comparison(ppl, ppl_reference, kl / count, agree / count, count, *windows.shape)


def compare_outputs(
    session: Predictor, reference: Predictor, windows: Tensor, progress: Progress = no_progress
) -> OutputComparison:
    """How far an encoder's outputs are from the reference's, over windows i64 [windows, length].

    Raises CompileError when the outputs have different widths.
    """
    _want_same_width(session, reference)
    difference, cosine, rows = 0.0, 0.0, 0
    for window in progress(list(windows), "comparison"):
        ours, theirs = _output(session, window), _output(reference, window)
        difference += (ours - theirs).abs().mean(-1).double().sum().item()
        cosine += torch.cosine_similarity(ours.double(), theirs.double(), dim=-1).sum().item()
        rows += len(ours.reshape(-1, ours.shape[-1]))
    return OutputComparison(difference / rows, cosine / rows, windows.numel(), *windows.shape)


def _output(session: Predictor, window: Tensor) -> Tensor:
    return torch.from_numpy(session.logits(window[None].numpy()))[0]


def _predictions(logits: Tensor, window: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities f32 [rows, vocab] and the tokens [rows] that came, some positions at a time."""
    for start in range(0, len(window) - 1, ROWS):
        end = min(start + ROWS, len(window) - 1)
        yield logits[start:end].log_softmax(-1), window[start + 1 : end + 1]


def _nll(log_p: Tensor, targets: Tensor) -> float:
    return -log_p.gather(1, targets[:, None]).double().sum().item()


def _want_decoder(*sessions: Predictor) -> None:
    if any(session.kind != "decoder" for session in sessions):
        raise CompileError(
            "an encoder predicts no next token, it has no perplexity",
            hint="compare its outputs with a reference's",
        )


def _want_same_width(session: Predictor, reference: Predictor) -> None:
    if session.vocab_size != reference.vocab_size:
        raise CompileError(
            f"the model has {session.vocab_size} outputs, the reference {reference.vocab_size}",
            hint="give the model that the artifact was compiled from",
        )
