"""Put low-rank adapters beside quantized linears.

    %1 = linear %0, @up : f32[batch,seq,512]                     @up stored as "w4g64"
->
    %1 = linear %0, @up : f32[batch,seq,512]
    %2 = linear %0, @up.lora_a : f32[batch,seq,8]                floats
    %3 = linear %2, @up.lora_b : f32[batch,seq,512]
    %4 = add %1, %3

The module that adapters are trained in is made by the same function, so that it is the one that is emitted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.ir import Attr, Builder, Module, Op, Operand, TensorType, Weight, rewrite
from gammac.passes.quantize import weights_are_stored_in_their_formats
from gammac.passes.training.adapters import Factors, digest_of_stored, read_adapters
from gammac.pipeline import Context, Invariant
from gammac.weights import WeightStore

FIRST: Final = "a"
SECOND: Final = "b"


@dataclass(frozen=True)
class AddAdapters:
    """`file` is an adapters.safetensors, `digest` that of its bytes. The base's digest stays with the module,
    so that its artifact takes other adapters."""

    name: ClassVar[str] = "add_adapters"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = (weights_are_stored_in_their_formats,)
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    file: str = ""
    digest: str = ""

    def run(self, module: Module, ctx: Context) -> Module:
        """Raises CompileError for a file of another base."""
        adapters = read_adapters(Path(self.file))
        if adapters.base != module.attrs.get("trained_base", digest_of_stored(module)):
            raise CompileError(
                f"{self.file} was trained on another base than {module.name}'s",
                hint="adapters fit the base that they were trained on: same model, --formats, --quantizer "
                "and calibration",
            )
        return with_adapters(module, adapters.factors, ctx.store).with_attrs(adapter_base=adapters.base)


def adapter_names(name: str) -> tuple[str, str]:
    """What a and b of a weight are called in a module."""
    stem = name.removesuffix(".weight")
    return f"{stem}.lora_a.weight", f"{stem}.lora_b.weight"


def keys_of(weight: Weight) -> tuple[str, ...]:
    """What files of adapters call a weight, or the rows that it is made of; nothing for other weights."""
    keys = weight.attrs.get("adapter", ())
    assert isinstance(keys, tuple)
    return tuple(map(str, keys))


def factor_of(weight: Weight) -> str:
    """FIRST or SECOND for a factor of adapters, or of several that are joined; else nothing."""
    keys = keys_of(weight)
    return keys[0].rpartition("/")[2] if keys else ""


def with_adapters(module: Module, factors: Mapping[str, Factors], store: WeightStore) -> Module:
    """The module with a low-rank branch at each linear of the weights named.

    Raises CompileError for factors that don't fit their weight.
    """
    made = {n: _weights(module, n, pair, store) for n, pair in factors.items()}

    def rule(b: Builder, op: Op, operands: tuple[Operand, ...]) -> Sequence[Operand] | None:
        ref = op.weight() if op.name == "linear" else None
        if ref is None or ref.name not in made:
            return None
        down, up = made[ref.name]
        wide = b.emit("linear", *operands, loc=op.loc, **op.attrs)
        low = b.emit("linear", operands[0], down.ref, loc=op.loc)
        return (b.emit("add", wide, b.emit("linear", low, up.ref, loc=op.loc), loc=op.loc),)

    functions = [rewrite(f, rule) for f in module.functions.values()]
    return module.with_weights(*(w for pair in made.values() for w in pair)).with_functions(*functions)


def _weights(module: Module, name: str, factors: Factors, store: WeightStore) -> tuple[Weight, Weight]:
    a, b = factors
    rank = a.shape[0]
    if name not in module.weights or module.weights[name].type.shape != (b.shape[0], a.shape[1]):
        raise CompileError(
            f"has no adapter of {list(b.shape)} and {list(a.shape)}", loc=name, hint="it is another model's"
        )
    if b.shape[1] != rank:
        raise CompileError(f"its factors have ranks {b.shape[1]} and {rank}", loc=name)
    first, second = adapter_names(name)
    return _serving(first, f"{name}/{FIRST}", a, store), _serving(second, f"{name}/{SECOND}", b, store)


def _serving(name: str, key: str, values: Tensor, store: WeightStore) -> Weight:
    """A float weight that counts among the bits of the blocks' linears. `adapter`: see `keys_of`."""
    digest = store.put({"data": values.detach().float().contiguous()})
    attrs: dict[str, Attr] = {"serves": "block", "adapter": (key,)}
    return Weight(name, TensorType("f32", tuple(values.shape)), digest, attrs)
