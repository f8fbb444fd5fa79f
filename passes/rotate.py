"""Rotate the residual stream and the heads' values, so that no weight and no activation stands out.

    %1 = residual_add %0, %9                          %9 = linear %8, @down
    %2 = rms_norm %1, @ones {eps = 1e-05}
    %3 = linear %2, @up
->  the same ops on the stream x R instead of x: @down holds Rᵀ W, @up holds W R

R1 turns the residual stream: what writes to it is multiplied from the left, what reads it behind a norm
without a gain (see fold_norms) from the right. Where that is not possible (a table that the head shares, a
gain that stayed) the stream is turned by a linear of its own, @rotation or @rotation-back. R2 turns each
head's values and what reads them. Both are randomized Hadamard matrices, and vanish into the weights: the
function is kept, and weights come out close to Gaussian (QuaRot, arXiv 2404.00456, sections 3 and 4;
SpinQuant, arXiv 2405.16406, section 3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Final

from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.ir import Builder, Function, Module, Op, Operand, TensorType, Value, Weight, WeightRef, rewrite
from gammac.passes.fold_norms import mentions_of
from gammac.passes.hadamard import randomized
from gammac.pipeline import Context, Invariant

ROTATION: Final = "rotation"
BACK: Final = "rotation-back"
HINT: Final = "compile without --rotate"


@dataclass(frozen=True)
class Rotate:
    """`stream`: R1; `heads`: R2. The signs depend on the seed."""

    name: ClassVar[str] = "rotate"
    reads: ClassVar[tuple[str, ...]] = ("seed",)
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    stream: bool = True
    heads: bool = True

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError for a model whose residual stream can't be turned, naming the place."""
        if set(module.functions) != {"forward"}:
            raise CompileError(
                "rotate works on the captured function alone", hint="run it before insert_kv_cache"
            )
        if self.stream:
            module = _RotatedStream(module, ctx).module()
        if self.heads:
            module = _with_rotated_heads(module, ctx)
        return module


Turn = Callable[[Tensor], Tensor]


def _turned(weight: Weight, turn: Turn, ctx: Context) -> Weight:
    """The weight with other bytes, worked out in f64; a vector is taken for a column."""
    tensor = turn(ctx.store.tensor(weight.digest).double()).float()
    return Weight(weight.name, weight.type, ctx.store.put({"data": tensor}), weight.attrs)


# ---- R1 -----------------------------------------------------------------------------------------


@dataclass
class _RotatedStream:
    module_: Module
    ctx: Context
    stream: dict[Value, None] = field(default_factory=dict)  # in an order, so that errors repeat
    changed: dict[str, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.function = self.module_.functions["forward"]
        self.producers, self.users = self.function.producers(), self.function.users()
        self.mentions = mentions_of(self.module_)
        width = self.module_.attrs.get("hidden_size")
        if not isinstance(width, int):
            raise CompileError("the module does not say its hidden size", hint=HINT)
        self.width, self.r = width, randomized(width, self.ctx.seed)

    def module(self) -> Module:
        """The module on a turned stream."""
        norms = [op for op in self.function.ops if op.name == "rms_norm" and self._is_of_stream(op)]
        if not norms:
            raise CompileError(
                "no RMS norm reads the residual stream: only such a model can be rotated", hint=HINT
            )
        for norm in norms:
            self._collect(norm.operands[0], norm)
        for value in self.stream:
            self._check_readers(value)
            if self.producers[value].name == "linear":
                self._write(self.producers[value])
        turned = {norm for norm in norms if self._absorb(norm)}
        rotation, back = self._matrix(ROTATION, self.r.T), self._matrix(BACK, self.r)
        entrances = [self.producers[v] for v in self.stream if self.producers[v].name == "embedding"]
        outside = {op.result for op in entrances if not self._absorbed_by_table(op)}

        def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
            if op.name == "rms_norm" and op in norms and op not in turned:
                plain = b.emit("linear", operands[0], back.ref, loc=op.loc)
                return b.emit_all(op.name, plain, *operands[1:], loc=op.loc, **op.attrs)
            if op.results and op.results[0] in outside:
                (value,) = b.emit_all(op.name, *operands, loc=op.loc, **op.attrs)
                return b.emit_all("linear", value, rotation.ref, loc=op.loc)
            return None

        function = rewrite(self.function, rule)
        weights = (*self.changed.values(), rotation, back)
        return self.module_.with_weights(*weights).with_functions(function).without_unused_weights()

    def _is_of_stream(self, norm: Op) -> bool:
        """Norms of heads have another width, and stand between linears."""
        return norm.result.type.shape[-1] == self.width and not self._norms_a_branch(norm)

    def _norms_a_branch(self, norm: Op) -> bool:
        source = norm.operands[0]
        producer = self.producers.get(source) if isinstance(source, Value) else None
        return producer is not None and producer.name not in ("residual_add", "embedding", "scale")

    def _collect(self, value: Operand, reader: Op) -> None:
        """Everything that is added up to a value of the stream."""
        producer = self.producers.get(value) if isinstance(value, Value) else None
        if producer is None or producer.name not in ("residual_add", "embedding", "scale", "linear"):
            what = f"what {producer.name} puts out" if producer else "an input"
            raise CompileError(
                f"{what} is added to the residual stream, which can't be rotated so",
                loc=producer.loc if producer else reader.loc, hint=HINT,
            )  # fmt: skip
        assert isinstance(value, Value)
        if value in self.stream:
            return
        self.stream[value] = None
        if producer.name in ("residual_add", "scale"):
            for operand in producer.operands:
                self._collect(operand, producer)

    def _check_readers(self, value: Value) -> None:
        for user in self.users.get(value, []):
            known = user.name == "residual_add" or (user.name == "scale" and user.result in self.stream)
            if not known and not (user.name == "rms_norm" and self._is_of_stream(user)):
                raise CompileError(
                    f"{user.name} reads the residual stream, which can't be rotated so",
                    loc=user.loc,
                    hint=HINT,
                )
        if value in self.function.returns:
            raise CompileError("the residual stream is an output of the model", hint=HINT)

    def _write(self, op: Op) -> None:
        """Rows of a linear that writes to the stream: x Wᵀ R = x (Rᵀ W)ᵀ."""
        for operand in op.operands[1:]:
            self._change(operand, op, lambda w: self.r.T @ w)

    def _absorb(self, norm: Op) -> bool:
        """Turn the columns of all that reads a norm; False where the norm or a reader has to stay."""
        gain, readers = norm.weight(), self.users.get(norm.result, [])
        refs = [op.weight() if op.name == "linear" else None for op in readers]
        plain = gain is not None and bool((self._tensor(gain) == 1).all())
        if not plain or any(ref is None or len(self.mentions[ref.name]) > 1 for ref in refs):
            return False
        for op in readers:
            self._change(op.operands[1], op, lambda w: w @ self.r)
        return True

    def _absorbed_by_table(self, op: Op) -> bool:
        ref = op.weight()
        if ref is None or len(self.mentions[ref.name]) > 1:
            return False
        self._change(ref, op, lambda w: w @ self.r)
        return True

    def _tensor(self, ref: WeightRef) -> Tensor:
        weight = self.changed.get(ref.name) or self.module_.weights[ref.name]
        return self.ctx.store.tensor(weight.digest)

    def _change(self, operand: Operand, op: Op, turn: Turn) -> None:
        if not isinstance(operand, WeightRef) or len(self.mentions[operand.name]) > 1:
            raise CompileError("a weight at the residual stream is shared or computed", loc=op.loc, hint=HINT)
        weight = self.changed.get(operand.name) or self.module_.weights[operand.name]
        self.changed[operand.name] = _turned(weight, turn, self.ctx)

    def _matrix(self, name: str, tensor: Tensor) -> Weight:
        digest = self.ctx.store.put({"data": tensor.float()})
        return Weight(name, TensorType("f32", (self.width, self.width)), digest)


# ---- R2 -----------------------------------------------------------------------------------------


def _with_rotated_heads(module: Module, ctx: Context) -> Module:
    """Each layer's values and what reads them, where both are linears of their own."""
    function, changed = module.functions["forward"], dict[str, Weight]()
    mentions = mentions_of(module)
    for index, op in enumerate(o for o in function.ops if o.name == "attention"):
        pair = _values_and_output(function, op)
        if pair is None or any(len(mentions[ref.name]) > 1 for linear in pair for ref in _refs(linear)):
            continue
        values, output = pair
        size = op.result.type.shape[-1]
        assert isinstance(size, int)
        r = randomized(size, ctx.seed + 1 + index)
        for ref in _refs(values):
            changed[ref.name] = _turned(module.weights[ref.name], partial(_each_head, r), ctx)
        reading = output.weight()
        assert reading is not None
        weight = changed.get(reading.name) or module.weights[reading.name]
        changed[reading.name] = _turned(weight, lambda w, r=r: _each_head(r, w.T).T, ctx)  # type: ignore[misc]
    return module.with_weights(*changed.values())


def _refs(linear: Op) -> list[WeightRef]:
    return [o for o in linear.operands[1:] if isinstance(o, WeightRef)]


def _each_head(r: Tensor, rows: Tensor) -> Tensor:
    """Rᵀ on the rows of each head; rows [heads · size] or [heads · size, columns]."""
    heads = rows.reshape(-1, len(r), rows[0].numel())
    return (r.T @ heads).reshape(rows.shape)


def _values_and_output(function: Function, attention: Op) -> tuple[Op, Op] | None:
    """The linear that makes the values, and the one that reads what attention makes of them."""
    producers, users = function.producers(), function.users()
    value: Operand | None = attention.operands[2]
    for name in ("transpose", "reshape"):
        op = producers.get(value) if isinstance(value, Value) else None
        if op is None or op.name != name or len(users[op.result]) != 1:
            return None
        value = op.operands[0]
    values = producers.get(value) if isinstance(value, Value) else None
    out = attention.result
    for name in ("transpose", "reshape"):
        readers = users.get(out, [])
        if len(readers) != 1 or readers[0].name != name:
            return None
        out = readers[0].result
    readers = users.get(out, [])
    if values is None or values.name != "linear" or len(users[values.result]) != 1:
        return None
    if len(readers) != 1 or readers[0].name != "linear":
        return None
    return values, readers[0]
