"""What a module costs on a target: bits, bytes, seconds. Pure; the allocator and every report ask here.

Seconds of a linear: a measured row if the target has one, else the call's overhead plus the slowest of
reading its bytes, decoding its weights (which below 4 bits takes longer than reading them) and multiplying.
Rates are those of analysed rows where there are any, else of the kernel's row.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gammac.diagnostics import CompileError
from gammac.formats import DualBinaryFormat, Format, IntegerFormat, parse_format
from gammac.ir import Function, Module, Op, TensorType, Value, Weight, WeightRef
from gammac.ir.types import BYTES, evaluate
from gammac.targets.padding import OnWarps, Packed, any_bits_bytes, ceil_div, packed_bytes, warp_bytes
from gammac.targets.target import BLOCK, TABLE, Kernel, Target

CONTEXT: Final = 512  # positions in the cache while decoding, and tokens of a prefill
FLOAT_BYTES: Final = 4  # artifacts keep what is not quantized in f32
ANY_BITS: Final = "MatMulAnyBits"
PACKED: Final = "PackedLinear"
WARP: Final = "WarpLinear"

Formats = Mapping[str, str]
Sizes = dict[str, int]


@dataclass(frozen=True)
class WeightCost:
    """One weight in its format ("" = floats). Seconds are a decoded token's."""

    name: str
    role: str
    format: str
    numel: int
    payload_bits: int
    storage_bits: int
    bytes: int
    decode_seconds: float


@dataclass(frozen=True)
class Cost:
    """A whole module. The three bits are means a weight; see `weight_costs` for the parts."""

    payload_bits: float  # over the block linears, codes alone
    true_bits: float  # over the block linears, scales, zero points and whatever serves them included
    whole_model_bits: float  # of the artifact, over all parameters
    bytes: int
    decode_seconds: float  # one token behind CONTEXT others
    prefill_seconds: float  # CONTEXT tokens
    peak_bytes: int  # while running that prefill


# ---- bytes --------------------------------------------------------------------------------------


def float_bytes(type_: TensorType) -> int:
    """Bytes of a tensor that stays float. Its integers keep their type."""
    wide = FLOAT_BYTES if type_.dtype in ("f32", "f16", "bf16") else BYTES[type_.dtype]
    return type_.numel() * wide


def stored_bytes(rows: int, columns: int, format_: Format, target: Target, role: str = BLOCK) -> int:
    """Bytes that the emitter writes for a weight [rows, columns], padding included.

    Raises CompileError for a format that the target does not run.
    """
    kernel = kernel_of(format_, columns, target, role)
    fitted = format_.fit(columns)
    if isinstance(fitted, DualBinaryFormat) and kernel.op == ANY_BITS:
        return 2 * any_bits_bytes(rows, columns, fitted.plane, fitted.groups(columns), kernel.scale_bytes)
    if kernel.op == PACKED and isinstance(fitted, Packed):
        return packed_bytes(rows, columns, fitted, kernel.scale_bytes)
    if kernel.op == WARP and isinstance(fitted, OnWarps):
        return warp_bytes(rows, columns, fitted, kernel.scale_bytes)
    if not isinstance(fitted, IntegerFormat):
        return ceil_div(fitted.storage_bits(rows, columns), 8)
    groups = fitted.groups(columns)
    if kernel.op == ANY_BITS:
        return any_bits_bytes(rows, columns, fitted, groups, kernel.scale_bytes)
    codes = rows * groups * ceil_div(fitted.inputs_per_scale(columns) * fitted.bits, 8)
    zeros = 0 if fitted.symmetric else rows * ceil_div(groups * fitted.bits, 8)
    return codes + rows * groups * kernel.scale_bytes + zeros


def kernel_of(format_: Format, columns: int, target: Target, role: str = BLOCK) -> Kernel:
    """The kernel row that runs a format. Raises CompileError if there is none."""
    kernel = target.kernel_for(format_, role, columns)
    if kernel is None:
        raise CompileError(
            f"{target.name} does not run {format_.name} on {role} weights with {columns} inputs",
            hint="gammac targets lists what it runs",
        )
    return kernel


# ---- seconds ------------------------------------------------------------------------------------


def linear_seconds(
    rows: int, columns: int, format_: Format | None, target: Target, tokens: int = 1, role: str = BLOCK
) -> float:
    """Seconds of x @ weight.T for `tokens` rows of x, on the target's threads; None is f32."""
    measured = _measured(rows, columns, format_, target, tokens)
    if measured is not None:
        return measured
    flops = 2 * tokens * rows * columns
    if format_ is None:
        work = flops / (target.float_gflops * target.threads * 1e9) if tokens > 1 else 0.0
        return overhead("linear", target) + max(FLOAT_BYTES * rows * columns / target.bandwidth, work)
    _, gflops = target.rates(format_.fit(columns), kernel_of(format_, columns, target, role))
    work = flops / (gflops * target.threads * 1e9) if tokens > 1 else 0.0
    return overhead("linear", target) + max(*weight_seconds(rows, columns, format_, target, role), work)


def weight_seconds(
    rows: int, columns: int, format_: Format, target: Target, role: str = BLOCK
) -> tuple[float, float]:
    """Seconds that reading a weight takes, and unpacking it: the longer one counts."""
    fitted, kernel = format_.fit(columns), kernel_of(format_, columns, target, role)
    gweights, _ = target.rates(fitted, kernel)
    reading = stored_bytes(rows, columns, fitted, target, role) / target.bandwidth
    return reading, rows * columns / (gweights * target.threads * 1e9)


def overhead(op: str, target: Target) -> float:
    """Seconds that a call costs whatever its size."""
    return target.overhead_us.get(op, target.overhead_us["default"]) * 1e-6


def _measured(rows: int, columns: int, format_: Format | None, target: Target, tokens: int) -> float | None:
    """What was timed in the format on the target's threads: the shape itself, or between those around it.

    Beyond the largest shape seconds grow with the weights, below the smallest one they shrink to a call's
    overhead. A prefill's seconds grow with its tokens.
    """
    name = format_.fit(columns).name if format_ else "f32"
    mine = [m for m in target.measured if (m.op, m.format, m.threads) == ("linear", name, target.threads)]
    timed = [m for m in mine if (m.tokens > 1) == (tokens > 1)]
    exact = [m.seconds for m in timed if (m.rows, m.columns, m.tokens) == (rows, columns, tokens)]
    if exact or not timed:
        return exact[0] if exact else None
    points = sorted((m.rows * m.columns, m.seconds * tokens / m.tokens) for m in timed)
    sizes, seconds = zip((0, overhead("linear", target)), *points, strict=True)
    if rows * columns > sizes[-1]:
        return float(seconds[-1] * rows * columns / sizes[-1])
    return float(np.interp(rows * columns, sizes, seconds))


def sizes_of(seq: int, past: int) -> Sizes:
    """What symbolic dimensions stand for; a name that nobody knows is one."""
    sizes: Sizes = defaultdict(lambda: 1)
    sizes.update(batch=1, seq=seq, past=past)
    return sizes


def op_seconds(op: Op, module: Module, target: Target, sizes: Sizes, formats: Formats | None = None) -> float:
    """Seconds of one op of a module on the target's threads."""
    ref = op.weight()
    if op.name == "linear" and ref is not None:
        weight = module.weights[ref.name]
        role = str(weight.attrs.get("role", BLOCK))
        tokens = numel_at(op.operands[0].type, sizes) // _columns(weight)
        tokens = 1 if target.last_logits and role == TABLE else tokens
        return linear_seconds(
            _rows(weight), _columns(weight), format_of(weight, formats), target, tokens, role
        )
    if op.name in ("attention", "gqa"):
        return overhead(op.name, target) + _attention_seconds(op, target, sizes)
    call = overhead(op.name, target)
    if op.name == "matmul":
        call += _multiplying(op, sizes) / (target.float_gflops * target.threads * 1e9)
    # an op that is folded into another moves nothing either; an embedding reads a row a token
    moved = op.results if op.name == "embedding" else (*op.operands, *op.results) if call else ()
    return call + sum(_bytes(v.type, sizes) for v in moved) / target.bandwidth


def _attention_seconds(op: Op, target: Target, sizes: Sizes) -> float:
    cache, macs = attention_work(op, sizes)
    reading = FLOAT_BYTES * cache / (target.attention_gbps * target.threads * 1e9)
    return max(reading, 2 * macs / (target.attention_gflops * target.threads * 1e9))


def attention_work(op: Op, sizes: Sizes) -> tuple[int, int]:
    """Elements of keys and values that attention reads, and its multiply-adds."""
    keys, values = op.results[1:] if op.name == "gqa" else op.operands[1:3]
    cache = numel_at(keys.type, sizes) + numel_at(values.type, sizes)
    # each query element meets every key and as many values
    return cache, 2 * numel_at(op.results[0].type, sizes) * evaluate(keys.type.shape[2], sizes)


def _multiplying(op: Op, sizes: Sizes) -> int:
    """Operations of a matmul."""
    return 2 * numel_at(op.result.type, sizes) * evaluate(op.operands[0].type.shape[-1], sizes)


def numel_at(type_: TensorType, sizes: Sizes) -> int:
    """How many elements a tensor of these sizes has."""
    total = 1
    for dim in type_.shape:
        total *= evaluate(dim, sizes)
    return total


# ---- modules ------------------------------------------------------------------------------------


def format_of(weight: Weight, formats: Formats | None = None) -> Format | None:
    """The format that a weight has or is to get; None for floats."""
    name = (formats or {}).get(weight.name) or weight.attrs.get("format") or weight.attrs.get("stored")
    return parse_format(name).fit(_columns(weight)) if isinstance(name, str) else None


def decode_function(module: Module, past: int = CONTEXT) -> tuple[Function, Sizes] | None:
    """What runs for each new token, and its sizes; `forward` stands in before there is a cache."""
    return _function(module, ("decode", "forward"), sizes_of(1, past))


def prefill_function(module: Module, tokens: int = CONTEXT) -> tuple[Function, Sizes] | None:
    """What runs for a prompt, and its sizes."""
    return _function(module, ("prefill", "forward", "decode"), sizes_of(tokens, 0))


def _function(module: Module, names: Sequence[str], sizes: Sizes) -> tuple[Function, Sizes] | None:
    found = next((module.functions[n] for n in names if n in module.functions), None)
    return (found, sizes) if found is not None else None


def readers(module: Module) -> dict[str, list[Op]]:
    """Weight name → the ops of a decoding step that read it."""
    found: dict[str, list[Op]] = defaultdict(list)
    chosen = decode_function(module)
    for op in chosen[0].ops if chosen else ():
        for name in dict.fromkeys(o.name for o in op.operands if isinstance(o, WeightRef)):
            found[name].append(op)
    return found


def weight_costs(module: Module, target: Target, formats: Formats | None = None) -> tuple[WeightCost, ...]:
    """One row a weight, in the order of the module. `formats` overrides what the weights say."""
    users = readers(module)
    return tuple(weight_cost(w, users[w.name], module, target, formats) for w in module.weights.values())


def weight_cost(
    weight: Weight, users: Sequence[Op], module: Module, target: Target, formats: Formats | None = None
) -> WeightCost:
    """The row of one weight; `users` are the ops of a decoding step that read it."""
    sizes = sizes_of(1, CONTEXT)
    format_, role = format_of(weight, formats), str(weight.attrs.get("role", ""))
    seconds = sum(op_seconds(op, module, target, sizes, formats) for op in users if op.name == "linear")
    numel = weight.type.numel()
    if format_ is None:
        bytes_ = float_bytes(weight.type)
        return WeightCost(weight.name, role, "", numel, 8 * bytes_, 8 * bytes_, bytes_, seconds)
    rows, columns = _rows(weight), _columns(weight)
    return WeightCost(
        weight.name, role, format_.name, numel, format_.payload_bits(rows, columns),
        format_.storage_bits(rows, columns),
        stored_bytes(rows, columns, format_, target, role or BLOCK), seconds,
    )  # fmt: skip


def module_cost(module: Module, target: Target, formats: Formats | None = None, extra_bytes: int = 0) -> Cost:
    """The cost of a module; `extra_bytes` are those of the graph, tokenizer and manifest."""
    rows = weight_costs(module, target, formats)
    blocks = [r for r in rows if r.role == BLOCK]
    over = max(1, sum(r.numel for r in blocks))
    total = sum(r.bytes for r in rows) + extra_bytes
    return Cost(
        payload_bits=sum(r.payload_bits for r in blocks) / over,
        true_bits=(sum(r.storage_bits for r in blocks) + serving_bits(module)) / over,
        whole_model_bits=8 * total / max(1, sum(r.numel for r in rows)),
        bytes=total,
        decode_seconds=seconds(module, decode_function(module), target, formats),
        prefill_seconds=seconds(module, prefill_function(module), target, formats),
        peak_bytes=peak_bytes(module, target, formats) + extra_bytes,
    )


def serving_bits(module: Module) -> int:
    """What floats that exist for the blocks' linears alone take: factors of incoherence, scales of inputs."""
    serving = (w for w in module.weights.values() if w.attrs.get("serves") == BLOCK)
    return sum(8 * float_bytes(w.type) for w in serving)


def prefill_seconds(weight: Weight, module: Module, target: Target, formats: Formats, tokens: int) -> float:
    """A weight's products in a prefill of so many tokens."""
    function, sizes = prefill_function(module, tokens) or (None, {})
    ops = [op for op in (function.ops if function else ()) if op.name == "linear"]
    mine = (op for op in ops if (ref := op.weight()) is not None and ref.name == weight.name)
    return sum(op_seconds(op, module, target, sizes, formats) for op in mine)


def seconds(
    module: Module, chosen: tuple[Function, Sizes] | None, target: Target, formats: Formats | None = None
) -> float:
    """Seconds of what `decode_function` or `prefill_function` found, on the target's threads."""
    return sum(op_seconds(op, module, target, chosen[1], formats) for op in chosen[0].ops) if chosen else 0.0


def peak_bytes(module: Module, target: Target, formats: Formats | None = None, tokens: int = CONTEXT) -> int:
    """Weights as the runtime holds them, the most that a prefill has alive, and the runtime itself."""
    held = sum(resident_bytes(w, target, formats) for w in module.weights.values())
    return held + alive_bytes(module, target, tokens) + target.runtime_bytes


def resident_bytes(weight: Weight, target: Target, formats: Formats | None = None) -> int:
    """What a weight takes in memory: runtimes repack."""
    format_, role = format_of(weight, formats), str(weight.attrs.get("role", BLOCK))
    if format_ is None:
        return float_bytes(weight.type)
    kernel = kernel_of(format_, _columns(weight), target, role)
    return int(kernel.resident * stored_bytes(_rows(weight), _columns(weight), format_, target, role))


def alive_bytes(module: Module, target: Target, tokens: int) -> int:
    """The most bytes of values alive at once in a prefill, its cache included."""
    chosen = prefill_function(module, tokens)
    if chosen is None:
        return 0
    function, sizes = chosen
    logits = function.returns[0].type

    def size_of(value: Value) -> int:
        whole = _bytes(value.type, sizes)
        return whole // tokens if target.last_logits and value.type == logits else whole

    last = {o: i for i, op in enumerate(function.ops) for o in op.operands}
    alive = widest = sum(map(size_of, function.params))
    ends: dict[int, int] = defaultdict(int)
    for index, op in enumerate(function.ops):
        for value in op.results:
            alive += size_of(value)
            if value not in function.returns:
                ends[last.get(value, index)] += size_of(value)
        widest = max(widest, alive)
        alive -= ends[index]
    return widest


def _bytes(type_: TensorType, sizes: Sizes) -> int:
    return BYTES[type_.dtype] * numel_at(type_, sizes)


def _rows(weight: Weight) -> int:
    rows = weight.type.shape[0]
    assert isinstance(rows, int)
    return rows


def _columns(weight: Weight) -> int:
    columns = weight.type.shape[-1]
    assert isinstance(columns, int)
    return columns
