"""A cache that lost or damaged files costs time, never a wrong result, and no second failure."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llama_module import llama
from safetensors.torch import load_file

from gammac.cache import PassCache
from gammac.diagnostics import CompileError
from gammac.formats import load_candidate
from gammac.ir import Module
from gammac.passes.candidates import Candidates
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.weights import WeightStore

RTN = Pipeline((Candidates("w3g32", "w8g32", "rtn"),))


def objects(folder: Path) -> list[Path]:
    """What passes wrote, the weights of the model itself apart."""
    return sorted(p for p in (folder / "objects").rglob("*.safetensors") if "codes" in load_file(p))


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    store = WeightStore(tmp_path / "weights")
    return Context(load_target("cpu-x86"), store, cache=PassCache(tmp_path / "passes"))


def quantized(ctx: Context) -> Module:
    return RTN.run(llama(ctx.store), ctx)


def test_a_candidate_that_is_gone_is_made_again(ctx: Context, tmp_path: Path) -> None:
    before = quantized(ctx)
    kept = objects(tmp_path / "weights")
    for path in kept:
        remove(path)
    assert quantized(ctx).weights == before.weights
    assert objects(tmp_path / "weights") == kept


@pytest.mark.parametrize("harm", [remove, truncate])
def test_behind_an_error_the_next_run_succeeds(
    ctx: Context, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    module = quantized(ctx)
    weight = module.weights["layers.0.q.weight"]
    whole = load_candidate(weight, "w3g32", ctx.store).dequantize()
    for path in objects(tmp_path / "weights"):
        harm(path)
    with pytest.raises(CompileError, match=r"run the compile again|a \.gir file needs the cache"):
        load_candidate(weight, "w3g32", ctx.store)
    again = quantized(ctx).weights[weight.name]
    assert torch.equal(load_candidate(again, "w3g32", ctx.store).dequantize(), whole)
