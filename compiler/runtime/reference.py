"""Sessions that artifacts are compared with: a gammac module in the interpreter, a model in transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from gammac.adapter_file import demand_no_bypass
from gammac.formats import load_float
from gammac.frontend.source import nonsense_is_an_error, quiet
from gammac.ir import Module
from gammac.ir.core import Function, Value
from gammac.ir.interpret import run
from gammac.runtime.session import Logits, Tokens, check_room
from gammac.weights import WeightStore

NO_LIMIT: Final = 1 << 30
HEADS: Final[dict[str, Any]] = {
    "Model": AutoModel, "ForMaskedLM": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
}  # fmt: skip


def _numpy(logits: Tensor) -> Logits:
    array: Logits = logits.detach().float().contiguous().numpy()
    return array


def _tensor(tokens: Tokens) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tokens, np.int64))


class InterpreterSession:
    """A module in the interpreter: `forward` on whole sequences, `prefill` and `decode` with a cache.

    Parameters are found by name (input_ids, position_ids, attention_mask, token_type_ids); those of
    four dimensions are caches, in the order of the function's results after the first.
    """

    def __init__(
        self, module: Module, store: WeightStore, *, context: int = NO_LIMIT, keep_weights: bool = True
    ) -> None:
        self._module = module
        self._store = store
        self._context = context
        self._keep_weights = keep_weights
        self._kept: dict[str, Tensor] = {}
        self._caches: list[Tensor] = []
        self._capacity = context

    @property
    def vocab_size(self) -> int:
        """Numbers in a row of the first result."""
        size = self._first("forward", "prefill", "decode").returns[0].type.shape[-1]
        assert isinstance(size, int), "the last dimension of an output is fixed"
        return size

    @property
    def kind(self) -> str:
        """As the module says; without a word, decoder if it has a function decode."""
        found = "decoder" if "decode" in self._module.functions else "encoder"
        return str(self._module.attrs.get("kind", found))

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self._context

    def logits(self, tokens: Tokens) -> Logits:
        """Output f32 [batch, seq, vocab] of tokens i64 [batch, seq]; the cache is not touched."""
        check_room(tokens.shape[1], self.context)
        return _numpy(self._run(self._first("forward", "prefill", "decode"), _tensor(tokens), [])[0])

    def prefill(self, tokens: Tokens) -> Logits:
        """Append tokens i64 [seq] to the cache; logits f32 [vocab] after the last of them."""
        past = self._caches[0].shape[2] if self._caches else 0
        check_room(past + len(tokens), self._capacity)
        function = self._first("decode") if past else self._first("prefill", "decode")
        out, *self._caches = self._run(function, _tensor(tokens)[None], self._caches)
        return _numpy(out[0, -1])

    def decode(self, token: int) -> Logits:
        """Append one token to the cache; logits f32 [vocab] after it."""
        return self.prefill(np.array([token], np.int64))

    def reset(self, capacity: int | None = None) -> None:
        """Empty the cache and make room for `capacity` tokens (default: the context)."""
        self._caches = []
        self._capacity = min(capacity or self._context, self._context)

    def _first(self, *names: str) -> Function:
        """The first of these functions that the module has."""
        return next(self._module.functions[name] for name in names if name in self._module.functions)

    @torch.inference_mode()
    def _run(self, function: Function, tokens: Tensor, caches: list[Tensor]) -> list[Tensor]:
        past = caches[0].shape[2] if caches else 0
        params = _cache_params(function)
        caches = caches if past else [_no_rows(param, len(tokens)) for param in params]
        inputs = {**_token_inputs(tokens, past), **{p.name: c for p, c in zip(params, caches, strict=True)}}
        wanted = {p.name: inputs[p.name] for p in function.params if p.name in inputs}
        return list(run(function, wanted, self._weight).values())

    def _weight(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        tensor = load_float(self._module.weights[name], self._store)
        if self._keep_weights:
            self._kept[name] = tensor
        return tensor


def _cache_params(function: Function) -> list[Value]:
    return [param for param in function.params if param.type.rank == 4]


def _no_rows(param: Value, batch: int) -> Tensor:
    _, heads, _, dim = param.type.shape
    assert isinstance(heads, int) and isinstance(dim, int), "heads and their size are fixed"
    return torch.zeros(batch, heads, 0, dim)


def _token_inputs(tokens: Tensor, past: int) -> Mapping[str, Tensor]:
    batch, seq = tokens.shape
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(past, past + seq).expand(batch, seq),
        "attention_mask": torch.ones(batch, past + seq, dtype=torch.int64),
        "token_type_ids": torch.zeros_like(tokens),
    }


def load_model(folder: Path) -> Any:
    """A transformers model in fp32 from a local folder, by the head that its config names.

    Raises CompileError when the folder holds no model that transformers can read, or more than that.
    """
    demand_no_bypass(folder)
    with quiet(), nonsense_is_an_error(str(folder)):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        head = ((config.architectures or [""])[0]).removeprefix(type(config).__name__.removesuffix("Config"))
        auto: Any = HEADS.get(head, AutoModelForCausalLM)
        return auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


class TransformersSession:
    """A transformers model, fp32: the reference of every figure."""

    def __init__(self, model: Any) -> None:
        self._model: Any = load_model(model).eval() if isinstance(model, Path) else model.eval()
        self._cache: Any = None
        self._length = 0
        self._capacity = self.context

    @property
    def vocab_size(self) -> int:
        """Numbers in a row of the output."""
        config = self._model.config
        if self._is_classifier():
            return int(config.num_labels)
        return int(config.vocab_size if self._has_head() else config.hidden_size)

    def _is_classifier(self) -> bool:
        return type(self._model).__name__.endswith("ForSequenceClassification")

    def _has_head(self) -> bool:
        return self._model.get_output_embeddings() is not None

    @property
    def kind(self) -> str:
        """decoder if the class of the model predicts the next token."""
        return "decoder" if type(self._model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return int(getattr(self._model.config, "max_position_embeddings", NO_LIMIT))

    @torch.inference_mode()
    def logits(self, tokens: Tokens) -> Logits:
        """Output f32 [batch, seq, vocab] of tokens i64 [batch, seq]; the cache is not touched."""
        check_room(tokens.shape[1], self.context)
        keep_no_cache = {"use_cache": False} if self.kind == "decoder" else {}
        out = self._model(input_ids=_tensor(tokens), **keep_no_cache)
        has_logits = self._has_head() or self._is_classifier()
        return _numpy(out.logits if has_logits else out.last_hidden_state)

    @torch.inference_mode()
    def prefill(self, tokens: Tokens) -> Logits:
        """Append tokens i64 [seq] to the cache; logits f32 [vocab] after the last of them."""
        check_room(self._length + len(tokens), self._capacity)
        out = self._model(input_ids=_tensor(tokens)[None], past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        self._length += len(tokens)
        return _numpy(out.logits[0, -1])

    def decode(self, token: int) -> Logits:
        """Append one token to the cache; logits f32 [vocab] after it."""
        return self.prefill(np.array([token], np.int64))

    def reset(self, capacity: int | None = None) -> None:
        """Empty the cache and make room for `capacity` tokens (default: the context)."""
        self._cache = None
        self._length = 0
        self._capacity = min(capacity or self.context, self.context)
