"""What the tests of AWQ and SmoothQuant share: outliers, and a module's inputs and outputs by hand."""

import dataclasses

import torch
from families import captured
from torch import Tensor

from gammac.calibration import inputs_of
from gammac.formats import load_float
from gammac.ir import Module, WeightRef
from gammac.ir.interpret import Env, bind, run, run_op
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.raise_patterns import RaisePatterns
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.texts import Calibration
from gammac.weights import WeightStore

TOKENS = torch.randint(0, 50, (5, 24), generator=torch.Generator().manual_seed(1))


def context(store: WeightStore, tokens: Tensor = TOKENS) -> Context:
    """A context with calibration text."""
    return Context(load_target("cpu-x86"), store, (), Calibration(tokens))


def logits_of(module: Module, store: WeightStore) -> Tensor:
    """What `@forward` puts out for the first two windows of TOKENS."""
    function = module.functions["forward"]
    with torch.no_grad():
        found = run(function, inputs_of(function, TOKENS[:2]), lambda n: load_float(module.weights[n], store))
    return found[function.return_names[0]]


def with_outliers(module: Module, store: WeightStore) -> Module:
    """A few input channels of every norm stand out, as in trained models."""
    changed = []
    for name, weight in module.weights.items():
        if "norm" in name:
            data = store.tensor(weight.digest).clone()
            data[[3, 17]] *= 20
            changed.append(dataclasses.replace(weight, digest=store.put({"data": data})))
    return module.with_weights(*changed)


def raised(family: str) -> tuple[Module, Context]:
    """A family behind the first passes, without a cache."""
    found = captured(family)
    ctx = context(found.store)
    return Pipeline((FoldConstants(), RaisePatterns())).run(found.source, ctx), ctx


def inputs_at(module: Module, ctx: Context, loc: str) -> Tensor:
    """What the linear at `loc` reads, [tokens, channels], run without streaming."""
    function = module.functions["forward"]
    assert ctx.calibration is not None
    found, sizes = bind(function, inputs_of(function, ctx.calibration.tokens))
    env: Env = dict(found)
    for op in function.ops:
        operands = [
            ctx.store.tensor(module.weights[o.name].digest) if isinstance(o, WeightRef) else env[o]
            for o in op.operands
        ]
        if op.name == "linear" and op.loc == loc:
            return operands[0].flatten(0, -2)
        env.update(zip(op.results, run_op(op, operands, sizes), strict=True))
    raise AssertionError(loc)
