"""Hand-made modules in the shape that the front end and the quantizer leave, for the ONNX tests."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gammac.formats import IntegerFormat, NormalFloat, Quantized, parse_format
from gammac.ir import Builder, Function, Module, Operand, Sym, TensorType, Value, Weight, WeightRef
from gammac.passes.add_adapters import with_adapters
from gammac.passes.quantizers import make_quantizer
from gammac.weights import WeightStore

BATCH, SEQ, PAST = map(Sym.named, ("batch", "seq", "past"))


@dataclass(frozen=True)
class Shape:
    """A small Llama, with the switches that the families differ in."""

    vocab: int = 64
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    ffn: int = 128
    layers: int = 2
    rotary: int = 16
    window: int = 0
    softcap: float = 0.0
    bias: bool = False
    qk_norm: bool = False
    tied: bool = True


def rtn(weight: Tensor, name: str) -> Quantized:
    """Min-max rounding, or to the nearest level of a NormalFloat."""
    format_ = parse_format(name).fit(weight.shape[1])
    if isinstance(format_, NormalFloat):
        return make_quantizer("nf").quantize(weight, None, [format_])[0]
    assert isinstance(format_, IntegerFormat)
    size = format_.inputs_per_scale(weight.shape[1])
    groups = weight.reshape(weight.shape[0], -1, size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if format_.symmetric:
        high = torch.maximum(high, -low)
        scales = (2 * high / format_.levels).clamp(min=1e-6).half()
        zeros = torch.full_like(high, format_.midpoint)
    else:
        scales = ((high - low) / format_.levels).clamp(min=1e-6).half()
        zeros = (-low / scales.float()).round().clamp(0, format_.levels)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, format_.levels)
    return format_.quantized(
        codes.to(torch.uint8).reshape(weight.shape),
        scales,
        None if format_.symmetric else zeros.to(torch.uint8),
    )


class Maker:
    """Builds a decoder's `decode`, weight by weight."""

    def __init__(self, shape: Shape, store: WeightStore, seed: int = 0) -> None:
        self.shape, self.store = shape, store
        self.random = torch.Generator().manual_seed(seed)
        self.weights: dict[str, Weight] = {}
        self.b = Builder()

    def weight(self, name: str, *sizes: int, role: str = "") -> WeightRef:
        scale = sizes[-1] ** -0.5 if len(sizes) > 1 else 0.1
        data = torch.randn(*sizes, generator=self.random) * scale + (1.0 if "norm" in name else 0.0)
        attrs = {"role": role} if role else {}
        weight = Weight(name, TensorType("f32", sizes), self.store.put({"data": data}), attrs)
        self.weights[name] = weight
        return weight.ref

    def linear(self, x: Operand, name: str, out: int, role: str = "block") -> Value:
        into = x.type.shape[-1]
        assert isinstance(into, int)
        operands: list[Operand] = [x, self.weight(f"{name}.weight", out, into, role=role)]
        if self.shape.bias and role == "block":
            operands.append(self.weight(f"{name}.bias", out))
        return self.b.emit("linear", *operands, loc=name)

    def heads(self, x: Value, name: str, count: int, *tables: Value) -> Value:
        s = self.shape
        x = self.b.emit("reshape", x, shape=(BATCH, SEQ, count, s.dim))
        if s.qk_norm and tables:
            x = self.b.emit("rms_norm", x, self.weight(f"{name}_norm.weight", s.dim), eps=1e-6)
        x = self.b.emit("transpose", x, perm=(0, 2, 1, 3))
        return self.b.emit("rope", x, *tables) if tables else x

    def layer(
        self, x: Value, i: int, pasts: tuple[Value, Value], tables: tuple[Value, ...]
    ) -> tuple[Value, ...]:
        s, b, at = self.shape, self.b, f"model.layers.{i}"
        n = b.emit("rms_norm", x, self.weight(f"{at}.input_norm.weight", s.hidden), eps=1e-5)
        wide = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
        rows = {p: self.linear(n, f"{at}.attn.{p}_proj", count * s.dim) for p, count in wide.items()}
        q, k, v = (
            self.heads(rows[p], f"{at}.attn.{p}", wide[p], *(tables if p != "v" else ())) for p in "qkv"
        )
        key, value = b.emit("kv_append", pasts[0], k), b.emit("kv_append", pasts[1], v)
        attrs = {"scale": s.dim**-0.5, "causal": True, "window": s.window, "softcap": s.softcap}
        a = b.emit("attention", q, key, value, loc=f"{at}.attn", **attrs)
        a = b.emit("transpose", a, perm=(0, 2, 1, 3))
        a = b.emit("reshape", a, shape=(BATCH, SEQ, s.heads * s.dim))
        x = b.emit("residual_add", x, self.linear(a, f"{at}.attn.o_proj", s.hidden))
        n = b.emit("rms_norm", x, self.weight(f"{at}.post_norm.weight", s.hidden), eps=1e-5)
        gate, up = (self.linear(n, f"{at}.mlp.{p}_proj", s.ffn) for p in ("gate", "up"))
        mlp = b.emit("mul", b.emit("silu", gate), up)
        return b.emit("residual_add", x, self.linear(mlp, f"{at}.mlp.down_proj", s.hidden)), key, value


def decoder(shape: Shape, store: WeightStore) -> Module:
    """A module with `decode`, its weights float."""
    m, s = Maker(shape, store), shape
    ids, positions = (Value(TensorType("i64", (BATCH, SEQ)), n) for n in ("input_ids", "position_ids"))
    cache = TensorType("f32", (BATCH, s.kv_heads, PAST, s.dim))
    pasts = [(Value(cache, f"past_key.{i}"), Value(cache, f"past_value.{i}")) for i in range(s.layers)]
    table = m.weight("model.embed.weight", s.vocab, s.hidden, role="embedding")
    x = m.b.emit("embedding", ids, table, loc="model.embed")
    inv_freq = m.weight("rotary.inv_freq", s.rotary // 2)
    frequencies = 1 / 10000 ** (torch.arange(0, s.rotary, 2) / s.rotary)
    m.weights[inv_freq.name] = replace(m.weights[inv_freq.name], digest=store.put({"data": frequencies}))
    tables = m.b.emit_all("rotary_table", positions, inv_freq)
    presents: list[tuple[str, Value]] = []
    for i, past in enumerate(pasts):
        x, key, value = m.layer(x, i, past, tables)
        presents += [(f"present_key.{i}", key), (f"present_value.{i}", value)]
    x = m.b.emit("rms_norm", x, m.weight("model.norm.weight", s.hidden), eps=1e-5)
    logits = (
        m.b.emit("linear", x, table, loc="lm_head") if s.tied else m.linear(x, "lm_head", s.vocab, "head")
    )
    names, values = zip(("logits", logits), *presents, strict=True)
    params = (ids, positions, *(v for pair in pasts for v in pair))
    decode = Function("decode", params, tuple(m.b.ops), values, names)
    return Module(
        "tiny",
        {"decode": decode},
        m.weights,
        {"max_positions": 128, "eos": (2,), "vocab_size": s.vocab, "kind": "decoder"},
    )


def quantized(module: Module, store: WeightStore, formats: dict[str, str]) -> Module:
    """Weights with a role in the format of the first name part in `formats` that theirs contains."""
    for weight in module.weights.values():
        name = next((f for part, f in formats.items() if part in weight.name), None)
        if "role" in weight.attrs and name:
            q = rtn(store.tensor(weight.digest), name)
            stored = replace(weight, digest=store.put(q.parts)).with_attrs(
                stored=q.format.name, format=q.format.name
            )
            module = module.with_weights(stored)
    return module


def adapted(
    store: WeightStore, shape: Shape, formats: dict[str, str], rank: int = 5, seed: int = 1
) -> Module:
    """A quantized decoder with adapters that change its logits."""
    module = quantized(decoder(shape, store), store, formats)
    random, factors = torch.Generator().manual_seed(seed), {}
    for name, weight in module.weights.items():
        if weight.attrs.get("role") == "block":
            rows, columns = map(int, weight.type.shape)  # type: ignore[arg-type]
            a = torch.randn(rank, columns, generator=random) / columns**0.5
            factors[name] = (a, torch.randn(rows, rank, generator=random) / rank**0.5)
    return with_adapters(module, factors, store)


def cached_inputs(module: Module, seq: int, past: int, batch: int = 1) -> dict[str, Tensor]:
    """Inputs of `decode`: random tokens behind a random cache."""
    random = torch.Generator().manual_seed(seq * 100 + past)
    inputs = {
        "input_ids": torch.randint(0, 64, (batch, seq), generator=random),
        "position_ids": torch.arange(past, past + seq)[None].repeat(batch, 1),
    }
    for param in module.functions["decode"].params:
        if param.name.startswith("past_"):
            _, heads, _, dim = param.type.shape
            assert isinstance(heads, int) and isinstance(dim, int)
            inputs[param.name] = torch.randn(batch, heads, past, dim, generator=random)
    return inputs
