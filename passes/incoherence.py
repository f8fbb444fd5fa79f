"""Turn the inputs and outputs of each block's linears by random orthogonal matrices: no weight stands out.

    %1 = linear %0, @up : f32[batch,seq,128]                        %0 : f32[batch,seq,64]
->
    %1 = reshape %0 {shape = [batch, seq, 8, 8]}
    %2 = matmul %1, @incoherence.in.64.right
    %3 = matmul @incoherence.in.64.left, %2
    %4 = reshape %3 {shape = [batch, seq, 64]}                      %4 = %0 V
    %5 = linear %4, @up                                             @up holds Uᵀ W V
    …                                                               and %5 Uᵀ is made likewise

V and U are Kronecker products of two small factors, one pair of factors for each width in the whole module:
they are random, and so as good for one weight as for another. Linears that read the same value share what
turns it. Gram matrices are turned with their inputs, Vᵀ G V: the pass stands behind collect_grams, so that
one calibration serves every kind and seed, and because the diagonal rescale asks for the diagonal of G.
`rescale` multiplies W by D = (diag G / diag WᵀW)^¼ first, and the input by its inverse (QuIP, arXiv
2307.13304, algorithm 1). Behind a norm that is folded into its gain, with random signs for every input; else
it is a vector of its own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.ir import Builder, Function, Module, Op, Operand, TensorType, Value, Weight, WeightRef, rewrite
from gammac.passes.fold_norms import mentions_of
from gammac.passes.kronecker import KINDS, Kronecker, random_kronecker, random_signs
from gammac.pipeline import Context, Invariant

NORMS: Final = ("rms_norm", "layer_norm")
SMALLEST: Final = 1e-8  # of the mean of a diagonal: an input that hardly fires is not scaled without end


@dataclass(frozen=True)
class Incoherence:
    """`kind`: kronecker (QuIP's) or hadamard (QuIP#'s). The matrices depend on the seed."""

    name: ClassVar[str] = "incoherence"
    reads: ClassVar[tuple[str, ...]] = ("seed",)
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    kind: str = "kronecker"
    rescale: bool = False

    def __post_init__(self) -> None:
        """Raises CompileError for an unknown kind."""
        if self.kind not in KINDS:
            raise CompileError(f"incoherence: kind={self.kind}", hint=f"kind is {' or '.join(KINDS)}")

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError for widths without factors, and for weights that are quantized or turned."""
        return _Turned(self, module, ctx).result()


@dataclass(frozen=True)
class _Factors:
    """A Kronecker product as the graph multiplies by it: left · X · right."""

    matrix: Kronecker
    left: Weight
    right: Weight

    def emit(self, b: Builder, x: Value, loc: str) -> Value:
        """x [..., n] times the matrix."""
        shape, sizes = x.type.shape, (self.left.type.shape[0], self.right.type.shape[0])
        y = b.emit("reshape", x, loc=loc, shape=(*shape[:-1], *sizes))
        y = b.emit("matmul", y, self.right.ref, loc=loc)
        y = b.emit("matmul", self.left.ref, y, loc=loc) if sizes[0] != 1 else y
        return b.emit("reshape", y, loc=loc, shape=shape)


# names of weights that read the same value
Group = tuple[str, ...]


@dataclass
class _Turned:
    options: Incoherence
    module: Module
    ctx: Context
    factors: dict[str, _Factors] = field(default_factory=dict)
    changed: dict[str, Weight] = field(default_factory=dict)
    vectors: dict[Group, Weight] = field(default_factory=dict)  # what an input is multiplied by first

    def __post_init__(self) -> None:
        self.mentions = mentions_of(self.module)

    def result(self) -> Module:
        """The module with other weights and functions."""
        groups = self._groups()
        for group, op in groups.items():
            self._turn(group, op)
        self.owner = {name: group for group in groups for name in group}
        functions = [rewrite(f, _Rule(self)) for f in self.module.functions.values()]
        made = [w for f in self.factors.values() for w in (f.left, f.right)]
        weights = (*self.changed.values(), *made, *self.vectors.values())
        return self.module.with_weights(*weights).with_functions(*functions).without_unused_weights()

    # ---- what is turned ---------------------------------------------------------------------------

    def _groups(self) -> dict[Group, Op]:
        """Weights by the value that they read, each with the first of its linears."""
        found = [
            {tuple(ref.name for op in ops if (ref := op.weight())): ops[0] for ops in readers.values()}
            for readers in (self._linears(f) for f in self.module.functions.values())
        ]
        if any(groups.keys() != found[0].keys() for groups in found):
            raise CompileError(
                "functions read the same weights in different ways", hint="run incoherence first"
            )
        return found[0] if found else {}

    def _linears(self, function: Function) -> dict[Value, list[Op]]:
        readers: dict[Value, list[Op]] = {}
        for op in function.ops:
            ref, source = op.weight(), op.operands[0] if op.operands else None
            if op.name == "linear" and ref is not None and isinstance(source, Value) and self._is_turned(ref):
                readers.setdefault(source, []).append(op)
        return readers

    def _is_turned(self, ref: WeightRef) -> bool:
        """A block's weight that one linear of a function reads, and nothing else."""
        weight = self.module.weights[ref.name]
        if weight.attrs.get("role") != "block" or not self._is_alone(ref):
            return False
        for attr, what in (("stored", "quantized"), ("candidates", "quantized"), ("incoherence", "turned")):
            if attr in weight.attrs:
                raise CompileError(
                    f"is {what} already", loc=ref.name, hint="run incoherence before candidates"
                )
        return all(op.name == "linear" and op.operands[1] == ref for _, op in self.mentions[ref.name])

    def _is_alone(self, ref: WeightRef) -> bool:
        counts = Counter(function.name for function, _ in self.mentions[ref.name])
        return max(counts.values()) == 1

    # ---- weights ----------------------------------------------------------------------------------

    def _turn(self, group: Group, op: Op) -> None:
        weights = [self.module.weights[name] for name in group]
        scales = self._rescale(weights)
        columns = weights[0].type.shape[1]
        assert isinstance(columns, int)
        norms = self._norms_of(group)
        if norms:
            signs = random_signs(columns, f"{self.ctx.seed}.signs.{columns}")
            scales = signs if scales is None else signs * scales
        if scales is not None:
            scales = scales.float().double()
            self._multiply_input(group, norms, scales)
        else:
            scales = torch.ones(columns, dtype=torch.float64)
        turn = self._factors("in", columns, op.loc).matrix
        grams = {str(w.attrs["gram"]) for w in weights if "gram" in w.attrs}
        turned = {digest: self._turned_gram(digest, turn, scales) for digest in sorted(grams)}
        for weight in weights:
            values = turn(self.ctx.store.tensor(weight.digest).double() / scales)
            values = self._back(weight, op.loc).inverse(values.T).T
            attrs = {"gram": turned[str(weight.attrs["gram"])]} if "gram" in weight.attrs else {}
            changed = self._with_bytes(weight, values)
            self.changed[weight.name] = changed.with_attrs(**attrs, incoherence=self.options.kind)
        self._turn_biases(group)

    def _turned_gram(self, digest: str, turn: Kronecker, scales: Tensor) -> str:
        gram = scales[:, None] * self.ctx.store.tensor(digest).double() * scales
        return self.ctx.store.put({"data": turn(turn(gram).T).T.float()})

    def _back(self, weight: Weight, loc: str) -> Kronecker:
        """Uᵀ, which turns what a linear puts out back."""
        rows = weight.type.shape[0]
        assert isinstance(rows, int)
        return self._factors("out", rows, loc).matrix

    def _turn_biases(self, group: Group) -> None:
        """(z + b U) Uᵀ = z Uᵀ + b."""
        for name in group:
            for _, op in self.mentions[name]:
                ref = op.weight(2)
                if ref is not None and self._is_alone(ref) and ref.name not in self.changed:
                    weight = self.module.weights[ref.name]
                    bias = self.ctx.store.tensor(weight.digest)
                    turned = self._back(self.module.weights[name], op.loc).inverse(bias)
                    self.changed[ref.name] = self._with_bytes(weight, turned)

    def _with_bytes(self, weight: Weight, values: Tensor) -> Weight:
        return replace(weight, digest=self.ctx.store.put({"data": values.float()}))

    # ---- what an input is multiplied by -----------------------------------------------------------

    def _rescale(self, weights: Sequence[Weight]) -> Tensor | None:
        """1 / D, f64 [inputs], with a geometric mean of one."""
        if not self.options.rescale:
            return None
        gram = weights[0].attrs.get("gram")
        if gram is None:
            raise CompileError(
                "rescale needs the Gram matrix of the inputs",
                loc=weights[0].name,
                hint="run collect_grams first",
            )
        carried = _floored(self.ctx.store.tensor(str(gram)).double().diagonal())
        floats = torch.cat([self.ctx.store.tensor(w.digest).double() for w in weights])
        ratio = (_floored(floats.square().sum(0)) / carried) ** 0.25
        return ratio / ratio.log().mean().exp()

    def _norms_of(self, group: Group) -> list[Weight]:
        """Gain, and bias, of the norm that these linears alone read; none where there is no such norm."""
        found: list[Weight] = []
        for function in self.module.functions.values():
            readers = [op for op in function.ops if (ref := op.weight()) and ref.name in group]
            source = readers[0].operands[0]
            norm = function.producers().get(source) if isinstance(source, Value) else None
            if norm is None or norm.name not in NORMS or source in function.returns:
                return []
            refs = [o for o in norm.operands[1:] if isinstance(o, WeightRef)]
            if function.users()[norm.result] != readers or not all(map(self._is_alone, refs)):
                return []
            found = [self.module.weights[ref.name] for ref in refs]
        return found

    def _multiply_input(self, group: Group, norms: Sequence[Weight], scales: Tensor) -> None:
        for weight in norms:
            values = self.ctx.store.tensor(weight.digest).double()
            self.changed[weight.name] = self._with_bytes(weight, values * scales)
        if not norms:
            name = f"{group[0].removesuffix('.weight')}.rescale"
            self.vectors[group] = self._serving(name, scales)

    # ---- factors ----------------------------------------------------------------------------------

    def _factors(self, side: str, size: int, loc: str) -> _Factors:
        """V for what goes in, Uᵀ for what comes out."""
        name = f"incoherence.{side}.{size}"
        if name not in self.factors:
            found = random_kronecker(self.options.kind, size, f"{self.ctx.seed}.{name}")
            if found is None:
                raise CompileError(
                    f"{size} features have no two {self.options.kind} factors near their square root",
                    loc=loc, hint="compile without --incoherence, or with kronecker where it is hadamard",
                )  # fmt: skip
            # random is what weights are multiplied by: a Hadamard matrix before its signs would spread less
            found = found.inverse if side == "out" else found
            left = self._serving(f"{name}.left", found.left.T)
            right = self._serving(f"{name}.right", found.right)
            self.factors[name] = _Factors(found, left, right)
        return self.factors[name]

    def _serving(self, name: str, values: Tensor) -> Weight:
        """A weight that counts among the bits of the blocks' linears."""
        digest = self.ctx.store.put({"data": values.float()})
        return Weight(name, TensorType("f32", tuple(values.shape)), digest, {"serves": "block"})


@dataclass
class _Rule:
    """Of one function: linears between what turns their inputs and what turns their outputs back."""

    turned: _Turned
    inputs: dict[Group, Value] = field(default_factory=dict)

    def __call__(self, b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        ref = op.weight()
        group = self.turned.owner.get(ref.name) if ref is not None and op.name == "linear" else None
        if ref is None or group is None:
            return None
        if group not in self.inputs:
            self.inputs[group] = self._input(b, group, operands[0], op.loc)
        own = [o for o in operands[2:] if isinstance(o, WeightRef) and o.name in self.turned.changed]
        z = b.emit("linear", self.inputs[group], ref, *own, loc=op.loc, **op.attrs)
        y = self.turned.factors[f"incoherence.out.{ref.type.shape[0]}"].emit(b, z, op.loc)
        return (b.emit("add", y, operands[2], loc=op.loc) if len(operands) == 3 and not own else y,)

    def _input(self, b: Builder, group: Group, x: Operand, loc: str) -> Value:
        assert isinstance(x, Value)
        vector = self.turned.vectors.get(group)
        x = b.emit("mul", x, vector.ref, loc=loc) if vector else x
        return self.turned.factors[f"incoherence.in.{x.type.shape[-1]}"].emit(b, x, loc)


def _floored(diagonal: Tensor) -> Tensor:
    return diagonal.clamp(min=float(SMALLEST * diagonal.mean().clamp(min=1e-30)))
