"""Small models for the tests of the runtime: ONNX graphs, a module, a transformers model, a tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gammac.ir import Builder, Function, Module, Sym, TensorType, Value, Weight
from gammac.runtime.artifact import seal
from gammac.runtime.manifest import Manifest
from gammac.weights import WeightStore

VOCAB, WIDTH, HEADS, KV_HEADS, DIM = 300, 32, 4, 2, 8
CONTEXT = 64

TEXT = (
    "The quick brown fox jumps over the lazy dog. Zwölf Boxkämpfer jagen Viktor. 犬も歩けば棒に当たる 🦊🐕 "
)

# the same attention twice: as one operator that shares its buffer, and spelled out
FUSED = [
    ("ReduceSum", ["attention_mask", "axis1"], ["ones"], {"keepdims": 0}),
    ("Sub", ["ones", "one"], ["last"], {}),
    ("Cast", ["last"], ["seqlens"], {"to": TensorProto.INT32}),
    ("Shape", ["attention_mask"], ["total1"], {"start": 1}),
    ("Squeeze", ["total1"], ["total0"], {}),
    ("Cast", ["total0"], ["total"], {"to": TensorProto.INT32}),
    ("GroupQueryAttention", ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value", "seqlens",
     "total"], ["mixed", "present.0.key", "present.0.value"],
     {"domain": "com.microsoft", "num_heads": HEADS, "kv_num_heads": KV_HEADS}),
]  # fmt: skip
SPELLED = [
    ("Shape", ["input_ids"], ["seq"], {"start": 1}),
    ("Shape", ["attention_mask"], ["total"], {"start": 1}),
    ("Reshape", ["q", "q_shape"], ["q4"], {}), ("Transpose", ["q4"], ["qt"], {"perm": [0, 2, 1, 3]}),
    ("Reshape", ["k", "k_shape"], ["k4"], {}), ("Transpose", ["k4"], ["kt"], {"perm": [0, 2, 1, 3]}),
    ("Reshape", ["v", "k_shape"], ["v4"], {}), ("Transpose", ["v4"], ["vt"], {"perm": [0, 2, 1, 3]}),
    ("Concat", ["past_key_values.0.key", "kt"], ["present.0.key"], {"axis": 2}),
    ("Concat", ["past_key_values.0.value", "vt"], ["present.0.value"], {"axis": 2}),
    ("Gather", ["present.0.key", "groups"], ["keys"], {"axis": 1}),
    ("Gather", ["present.0.value", "groups"], ["values"], {"axis": 1}),
    ("Transpose", ["keys"], ["kT"], {"perm": [0, 1, 3, 2]}),
    ("MatMul", ["qt", "kT"], ["dots"], {}), ("Mul", ["dots", "scale"], ["scores"], {}),
    ("Squeeze", ["total"], ["t"], {}), ("Squeeze", ["seq"], ["s"], {}),
    ("Sub", ["t", "s"], ["before"], {}),
    ("Range", ["before", "t", "one0"], ["rows"], {}), ("Range", ["zero0", "t", "one0"], ["columns"], {}),
    ("Unsqueeze", ["rows", "axis1"], ["rows1"], {}), ("Greater", ["columns", "rows1"], ["hidden"], {}),
    ("Where", ["hidden", "minus", "scores"], ["seen"], {}), ("Softmax", ["seen"], ["p"], {"axis": -1}),
    ("MatMul", ["p", "values"], ["o"], {}), ("Transpose", ["o"], ["ot"], {"perm": [0, 2, 1, 3]}),
    ("Reshape", ["ot", "x_shape"], ["mixed"], {}),
]  # fmt: skip


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights and constants of the graphs; a table of positions makes the order of tokens matter."""
    random = np.random.default_rng(seed)
    wide = {"wq": HEADS * DIM, "wk": KV_HEADS * DIM, "wv": KV_HEADS * DIM, "wo": VOCAB}
    made = {name: random.normal(size=(WIDTH, out)) * 0.3 for name, out in wide.items()}
    made |= {"table": random.normal(size=(VOCAB, WIDTH)), "positions": random.normal(size=(CONTEXT, WIDTH))}
    ints = {"one": [1], "axis1": [1], "q_shape": [0, 0, HEADS, DIM], "k_shape": [0, 0, KV_HEADS, DIM]}
    ints |= {"x_shape": [0, 0, WIDTH], "groups": [0, 0, 1, 1]}
    floats = {n: v.astype(np.float32) for n, v in made.items()}
    floats |= {"scale": np.array(DIM**-0.5, np.float32), "minus": np.array(-1e9, np.float32)}
    scalars = {"one0": np.array(1, np.int64), "zero0": np.array(0, np.int64)}
    return floats | scalars | {n: np.array(v, np.int64) for n, v in ints.items()}


def write_onnx(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> None:
    made = [
        helper.make_node(op, ins, outs, domain=attrs.pop("domain", ""), **attrs)
        for op, ins, outs, attrs in [(*node[:3], dict(node[3])) for node in nodes]
    ]
    used = {name for node in made for name in node.input}
    constants = [numpy_helper.from_array(v, n) for n, v in tensors().items() if n in used]
    graph = helper.make_graph(made, "g", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    save(
        helper.make_model(graph, opset_imports=opsets, ir_version=10), path, save_as_external_data=True,
        location="model.onnx.data", size_threshold=1024,
    )  # fmt: skip


def value(name: str, *shape: int | str, floats: bool = False) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT if floats else TensorProto.INT64, shape)


def write_decoder(folder: Path, fused: bool) -> Path:
    """An artifact of one attention layer; `fused` shares the cache's buffer."""
    ids = [value(n, "b", "s") for n in ("input_ids", "position_ids")] + [value("attention_mask", "b", "t")]
    past = [value(f"past_key_values.0.{n}", "b", KV_HEADS, "p", DIM, floats=True) for n in ("key", "value")]
    present = [value(f"present.0.{n}", "b", KV_HEADS, "t", DIM, floats=True) for n in ("key", "value")]
    embed = [
        ("Gather", ["table", "input_ids"], ["words"], {}),
        ("Gather", ["positions", "position_ids"], ["places"], {}),
        ("Add", ["words", "places"], ["x"], {}),
        *(("MatMul", ["x", f"w{n}"], [n], {}) for n in "qkv"),
    ]
    head = [("Add", ["x", "mixed"], ["y"], {}), ("MatMul", ["y", "wo"], ["logits"], {})]
    logits = value("logits", "b", "s", VOCAB, floats=True)
    nodes = embed + (FUSED if fused else SPELLED) + head
    write_onnx(folder / "model.onnx", nodes, [*ids, *past], [logits, *present])
    config = {
        "model": {"eos_token_id": 2, "context_length": CONTEXT},
        "search": {"past_present_share_buffer": fused},
    }
    (folder / "genai_config.json").write_text(json.dumps(config))
    seal(folder, manifest("decoder"))
    return folder


def write_encoder(folder: Path) -> Path:
    """An artifact that maps each token to a vector."""
    nodes = [
        ("Gather", ["table", "input_ids"], ["words"], {}),
        ("Gather", ["positions", "token_type_ids"], ["types"], {}),
        ("Add", ["words", "types"], ["hidden"], {}),
    ]
    ids = [value(n, "b", "s") for n in ("input_ids", "token_type_ids")]
    write_onnx(folder / "model.onnx", nodes, ids, [value("hidden", "b", "s", WIDTH, floats=True)])
    seal(folder, manifest("encoder"))
    return folder


def manifest(kind: str) -> Manifest:
    return Manifest(
        "fake", "sha256:0", "cpu", kind, "onnx", CONTEXT, payload_bits=32, true_bits=32, whole_model_bits=32
    )


def module(store: WeightStore) -> Module:
    """The graph of `write_decoder`, with functions forward and decode."""
    values = {n: torch.from_numpy(v) for n, v in tensors().items()}
    weights = {
        n: Weight(n, TensorType("f32", tuple(t.shape)), store.put({"data": t.contiguous()}))
        for n in ("table", "positions", "wq", "wk", "wv", "wo")
        for t in [values[n].T if n.startswith("w") else values[n]]
    }
    functions = [_function(name, weights) for name in ("forward", "decode")]
    return Module("fake", {f.name: f for f in functions}, weights)


def _function(name: str, weights: dict[str, Weight]) -> Function:
    batch, seq, past = map(Sym.named, ("batch", "seq", "past"))
    ids, places = (Value(TensorType("i64", (batch, seq)), n) for n in ("input_ids", "position_ids"))
    cache = TensorType("f32", (batch, KV_HEADS, past, DIM))
    pasts = [Value(cache, "past_key.0"), Value(cache, "past_value.0")] if name == "decode" else []
    b = Builder()
    words, offsets = (
        b.emit("embedding", i, weights[w].ref) for i, w in ((ids, "table"), (places, "positions"))
    )
    x = b.emit("add", words, offsets)
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    q, k, v = (
        b.emit("transpose", b.emit("reshape", b.emit("linear", x, weights[f"w{n}"].ref),
               shape=(batch, seq, count, DIM)), perm=(0, 2, 1, 3))
        for n, count in heads.items()
    )  # fmt: skip
    keys, values = (
        (b.emit("kv_append", p, n) for p, n in zip(pasts, (k, v), strict=True)) if pasts else (k, v)
    )
    mixed = b.emit("attention", q, keys, values, scale=DIM**-0.5, causal=True)
    rows = b.emit("reshape", b.emit("transpose", mixed, perm=(0, 2, 1, 3)), shape=(batch, seq, WIDTH))
    logits = b.emit("linear", b.emit("add", x, rows), weights["wo"].ref)
    caches = (keys, values) if pasts else ()
    names = ("logits", "present_key.0", "present_value.0")[: 1 + len(caches)]
    return Function(name, (ids, places, *pasts), tuple(b.ops), (logits, *caches), names)


def llama(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of two layers over the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that a token may be a part of a character."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator([TEXT], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    made.chat_template = template
    return made
