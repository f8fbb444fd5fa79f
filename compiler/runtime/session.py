"""Running a model: token ids in, logits out. Numpy at the seam, so that an artifact runs without torch.

`logits` looks at whole sequences and keeps nothing (evaluation); `prefill` and `decode` read one
sequence piece by piece into a key-value cache (generation).
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]
import psutil  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as errors  # type: ignore[import-untyped]

from gammac.diagnostics import CompileError
from gammac.processor import CPU, CUDA
from gammac.runtime.adapters import Factors, factors_for
from gammac.runtime.artifact import MANIFEST, MODEL, Artifact, open_artifact
from gammac.runtime.cache import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    NUMPY_TYPES,
    Cache,
    GrowingCache,
    SharedCache,
    cache_inputs,
)

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

LOAD_ERRORS: Final = (
    errors.EPFail, errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf,
    errors.NotImplemented,
)  # fmt: skip
SPINNING: Final = "session.intra_op.allow_spinning"
GENAI_CONFIG: Final = "genai_config.json"


TVM: Final = "tvm"


class Predictor(Protocol):
    """A model that looks at whole sequences. Raises CompileError for tokens that are more than it takes."""

    @property
    def vocab_size(self) -> int:
        """Numbers in a row of logits; for an encoder the width of its output, which may be classes."""
        ...

    @property
    def kind(self) -> str:
        """decoder or encoder."""
        ...

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        ...

    def logits(self, tokens: Tokens) -> Logits:
        """Logits f32 [batch, seq, vocab] of tokens i64 [batch, seq]; of a classifier f32 [batch, classes]."""
        ...


class Session(Predictor, Protocol):
    """A model that can be run; `logits` does not touch its cache."""

    def prefill(self, tokens: Tokens) -> Logits:
        """Append tokens i64 [seq] to the cache; logits f32 [vocab] after the last of them."""
        ...

    def decode(self, token: int) -> Logits:
        """Append one token to the cache; logits f32 [vocab] after it."""
        ...

    def reset(self, capacity: int | None = None) -> None:
        """Empty the cache, and make room for `capacity` tokens (default: the context)."""
        ...


class ArtifactSession(Session, Protocol):
    """A session on an artifact's own files."""

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, all layers."""
        ...

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of the weights that one decode step reads; of tables only some rows are."""
        ...


def default_threads() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def check_room(length: int, capacity: int) -> None:
    """Raise CompileError when `length` tokens don't fit."""
    if length > capacity:
        raise CompileError(f"{length} tokens are more than the {capacity} that fit", hint="give fewer tokens")


@dataclass(frozen=True)
class OnnxModel:
    """What the session must know besides the graph."""

    path: Path
    kind: str
    context: int
    shares_cache: bool
    """Whether past and present may be one buffer, as GroupQueryAttention allows."""

    library: Path | None = None
    provider: str = CPU
    """What its operators are chosen for: cpu, or cuda, which this machine may lack."""

    head_size: int = 0
    """Features of a head of the cache, for graphs that leave it open."""


def model_of_artifact(artifact: Artifact) -> OnnxModel:
    """The model inside an artifact."""
    manifest = artifact.manifest
    config = _genai_config(artifact.folder) if GENAI_CONFIG in manifest.files else {}
    shares = bool(config.get("search", {}).get("past_present_share_buffer", False))
    return OnnxModel(
        artifact.path(MODEL), manifest.kind, manifest.context, shares, artifact.library, manifest.provider
    )


def model_of_genai_folder(folder: Path) -> OnnxModel:
    """The model inside a folder that onnxruntime-genai's builder wrote."""
    config = _genai_config(folder)
    decoder = config["model"]["decoder"]
    return OnnxModel(
        folder / decoder["filename"],
        "decoder",
        int(config["model"]["context_length"]),
        bool(config["search"]["past_present_share_buffer"]),
        head_size=int(decoder["head_size"]),
    )


def open_session(
    folder: Path, threads: int | None = None, *, verify: bool = True, spinning: bool = True,
    adapters: Path | None = None,
) -> ArtifactSession:  # fmt: skip
    """A session on an artifact, or on a folder of onnxruntime-genai to compare with. `adapters` is a file
    whose factors stand for those that the artifact was compiled with.

    `spinning` threads wait busily for the next operator: right for a machine with a core for each
    thread, wrong for a shared one (with 7 processes on 2 cores, decode took twice as long).
    Raises CompileError when the folder is neither, is damaged, or can't be loaded.
    """
    if adapters is None and not (folder / MANIFEST).is_file() and (folder / GENAI_CONFIG).is_file():
        return OnnxSession(model_of_genai_folder(folder), threads, spinning)
    artifact = open_artifact(folder, verify)
    factors = None if adapters is None else factors_for(artifact.manifest, adapters)
    if artifact.manifest.emitter == TVM:
        return open_tvm(folder, threads, spinning, factors)
    return OnnxSession(model_of_artifact(artifact), threads, spinning, factors)


def open_tvm(
    folder: Path, threads: int | None = None, spinning: bool = True, factors: Factors | None = None
) -> ArtifactSession:
    """A session on the files that the TVM emitter wrote, sealed or not. Raises CompileError."""
    from gammac.runtime.tvm_session import TvmSession

    return TvmSession(folder, threads, spinning, factors)


def _genai_config(folder: Path) -> dict[str, Any]:
    path = folder / GENAI_CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompileError(f"{path} can't be read: {error}", hint="compile the model again") from error
    return config


class OnnxSession:
    """An ONNX decoder or encoder on the CPU.

    Inputs by name: input_ids i64 [batch, seq]; where the graph has them attention_mask i64
    [batch, total], position_ids and token_type_ids i64 [batch, seq], past_key_values.%d.key and .value
    [batch, kv_heads, past, dim]. Outputs: logits (or the first one) f32 [batch, seq, vocab], present.*.
    `factors` stand for those of its adapters.
    """

    def __init__(
        self,
        model: OnnxModel,
        threads: int | None = None,
        spinning: bool = True,
        factors: Factors | None = None,
    ) -> None:
        # the runtime reads them where they are, as long as the session lives
        self._replaced = _replaced(model, factors) if factors else {}
        self._ort = _load(model, threads or default_threads(), spinning, self._replaced)
        self.model = model
        self._inputs = frozenset(value.name for value in self._ort.get_inputs())
        self._past = cache_inputs(self._ort, model.head_size)
        outputs = self._ort.get_outputs()
        self._output = next((o for o in outputs if o.name == "logits"), outputs[0])
        self._cache: Cache | None = None

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, all layers."""
        return sum(cache.zeros(1, 1).nbytes for cache in self._past)

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of the weights that one decode step reads."""
        from gammac.runtime.onnx_reads import weight_bytes_per_token

        return weight_bytes_per_token(self.model.path)

    @property
    def vocab_size(self) -> int:
        """Numbers in a row of the output."""
        return int(self._output.shape[-1])

    @property
    def kind(self) -> str:
        """decoder or encoder."""
        return self.model.kind

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.model.context

    def logits(self, tokens: Tokens) -> Logits:
        """Output f32 [batch, seq, vocab] of tokens i64 [batch, seq]; the cache is not touched."""
        check_room(tokens.shape[1], self.context)
        binding = self._ort.io_binding()
        for value in self._past:
            binding.bind_cpu_input(value.name, value.zeros(len(tokens), 0))
        return self._run(binding, tokens, past=0)

    def prefill(self, tokens: Tokens) -> Logits:
        """Append tokens i64 [seq] to the cache; logits f32 [vocab] after the last of them."""
        if self._cache is None:
            self.reset()
        assert self._cache is not None and self.kind == "decoder", "an encoder has nothing to decode"
        check_room(self._cache.length + len(tokens), self._cache.capacity)
        binding = self._cache.bind()
        logits = self._run(binding, tokens[None], past=self._cache.length)
        self._cache.advance(len(tokens))
        last: Logits = logits[0, -1].copy()
        return last

    def decode(self, token: int) -> Logits:
        """Append one token to the cache; logits f32 [vocab] after it."""
        return self.prefill(np.array([token], np.int64))

    def reset(self, capacity: int | None = None) -> None:
        """Empty the cache and make room for `capacity` tokens (default: the context)."""
        room = min(capacity or self.context, self.context)
        kind = SharedCache if self.model.shares_cache else GrowingCache
        self._cache = kind(self._ort, self._past, room)

    def _run(self, binding: ort.IOBinding, tokens: Tokens, past: int) -> Logits:
        batch, seq = tokens.shape
        for name, array in self._feeds(tokens, past).items():
            binding.bind_cpu_input(name, array)
        # the result is written where numpy reads it: logits of a long prompt are 100 MB and more
        rows = (batch, seq)[: len(self._output.shape) - 1]
        out = np.empty((*rows, self.vocab_size), NUMPY_TYPES[self._output.type])
        binding.bind_ortvalue_output(self._output.name, ort.OrtValue.ortvalue_from_numpy(out))
        self._ort.run_with_iobinding(binding)
        return out.astype(np.float32, copy=False)

    def _feeds(self, tokens: Tokens, past: int) -> dict[str, Tokens]:
        batch, seq = tokens.shape
        made: dict[str, Callable[[], npt.NDArray[Any]]] = {
            "input_ids": lambda: tokens,
            "attention_mask": lambda: np.ones((batch, past + seq)),
            "position_ids": lambda: np.broadcast_to(np.arange(past, past + seq), tokens.shape),
            "token_type_ids": lambda: np.zeros(tokens.shape),
        }
        return {n: np.ascontiguousarray(make(), np.int64) for n, make in made.items() if n in self._inputs}


def _replaced(model: OnnxModel, factors: Factors) -> dict[str, ort.OrtValue]:
    from gammac.runtime.onnx_factors import replaced_initializers

    return replaced_initializers(model.path, factors)


def providers_for(wanted: str) -> list[str]:
    """ONNX Runtime's names of what runs a graph, first the one wanted. What there is none of here, the
    processor runs, in the same precision."""
    return [CPU_PROVIDER] if wanted == CPU or lacking_provider(wanted) else [CUDA_PROVIDER, CPU_PROVIDER]


def lacking_provider(wanted: str) -> str:
    """Why a provider can't be had here; nothing if it can."""
    if wanted == CUDA and CUDA_PROVIDER not in ort.get_available_providers():
        return f"the artifact is for CUDA, which onnxruntime {ort.__version__} lacks here"
    return ""


def _load(
    model: OnnxModel, threads: int, spinning: bool, replaced: Mapping[str, ort.OrtValue]
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(SPINNING, "1" if spinning else "0")
    if replaced:
        options.add_external_initializers(list(replaced), list(replaced.values()))
    try:
        if model.library is not None:
            options.register_custom_ops_library(str(model.library))
        return ort.InferenceSession(str(model.path), options, providers=providers_for(model.provider))
    except LOAD_ERRORS as error:
        raise CompileError(
            f"{model.path.name} can't be loaded: {error}",
            hint=f"this is onnxruntime {ort.__version__}; the manifest says which one made the artifact",
        ) from error
