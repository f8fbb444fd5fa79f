"""Other runtimes with a model of their own, timed by the same two clocks as an artifact.

Each chooses the likeliest token from the logits in numpy, as gammac's session does, except
onnxruntime-genai, which keeps its logits to itself and chooses on its own.
"""

import ctypes
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from gammac.diagnostics import CompileError
from gammac.runtime.artifact import is_artifact
from gammac.runtime.runners import Runner, SessionRunner, StepRunner, prompt_of
from gammac.runtime.session import (
    GENAI_CONFIG,
    SPINNING,
    Logits,
    Predictor,
    Tokens,
    check_room,
    default_threads,
    open_session,
)

EXTRA: Final = "pip install 'gammac[peers]'"
CONTEXT: Final = 2048
"""Room of a peer's cache, in tokens."""

GGUF: Final = "model.gguf"
OPENVINO: Final = "openvino_model.xml"


def import_genai() -> Any:
    """The module onnxruntime_genai. Raises CompileError when it is not installed."""
    try:
        import onnxruntime_genai  # type: ignore[import-untyped]
    except ImportError as error:
        raise CompileError(
            "onnxruntime-genai is not installed", hint="pip install 'gammac[genai]'"
        ) from error
    return onnxruntime_genai


@cache
def import_llama_cpp() -> Any:
    """The module llama_cpp, silenced. Raises CompileError when llama-cpp-python is not installed."""
    try:
        import llama_cpp  # type: ignore[import-not-found]
    except ImportError as error:
        raise CompileError("llama-cpp-python is not installed", hint=EXTRA) from error
    # kept in the module: C calls it as long as the process lives
    llama_cpp.gammac_silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(llama_cpp.gammac_silence, ctypes.c_void_p(0))
    return llama_cpp


def import_openvino() -> Any:
    """The module openvino. Raises CompileError when it is not installed."""
    try:
        import openvino  # type: ignore[import-not-found]
    except ImportError as error:
        raise CompileError("openvino is not installed", hint=EXTRA) from error
    return openvino


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


class LlamaCppRunner(StepRunner):
    """A .gguf file in llama.cpp, through the C interface: its Python class copies every logit."""

    kind = "decoder"
    context = CONTEXT

    def __init__(self, path: Path, threads: int, spinning: bool = True) -> None:
        self.llama = import_llama_cpp()
        self.llama.llama_backend_init()
        self.model = self.llama.llama_model_load_from_file(
            str(path).encode(), self.llama.llama_model_default_params()
        )
        if not self.model:
            raise CompileError(f"llama.cpp can't load {path}", hint="it is damaged, or of a newer kind")
        params = self.llama.llama_context_default_params()
        params.n_ctx = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        self._context = self.llama.llama_init_from_model(self.model, params)
        self.vocab_size = int(self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(self.model)))

    def reset(self, capacity: int) -> None:
        """Empty the cache."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self._context), True)

    def step(self, tokens: Tokens) -> Logits:
        """Append tokens i64 [n]; logits f32 [vocab] after the last."""
        array = (self.llama.llama_token * len(tokens))(*tokens.tolist())
        if self.llama.llama_decode(self._context, self.llama.llama_batch_get_one(array, len(tokens))) != 0:
            raise CompileError(f"llama.cpp can't take {len(tokens)} tokens")
        row = self.llama.llama_get_logits_ith(self._context, -1)
        logits: Logits = np.ctypeslib.as_array(row, shape=(self.vocab_size,))
        return logits

    def logits(self, tokens: Tokens) -> Logits:
        """Logits f32 [batch, seq, vocab] of tokens i64 [batch, seq]; the cache is emptied."""
        return np.stack([self._whole(row) for row in tokens])

    def _whole(self, row: Tokens) -> Logits:
        check_room(len(row), self.context)
        self.reset(len(row))
        batch = self.llama.llama_batch_init(len(row), 0, 1)
        try:
            batch.n_tokens = len(row)
            for i, token in enumerate(row.tolist()):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if self.llama.llama_decode(self._context, batch) != 0:
                raise CompileError(f"llama.cpp can't take {len(row)} tokens")
        finally:
            self.llama.llama_batch_free(batch)
        rows = self.llama.llama_get_logits(self._context)
        logits: Logits = np.ctypeslib.as_array(rows, shape=(len(row), self.vocab_size)).copy()
        return logits


class OpenVinoRunner(StepRunner):
    """A stateful OpenVINO model: tokens, their mask and positions in, logits out."""

    kind = "decoder"
    context = CONTEXT

    def __init__(self, path: Path, threads: int, spinning: bool = True) -> None:
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = import_openvino().Core().compile_model(str(path), "CPU", options)
        self.request = compiled.create_infer_request()
        self.vocab_size = int(compiled.output("logits").partial_shape[-1].get_length())
        self.past = 0

    def reset(self, capacity: int) -> None:
        """Empty the cache."""
        self.request.reset_state()
        self.past = 0

    def logits(self, tokens: Tokens) -> Logits:
        """Logits f32 [batch, seq, vocab] of tokens i64 [batch, seq]; the cache is emptied."""
        rows = []
        for row in tokens:
            check_room(len(row), self.context)
            self.reset(len(row))
            rows.append(self._all(row).copy())
        return np.stack(rows)

    def step(self, tokens: Tokens) -> Logits:
        """Append tokens i64 [n]; logits f32 [vocab] after the last."""
        last: Logits = self._all(tokens)[-1]
        return last

    def _all(self, tokens: Tokens) -> Logits:
        total = self.past + len(tokens)
        inputs = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.past, total)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.past = total
        logits: Logits = self.request.infer(inputs, share_inputs=True, share_outputs=True)["logits"][0]
        return logits


def _artifact(folder: Path, threads: int, spinning: bool) -> Runner:
    # checksums are for the first load on a machine, and no peer has any
    session = open_session(folder, threads, verify=False, spinning=spinning)
    if session.kind != "decoder":
        raise CompileError(f"{folder} is an encoder, it decodes nothing", hint="bench takes a decoder")
    return SessionRunner(session)


RUNTIMES: Final[Mapping[str, Callable[[Path, int, bool], Runner]]] = {
    "gammac": _artifact,
    "onnxruntime": GenaiRunner,
    "llama.cpp": LlamaCppRunner,
    "openvino": OpenVinoRunner,
}
"""How each runtime opens a path, with so many threads, spinning or not."""

IMPORTS: Final[Mapping[str, Callable[[], Any]]] = {
    "onnxruntime": import_genai,
    "llama.cpp": import_llama_cpp,
    "openvino": import_openvino,
}


@dataclass(frozen=True)
class Contestant:
    """What is timed: a label, a key of RUNTIMES, and the folder or file that it opens."""

    label: str
    runtime: str
    path: Path

    def open(self, threads: int, spinning: bool = True) -> Runner:
        """Load it. Raises CompileError when it can't be opened or its runtime is not installed."""
        return RUNTIMES[self.runtime](self.path, threads, spinning)


def runtime_of(path: Path) -> str:
    """The runtime that opens a path. Raises CompileError when none does."""
    if path.suffix == ".gguf":
        return "llama.cpp"
    if path.suffix == ".xml":
        return "openvino"
    if is_artifact(path):
        return "gammac"
    if (path / GENAI_CONFIG).is_file():
        return "onnxruntime"
    raise CompileError(
        f"{path} is nothing that can be compared with",
        hint=f"a .gguf file, an OpenVINO .xml, a folder with {GENAI_CONFIG}, or an artifact of gammac",
    )


def open_predictor(path: Path, threads: int | None = None, adapters: Path | None = None) -> Predictor:
    """What gives the logits of whole sequences: a session on an artifact (with `adapters` in place of its
    own), or a peer. Raises CompileError."""
    if path.suffix == ".gguf":
        return LlamaCppRunner(path, threads or default_threads())
    if path.suffix == ".xml":
        return OpenVinoRunner(path, threads or default_threads())
    return open_session(path, threads, adapters=adapters)
