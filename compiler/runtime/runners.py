"""What is timed: an artifact in gammac's session, or a folder in onnxruntime-genai, by the same two clocks.

Both choose the likeliest token themselves and never stop early, so that the work is the same.
"""

import json
import time
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from gammac.diagnostics import CompileError
from gammac.runtime.session import GENAI_CONFIG, SPINNING, Session, Tokens

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


class SessionRunner:
    """A session of gammac's own runtime."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def prefill_seconds(self, prompt: int) -> float:
        """Time to read a prompt of so many tokens into an empty cache."""
        self.session.reset(prompt)
        tokens = prompt_of(prompt, self.session.vocab_size)
        started = time.perf_counter()
        self.session.prefill(tokens)
        return time.perf_counter() - started

    def decode_seconds(self, prompt: int, new: int) -> float:
        """Time for `new` tokens, one by one, after a prompt that is not counted."""
        self.session.reset(prompt + new)
        token = int(self.session.prefill(prompt_of(prompt, self.session.vocab_size)).argmax())
        started = time.perf_counter()
        for _ in range(new):
            token = int(self.session.decode(token).argmax())
        return time.perf_counter() - started


def import_genai() -> Any:
    """The module onnxruntime_genai. Raises CompileError when it is not installed."""
    try:
        import onnxruntime_genai  # type: ignore[import-untyped]
    except ImportError as error:
        raise CompileError(
            "onnxruntime-genai is not installed", hint="pip install 'gammac[genai]'"
        ) from error
    return onnxruntime_genai


class GenaiRunner:
    """A folder with a genai_config.json in onnxruntime-genai."""

    def __init__(self, folder: Path, threads: int, spinning: bool = True) -> None:
        self.genai = import_genai()
        if not (folder / GENAI_CONFIG).is_file():
            raise CompileError(
                f"{folder} holds no {GENAI_CONFIG}: onnxruntime-genai can't run it",
                hint="give the folder of a decoder that gammac compiled for ONNX, or of genai's own builder",
            )
        config = self.genai.Config(str(folder))
        options = {"intra_op_num_threads": threads, SPINNING: "1" if spinning else "0"}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = self.genai.Model(config)
        self.vocab_size = int(json.loads((folder / GENAI_CONFIG).read_text())["model"]["vocab_size"])

    def _generator(self, length: int) -> Any:
        params = self.genai.GeneratorParams(self.model)
        # a minimum as long as the maximum: an end token would stop the clock too early
        params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
        return self.genai.Generator(self.model, params)

    def prefill_seconds(self, prompt: int) -> float:
        """Time to read a prompt of so many tokens into an empty cache."""
        generator = self._generator(prompt + 1)
        tokens = prompt_of(prompt, self.vocab_size)
        started = time.perf_counter()
        generator.append_tokens(tokens)
        return time.perf_counter() - started

    def decode_seconds(self, prompt: int, new: int) -> float:
        """Time for `new` tokens, one by one, after a prompt that is not counted."""
        generator = self._generator(prompt + new + 1)
        generator.append_tokens(prompt_of(prompt, self.vocab_size))
        # the first token is chosen from the prompt's logits; each further one costs a step
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return time.perf_counter() - started
