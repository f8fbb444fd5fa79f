"""The last step of a compile must be able to fail: an artifact of other weights is not let through."""

import dataclasses
from pathlib import Path

import pytest
import torch
from llama_module import VOCAB, llama

from gammac.diagnostics import CompileError
from gammac.ir import Module
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.legalize_onnx import LegalizeOnnx
from gammac.pipeline import Context, Pipeline
from gammac.runtime import check as check_module
from gammac.runtime.check import check_artifact
from gammac.runtime.manifest import Manifest
from gammac.targets.onnx.emit import emit
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore


def written(store: WeightStore, folder: Path, seed: int = 0) -> Module:
    ctx = Context(load_target("cpu-x86"), store)
    module = llama(store, seed=seed)
    module = Pipeline((InsertKvCache(), LegalizeOnnx())).run(module, ctx)
    folder.mkdir()
    emit(module, store, folder)
    return module


def test_another_model_s_artifact_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = WeightStore()
    mine, other = written(store, tmp_path / "mine"), written(store, tmp_path / "other", seed=1)
    manifest = Manifest("m", "sha256:0", "cpu", "decoder", "onnx", 256, 32.0, 32.0, 32.0)
    tokens = torch.randint(0, VOCAB, (1, 64), generator=torch.Generator().manual_seed(0))
    arguments = (llama(store), mine, store, Calibration(tokens))
    check = check_artifact(*arguments, tmp_path / "mine", manifest)
    assert check.against_module.kl < 1e-4 and check.against_original.kl < 1e-4  # type: ignore[union-attr]
    with pytest.raises(CompileError, match="does not compute what its module says") as found:
        check_artifact(*arguments, tmp_path / "other", dataclasses.replace(manifest))
    assert found.value.diagnostics[0].hint.startswith("this is a fault")
    assert other.name == mine.name
    # a model that quantizing has left nothing of turns every rounding into nonsense: that is said, too
    monkeypatch.setattr(check_module, "BROKEN_KL", 0.0)
    with pytest.raises(CompileError) as found:
        check_artifact(*arguments, tmp_path / "other", manifest)
    assert "a larger budget helps" in found.value.diagnostics[0].hint
