"""Write the function that the TVM artifact runs in the shapes that its kernels have.

    %1 = transpose %0 {perm = [0, 2, 1, 3]}                        as in legalize_onnx
    %2 = rope %1, %cos, %sin
    %3 = kv_append %past_key.0, %k
    %4 = attention %2, %3, %v {scale = 0.125, causal = true}
->
    %6, %7, %8 = gqa %past_key.0, %past_value.0, %qkv, @inv_freq {heads = 9, kv_heads = 3, …}

Attention is raised whatever the size of its heads, for the kernels are made for it; slices stay, for they
cost nothing. q, k and v are fused where all are stored alike, and share a kernel where they are not; gate
and up stay apart, for one kernel does both and what joins them. Of a decoder only `decode` is kept: from it
the emitter writes a function for one token and others for many.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from gammac.ir import Module
from gammac.passes.fuse_parallel_linears import FuseParallelLinears
from gammac.passes.legalize_onnx import Sizes, cancel_layouts, pack_rows, raise_attention, within_context
from gammac.pipeline import Context, Invariant

# kernels turn pairs of features, whatever their number
ANY_SIZE = Sizes(head=1, rotary_head=1, rotary=2)
MOST_CONTEXT = 2048


@dataclass(frozen=True)
class LegalizeTvm:
    """Raise attention with its cache to `gqa`. `context` is the number of tokens that the cache is made for
    (0: all that the model was trained on, at most 2048)."""

    name: ClassVar[str] = "legalize_tvm"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    context: int = 0

    def run(self, module: Module, ctx: Context) -> Module:
        """The module with one function, `decode` or, for an encoder, `forward`."""
        most = min(int(str(module.attrs.get("max_positions", MOST_CONTEXT))), MOST_CONTEXT)
        module = within_context(module, self.context or most)
        return raised(FuseParallelLinears(gates=False, partly=False).run(_emitted(module), ctx))


def _emitted(module: Module) -> Module:
    name = "decode" if "decode" in module.functions else "forward"
    return replace(module, functions={name: module.functions[name]})


def raised(module: Module) -> Module:
    """The module in the kernels' shapes, its linears as they are. Touches no weight's bytes."""
    module = _emitted(module)
    (function,) = module.functions.values()
    function = pack_rows(cancel_layouts(raise_attention(function, ANY_SIZE)))
    return module.with_functions(function).without_unused_weights()
