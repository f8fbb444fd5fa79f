"""A small Llama written by hand in the IR, for tests that need a module but no frontend."""

import torch
from torch import Tensor

from gammac.ir import Builder, Function, Module, Sym, TensorType, Value, Weight, WeightRef
from gammac.weights import WeightStore

HIDDEN, FFN, HEADS, KV_HEADS, DIM, VOCAB = 64, 128, 4, 2, 16, 96


class Weights:
    """Random weights by name, registered as they are asked for."""

    def __init__(self, store: WeightStore, seed: int) -> None:
        self.store = store
        self.generator = torch.Generator().manual_seed(seed)
        self.found: dict[str, Weight] = {}

    def __call__(self, name: str, *shape: int, role: str = "", value: Tensor | None = None) -> WeightRef:
        if name not in self.found:
            data = (
                torch.randn(*shape, generator=self.generator) / shape[-1] ** 0.5 if value is None else value
            )
            attrs = {"role": role} if role else {}
            type_ = TensorType("f32", tuple(data.shape))
            self.found[name] = Weight(name, type_, self.store.put({"data": data}), attrs)
        return self.found[name].ref


def llama(store: WeightStore, blocks: int = 2, seed: int = 0) -> Module:
    """`@forward(%input_ids, %position_ids) -> logits` with tied embedding and head."""
    w = Weights(store, seed)
    batch, seq = Sym.named("batch"), Sym.named("seq")
    ids, positions = (Value(TensorType("i64", (batch, seq)), n) for n in ("input_ids", "position_ids"))
    b = Builder()
    inv_freq = w("inv_freq", value=10000.0 ** (-torch.arange(0, DIM, 2).float() / DIM))
    cos, sin = b.emit_all("rotary_table", positions, inv_freq)
    table = w("embed.weight", VOCAB, HIDDEN, role="table")
    x = b.emit("embedding", ids, table, loc="embed")
    for i in range(blocks):
        x = _block(b, w, x, cos, sin, f"layers.{i}")
    x = b.emit("rms_norm", x, w("norm.weight", value=torch.ones(HIDDEN)), loc="norm", eps=1e-5)
    logits = b.emit("linear", x, table, loc="head")
    function = Function("forward", (ids, positions), tuple(b.ops), (logits,), ("logits",))
    sizes = {"layers": blocks, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "hidden_size": HIDDEN}
    attrs = {"kind": "decoder", "max_positions": 256, "vocab_size": VOCAB, "eos": (2,), "bos": 1, **sizes}
    return Module("m", {"forward": function}, w.found, attrs)


def _block(b: Builder, w: Weights, x: Value, cos: Value, sin: Value, loc: str) -> Value:
    batch, seq = x.type.shape[:2]

    def linear(value: Value, name: str, out: int, columns: int) -> Value:
        return b.emit(
            "linear", value, w(f"{loc}.{name}.weight", out, columns, role="block"), loc=f"{loc}.{name}"
        )

    def heads(value: Value, name: str, n: int) -> Value:
        y = linear(value, name, n * DIM, HIDDEN)
        y = b.emit("reshape", y, loc=loc, shape=(batch, seq, n, DIM))
        return b.emit("transpose", y, loc=loc, perm=(0, 2, 1, 3))

    h = b.emit("rms_norm", x, w(f"{loc}.norm1.weight", value=torch.ones(HIDDEN)), loc=loc, eps=1e-5)
    q = b.emit("rope", heads(h, "q", HEADS), cos, sin, loc=loc)
    k = b.emit("rope", heads(h, "k", KV_HEADS), cos, sin, loc=loc)
    v = heads(h, "v", KV_HEADS)
    a = b.emit("attention", q, k, v, loc=loc, scale=DIM**-0.5, causal=True)
    a = b.emit("transpose", a, loc=loc, perm=(0, 2, 1, 3))
    a = b.emit("reshape", a, loc=loc, shape=(batch, seq, HIDDEN))
    x = b.emit("residual_add", x, linear(a, "o", HIDDEN, HIDDEN), loc=loc)
    h = b.emit("rms_norm", x, w(f"{loc}.norm2.weight", value=torch.ones(HIDDEN)), loc=loc, eps=1e-5)
    gate = b.emit("silu", linear(h, "gate", FFN, HIDDEN), loc=loc)
    up = linear(h, "up", FFN, HIDDEN)
    return b.emit("residual_add", x, linear(b.emit("mul", gate, up, loc=loc), "down", HIDDEN, FFN), loc=loc)
