"""What the tests of learned rounding and of distillation share: an allocated Llama, and a kill."""

from pathlib import Path
from typing import Any

import pytest
import torch
from llama_module import VOCAB, llama

from gammac.cache import PassCache
from gammac.ir import Module
from gammac.passes.allocate import Allocate
from gammac.passes.candidates import Candidates
from gammac.passes.sensitivity import WeightMse
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore


def context(store: WeightStore, cache: Path | None = None, **options: Any) -> Context:
    """With 64 windows of 24 tokens to learn from."""
    tokens = torch.randint(0, VOCAB, (64, 24), generator=torch.Generator().manual_seed(1))
    return Context(load_target("cpu-x86"), store, (), Calibration(tokens), cache=PassCache(cache), **options)


def allocated_llama(store: WeightStore) -> Module:
    """Two blocks in 2 and 4 bits."""
    passes = (Candidates("w2g32+w4g32", "w8g32", "rtn"), WeightMse(), Allocate(budget="2.5", tie=False))
    return Pipeline(passes).run(llama(store), context(store))


def kill_at(record: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on the cache raises KeyboardInterrupt at its new record number `record`; the records' keys."""
    original, keys = PassCache.record, list[str]()

    def dying(self: PassCache, key: str, compute: Any, *store: Any) -> dict[str, Any]:
        if not self.has_record(key):
            keys.append(key)
            if len(keys) == record:
                raise KeyboardInterrupt
        return original(self, key, compute, *store)

    monkeypatch.setattr(PassCache, "record", dying)
    return keys
