"""What is timed, by the same two clocks: reading a prompt, and writing tokens one by one.

The likeliest token is always taken and none ends the text, so that the work is the same for all.
"""

import time
from abc import ABC, abstractmethod
from typing import Final, Protocol

import numpy as np

from gammac.runtime.session import Logits, Session, Tokens

FIRST_TOKEN: Final = 11
"""Prompts are a run of token ids from here: their values don't change the work."""


class Runner(Protocol):
    """A loaded model that can be timed."""

    def prefill_seconds(self, prompt: int) -> float:
        """Time to read a prompt of so many tokens into an empty cache."""
        ...

    def decode_seconds(self, prompt: int, new: int) -> float:
        """Time for `new` tokens, one by one, after a prompt that is not counted."""
        ...


def prompt_of(length: int, vocab_size: int) -> Tokens:
    """Token ids i64 [length]."""
    return (FIRST_TOKEN + np.arange(length, dtype=np.int64) * 7) % vocab_size


class StepRunner(ABC):
    """A model that takes tokens and gives logits, timed from outside."""

    vocab_size: int

    @abstractmethod
    def reset(self, capacity: int) -> None:
        """Empty the cache, and make room for so many tokens."""

    @abstractmethod
    def step(self, tokens: Tokens) -> Logits:
        """Append tokens i64 [n]; logits f32 [vocab] after the last."""

    def prefill_seconds(self, prompt: int) -> float:
        """Time to read a prompt of so many tokens into an empty cache."""
        self.reset(prompt)
        tokens = prompt_of(prompt, self.vocab_size)
        started = time.perf_counter()
        self.step(tokens)
        return time.perf_counter() - started

    def decode_seconds(self, prompt: int, new: int) -> float:
        """Time for `new` tokens, one by one, after a prompt that is not counted."""
        self.reset(prompt + new)
        token = self.step(prompt_of(prompt, self.vocab_size)).argmax()
        started = time.perf_counter()
        for _ in range(new):
            token = self.step(np.array([token], np.int64)).argmax()
        return time.perf_counter() - started


class SessionRunner(StepRunner):
    """A session of gammac's own runtime."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.vocab_size = session.vocab_size

    def reset(self, capacity: int) -> None:
        """Empty the cache, and make room for so many tokens."""
        self.session.reset(capacity)

    def step(self, tokens: Tokens) -> Logits:
        """Append tokens i64 [n]; logits f32 [vocab] after the last."""
        if len(tokens) == 1:
            return self.session.decode(int(tokens[0]))
        return self.session.prefill(tokens)
