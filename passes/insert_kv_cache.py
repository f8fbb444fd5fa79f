"""Split a decoder into prefill and decode around a cache of keys and values.

    func @forward(%input_ids, %position_ids) {
      %3 = attention %0, %1, %2 {scale = 0.125, causal = true}
      return logits = %4
->
    func @prefill(%input_ids, %position_ids) {
      %3 = attention %0, %1, %2 {scale = 0.125, causal = true}
      return logits = %4, present_key.0 = %1, present_value.0 = %2

    func @decode(%input_ids, %position_ids, %past_key.0: f32[batch,3,past,64], %past_value.0: …) {
      %3 = kv_append %past_key.0, %1 : f32[batch,3,past+seq,64]
      %4 = kv_append %past_value.0, %2 : f32[batch,3,past+seq,64]
      %5 = attention %0, %3, %4 {scale = 0.125, causal = true}
      return logits = %6, present_key.0 = %3, present_value.0 = %4

`forward` stays. An encoder is left as it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from gammac.diagnostics import Diagnostic
from gammac.ir import Builder, Function, Module, Op, Operand, Sym, Value, rewrite
from gammac.pipeline import Context, Invariant


def attention_is_one_op(module: Module) -> Iterator[Diagnostic]:
    """Invariant: every layer of a decoder has one causal `attention`, without a mask tensor."""
    if module.attrs.get("kind") != "decoder":
        return
    for name in module.functions:
        found = [op for op in module.functions[name].ops if op.name == "attention"]
        for op in found:
            if len(op.operands) > 3 or not op.attrs["causal"]:
                yield Diagnostic("attention of a decoder is causal and has no mask tensor", op.loc)
        if len(found) != module.attrs.get("layers"):
            yield Diagnostic(
                f"{len(found)} attention ops for {module.attrs.get('layers')} layers",
                f"@{name}",
                "the model computes attention in a way that the front end doesn't recognize",
            )


def decoder_has_a_cache(module: Module) -> Iterator[Diagnostic]:
    """Invariant: a decoder has the functions `prefill` and `decode`."""
    if module.attrs.get("kind") == "decoder" and not {"prefill", "decode"} <= module.functions.keys():
        yield Diagnostic("a decoder needs @prefill and @decode", hint="run insert_kv_cache first")


@dataclass(frozen=True)
class InsertKvCache:
    """Make `prefill` and `decode` from `forward`."""

    name: ClassVar[str] = "insert_kv_cache"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = (attention_is_one_op,)
    ensures: ClassVar[tuple[Invariant, ...]] = (decoder_has_a_cache,)

    def run(self, module: Module, ctx: Context) -> Module:
        """The module with both functions added; an encoder unchanged."""
        if module.attrs.get("kind") != "decoder":
            return module
        forward = module.functions["forward"]
        return module.with_functions(_prefill(forward), _decode(forward))


def _prefill(forward: Function) -> Function:
    present = [value for op in _attentions(forward) for value in op.operands[1:3]]
    return _returning(replace(forward, name="prefill"), present)


def _decode(forward: Function) -> Function:
    attentions = _attentions(forward)
    pasts = {op: _pasts(op, layer) for layer, op in enumerate(attentions)}
    params = (*forward.params, *(past for op in attentions for past in pasts[op]))
    present: list[Operand] = []

    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        if op not in pasts:
            return None
        cached = [
            b.emit("kv_append", past, new, loc=op.loc)
            for past, new in zip(pasts[op], operands[1:3], strict=True)
        ]
        present.extend(cached)
        return b.emit_all(op.name, operands[0], *cached, loc=op.loc, **op.attrs)

    widened = replace(forward, name="decode", params=params)
    decode = rewrite(widened, rule, params)
    return _returning(decode, present)


def _attentions(function: Function) -> list[Op]:
    return [op for op in function.ops if op.name == "attention"]


def _pasts(op: Op, layer: int) -> tuple[Value, Value]:
    """The parameters that hold the keys and values of one layer so far."""
    key, value = (
        o.type.with_shape(o.type.shape[0], o.type.shape[1], Sym.named("past"), o.type.shape[3])
        for o in op.operands[1:3]
    )
    return Value(key, f"past_key.{layer}"), Value(value, f"past_value.{layer}")


def _returning(function: Function, present: Sequence[Operand]) -> Function:
    layers = range(len(present) // 2)
    names = tuple(f"present_{what}.{layer}" for layer in layers for what in ("key", "value"))
    return replace(
        function,
        returns=(*function.returns, *present),
        return_names=(*function.return_names, *names),
    )
