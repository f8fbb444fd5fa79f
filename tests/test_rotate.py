"""Rotations: Hadamard matrices, and that folding norms and rotating keep every family's function."""

import dataclasses
import math

import pytest
import torch
from families import captured
from llama_module import llama
from torch import Tensor

from gammac.calibration import inputs_of
from gammac.diagnostics import CompileError
from gammac.ir import Module, to_text
from gammac.ir.interpret import run
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.fold_norms import FoldNorms
from gammac.passes.hadamard import hadamard, randomized
from gammac.passes.insert_kv_cache import InsertKvCache
from gammac.passes.keep_precision import KeepPrecision
from gammac.passes.raise_patterns import RaisePatterns
from gammac.passes.rotate import BACK, ROTATION, Rotate
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.weights import WeightStore


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 64, 192, 576, 896, 1536])
def test_hadamard_matrices_are(size: int) -> None:
    found = hadamard(size)
    assert found is not None and found.abs().eq(1).all()
    torch.testing.assert_close(found @ found.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [6, 7, 92])
def test_other_sizes_get_an_orthogonal_matrix(size: int) -> None:
    assert hadamard(size) is None
    found = randomized(size, 3)
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(found, randomized(size, 3)) and not torch.equal(found, randomized(size, 4))


def context(store: WeightStore, seed: int = 0) -> Context:
    return Context(load_target("cpu-x86"), store, seed=seed)


def with_outliers(module: Module, store: WeightStore) -> Module:
    """Gains that are no ones, and weights of which a few stand out, as in trained models."""
    generator = torch.Generator().manual_seed(5)
    changed = []
    for name, weight in module.weights.items():
        data = store.tensor(weight.digest).clone()
        if "norm" in name:
            data = data * (0.5 + torch.rand(data.shape, generator=generator))
        elif "role" in weight.attrs:
            data[:, 3] *= 8
        changed.append(dataclasses.replace(weight, digest=store.put({"data": data})))
    return module.with_weights(*changed)


def logits_of(module: Module, store: WeightStore, function: str = "forward") -> Tensor:
    tokens = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(1))
    found = module.functions[function]
    with torch.no_grad():
        return run(found, inputs_of(found, tokens), lambda n: store.tensor(module.weights[n].digest))[
            "logits"
        ]


@pytest.fixture
def store() -> WeightStore:
    return WeightStore()


@pytest.fixture
def module(store: WeightStore) -> Module:
    return with_outliers(llama(store), store)


def rotated(module: Module, store: WeightStore, seed: int = 0) -> Module:
    return Pipeline((FoldNorms(), Rotate())).run(module, context(store, seed))


def test_the_function_is_kept(module: Module, store: WeightStore) -> None:
    folded = FoldNorms().run(module, context(store))
    for changed in (folded, Rotate(heads=False).run(folded, context(store)), rotated(module, store)):
        assert changed.weights != module.weights
        torch.testing.assert_close(logits_of(changed, store), logits_of(module, store), rtol=1e-4, atol=1e-4)


def test_only_the_gain_behind_a_tied_head_stays(module: Module, store: WeightStore) -> None:
    folded = FoldNorms().run(module, context(store))
    for name, weight in folded.weights.items():
        if name.endswith(("norm1.weight", "norm2.weight")):
            assert (store.tensor(weight.digest) == 1).all()
    assert folded.weights["norm.weight"] == module.weights["norm.weight"]
    assert folded.weights["embed.weight"] == module.weights["embed.weight"]


def test_a_tied_table_stays_and_the_stream_is_turned_at_both_ends(module: Module, store: WeightStore) -> None:
    found = rotated(module, store)
    assert found.weights["embed.weight"] == module.weights["embed.weight"]
    turns = [op.weight() for op in found.functions["forward"].ops if op.name == "linear"]
    assert [ref.name for ref in turns if ref and ref.name.startswith(ROTATION)] == [ROTATION, BACK]
    rotation, back = (store.tensor(found.weights[n].digest) for n in (ROTATION, BACK))
    torch.testing.assert_close(rotation @ back, torch.eye(len(back)), rtol=0, atol=1e-6)


def test_nothing_stands_out_afterwards(module: Module, store: WeightStore) -> None:
    """The largest weight beside the mean square, and the fourth moment, of what reads the stream."""
    found = rotated(module, store)

    def peak(module: Module, name: str) -> float:
        w = store.tensor(module.weights[name].digest)
        return float(w.abs().max() / w.square().mean().sqrt())

    def kurtosis(module: Module, name: str) -> float:
        w = store.tensor(module.weights[name].digest).double()
        return float(w.pow(4).mean() / w.square().mean().square())

    for name in ("layers.0.q.weight", "layers.1.up.weight", "layers.1.gate.weight"):
        assert peak(found, name) < 0.6 * peak(module, name)
        assert kurtosis(found, name) < 5 < kurtosis(module, name)


def test_what_is_multiplied_keeps_its_size(module: Module, store: WeightStore) -> None:
    folded, found = FoldNorms().run(module, context(store)), rotated(module, store)
    for name, weight in folded.weights.items():
        if weight.attrs.get("role") == "block":
            before, after = (store.tensor(m.weights[name].digest) for m in (folded, found))
            assert math.isclose(before.norm(), after.norm(), rel_tol=1e-5)


def test_equal_seeds_equal_modules(module: Module, store: WeightStore) -> None:
    assert to_text(rotated(module, store, 1)) == to_text(rotated(module, store, 1))
    assert to_text(rotated(module, store, 1)) != to_text(rotated(module, store, 2))


def test_a_module_with_a_cache_is_refused(module: Module, store: WeightStore) -> None:
    split = Pipeline((InsertKvCache(), KeepPrecision())).run(module, context(store))
    with pytest.raises(CompileError, match="captured function alone"):
        Rotate().run(split, context(store))


# ---- families -----------------------------------------------------------------------------------

ROTATED = ("llama", "qwen2", "qwen3", "mistral", "phi3", "phi3-partial")


def family_rotated(family: str) -> tuple[Module, Module, WeightStore]:
    """Before and behind, raised but without a cache."""
    found = captured(family)
    ctx = context(found.store)
    before = Pipeline((FoldConstants(), RaisePatterns())).run(found.source, ctx)
    return before, Pipeline((FoldNorms(), Rotate())).run(before, ctx), found.store


@pytest.mark.parametrize("family", ROTATED)
def test_families_keep_their_logits(family: str) -> None:
    before, after, store = family_rotated(family)
    rotations = [
        n for n, w in after.weights.items() if w.digest != getattr(before.weights.get(n), "digest", "")
    ]
    assert len(rotations) >= 8
    expected = logits_of(before, store)
    torch.testing.assert_close(logits_of(after, store), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "message"),
    [("gemma3", "what rms_norm puts out is added"), ("gpt2", "no RMS norm"), ("opt", "no RMS norm")],
)
def test_other_families_are_refused(family: str, message: str) -> None:
    with pytest.raises(CompileError, match=message) as caught:
        family_rotated(family)
    assert "--rotate" in str(caught.value)
