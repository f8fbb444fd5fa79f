"""A cache that lost or damaged files costs time, never a wrong result, and no second failure."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llama_module import VOCAB, llama
from safetensors.torch import load_file

from gammac.cache import PassCache
from gammac.diagnostics import CompileError
from gammac.formats import load_candidate
from gammac.ir import Module
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import DIGEST, WeightStore

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


def test_a_gram_matrix_that_is_gone_in_the_middle_is_collected_again(ctx: Context, tmp_path: Path) -> None:
    """Two of the layers: what they read was forgotten since, and is made again."""
    tokens = torch.randint(0, VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))
    ctx = dataclasses.replace(ctx, calibration=Calibration(tokens))
    before = CollectGrams().run(llama(ctx.store), ctx)
    for name in ("layers.0.down.weight", "layers.1.q.weight"):
        digest = str(before.weights[name].attrs["gram"]).removeprefix(DIGEST)
        next((tmp_path / "weights").rglob(f"{digest}.safetensors")).unlink()
    assert CollectGrams().run(llama(ctx.store), ctx).weights == before.weights
    assert all(str(w.attrs["gram"]) in ctx.store for w in before.weights.values() if "gram" in w.attrs)


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
