"""Other quantizers' models beside gammac's artifacts: perplexity and KL by one harness, in one run.

Each peer calibrates on the same windows as gammac (128 of 512 tokens), in groups of 64 with zero points; what
it stores is turned into floats for the model to run. Bits are true bits, a mean over the linears of the
blocks: codes, scales, zero points, and GPTQModel's order of columns. Each peer is held against the artifact
that is largest among those that take no more bits than it does. Rows that are done stay in `--rows`: a killed
run goes on behind them.

Run: pip install -e '.[quality,tvm]'
     python benchmarks/quality_peers.py smollm2-135m --calibration VALID --text TEST --windows 100 \\
         --peers auto-round:3:200 hqq:3 gptqmodel:3 llama.cpp:IQ3_XXS --artifacts out/best28 out/best33
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from gammac.driver import resolve
from gammac.formats import parse_format
from gammac.frontend.source import Source
from gammac.models_zoo.fetch import default_cache
from gammac.peers import peers_of
from gammac.peers.source_model import load_model
from gammac.runtime.artifact import open_artifact
from gammac.runtime.evaluate import compare
from gammac.runtime.peers import open_predictor
from gammac.runtime.reference import TransformersSession
from gammac.runtime.session import Logits, Predictor, Tokens
from gammac.texts import read_text, token_windows

GROUP: Final = 64
SAMPLES: Final = 128
LENGTH: Final = 512
WINDOW: Final = 1024
ROW: Final = "| {} | {} | {} | {} | {} | {} | {} |"


@dataclass(frozen=True)
class Row:
    """What is measured: true bits of the blocks' linears, bytes of the file (None: not written), minutes."""

    name: str
    bits: float
    bytes: int | None
    minutes: float | None
    ppl: float
    kl: float


class Original(TransformersSession):
    """Full precision; what the head reads is kept for each window, since every row is compared with it."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.body, self.head = model.model, model.get_output_embeddings()
        self.kept: dict[bytes, Tensor] = {}

    @torch.inference_mode()
    def logits(self, tokens: Tokens) -> Logits:
        """See Predictor."""
        key = tokens.tobytes()
        if key not in self.kept:
            self.kept[key] = self.body(torch.from_numpy(tokens), use_cache=False).last_hidden_state
        found: Logits = self.head(self.kept[key]).numpy()
        return found


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            yield name, module


def mean_bits(model: nn.Module, of_weight: Callable[[int, int], float]) -> float:
    """A mean over all weights, from the bits that a weight of so many rows and columns takes."""
    shapes = [tuple(module.weight.shape) for _, module in linears(model)]
    return sum(of_weight(*shape) for shape in shapes) / sum(rows * columns for rows, columns in shapes)


def auto_round(model: Any, tokenizer: Any, windows: Tensor, bits: int, iterations: str = "200") -> float:
    """Intel's tuned rounding and clipping (SignRound); with 50 iterations the rate of its recipe `light`."""
    from auto_round import AutoRound  # type: ignore[import-not-found]

    tuned = AutoRound(
        model, tokenizer, bits=bits, group_size=GROUP, sym=False, iters=int(iterations), seqlen=LENGTH,
        nsamples=SAMPLES, dataset=[{"input_ids": w[None]} for w in windows], device_map="cpu",
        lr=5e-3 if int(iterations) == 50 else None,
    )  # fmt: skip
    tuned.quantize()
    return mean_bits(model, parse_format(f"w{bits}g{GROUP}").storage_bits)


def hqq(model: Any, tokenizer: Any, windows: Tensor, bits: int) -> float:
    """Half-quadratic quantization: no calibration; f16 scales and zero points along the inputs."""
    from hqq.core.quantize import Quantizer  # type: ignore[import-not-found]

    for _, module in linears(model):
        codes, meta = Quantizer.quantize(
            module.weight.data,
            nbits=bits,
            group_size=GROUP,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
        )
        module.weight.data = Quantizer.dequantize(codes, meta).view_as(module.weight).float()
    return bits + 32 / GROUP


def gptqmodel(model: Any, tokenizer: Any, windows: Tensor, bits: int) -> float:
    """GPTQ with act-order."""
    # it asks for half the cores, and then for two
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    config = QuantizeConfig(bits=bits, group_size=GROUP, sym=False, desc_act=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/original")
        tokenizer.save_pretrained(f"{folder}/original")
        quantizing = GPTQModel.load(f"{folder}/original", config, device="cpu")
        quantizing.quantize([{"input_ids": w, "attention_mask": torch.ones_like(w)} for w in windows])
        quantizing.save(f"{folder}/stored")
        stored = GPTQModel.load(f"{folder}/stored", device="cpu", backend=BACKEND.TORCH).model
    packed = dict(stored.named_modules())
    for name, module in linears(model):
        module.weight.data = packed[name].dequantize_weight().T.float().contiguous()
    grid = parse_format(f"w{bits}g{GROUP}")
    return mean_bits(model, lambda rows, columns: grid.storage_bits(rows, columns) + 32 * columns)


PEERS: Final[dict[str, Callable[..., float]]] = {
    "auto-round": auto_round, "hqq": hqq, "gptqmodel": gptqmodel,
}  # fmt: skip


class Bench:
    """A model in full precision, and the windows that all rows are judged on."""

    def __init__(self, args: argparse.Namespace, source: Source) -> None:
        self.source, self.cache, self.rows = source, default_cache(), args.rows
        read = read_text(args.calibration)
        self.calibration = token_windows(read, source.tokenizer, LENGTH, SAMPLES, spread=True)
        self.windows = token_windows(read_text(args.text), source.tokenizer, WINDOW, args.windows)
        self.original = Original(load_model(source).eval())

    def kept(self, name: str, measure: Callable[[], Row]) -> Row:
        """A row from the file of those that are done, or one that is measured now and kept there."""
        rows = json.loads(self.rows.read_text()) if self.rows.exists() else {}
        key = f"{self.source.name}, {len(self.windows)} windows, {name}"
        if key not in rows:
            rows[key] = asdict(measure())
            self.rows.write_text(json.dumps(rows, indent=2))
        return Row(**rows[key])

    def peer(self, spelled: str) -> Row:
        """A peer by its name, bits and options, as in auto-round:3:200."""
        name, *options = spelled.split(":")
        if name == "llama.cpp":
            return self.llama_cpp(spelled)
        model: Any = load_model(self.source).eval()
        started = time.perf_counter()
        bits = PEERS[name](model, self.source.tokenizer, self.calibration, int(options[0]), *options[1:])
        minutes = (time.perf_counter() - started) / 60
        return self.judged(spelled, bits, None, minutes, TransformersSession(model.float().eval()))

    def llama_cpp(self, spelled: str) -> Row:
        """Its own file with an importance matrix, run by itself."""
        from gguf import GGUFReader

        started = time.perf_counter()
        (found,) = peers_of(spelled, str(self.source.folder), self.cache)
        minutes = (time.perf_counter() - started) / 60
        blocks = [t for t in GGUFReader(found.path).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
        bits = 8 * sum(t.n_bytes for t in blocks) / sum(t.n_elements for t in blocks)
        size = found.path.stat().st_size
        return self.judged(spelled, float(bits), size, minutes, open_predictor(found.path, None))

    def artifact(self, folder: Path) -> Row:
        """One of gammac's, run by itself."""
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        bits = open_artifact(folder).manifest.true_bits
        return self.judged(f"gammac {folder.name}", bits, size, None, open_predictor(folder, None))

    def judged(
        self, name: str, bits: float, size: int | None, minutes: float | None, session: Predictor
    ) -> Row:
        """The row of a model that can be run."""
        found = compare(session, self.original, self.windows)
        return Row(name, float(np.round(bits, 3)), size, minutes, found.ppl, found.kl)


def say(row: Row, rivals: list[Row]) -> None:
    """Print a row, and what gammac's perplexity and KL are of its."""
    fair = [r for r in rivals if r.bits <= row.bits]
    ours = max(fair, key=lambda r: r.bits, default=None)
    ratio = f"{ours.ppl / row.ppl:.3f} / {ours.kl / row.kl:.3f} ({ours.bits:.3f} bits)" if ours else ""
    size = f"{row.bytes / 1e6:.1f} MB" if row.bytes else ""
    minutes = f"{row.minutes:.1f}" if row.minutes is not None else ""
    print(
        ROW.format(row.name, f"{row.bits:.3f}", size, minutes, f"{row.ppl:.2f}", f"{row.kl:.4f}", ratio),
        flush=True,
    )


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--peers", nargs="*", default=["auto-round:3:200", "hqq:3", "gptqmodel:3"])
    parser.add_argument("--rows", type=Path, default=Path("quality_peers.json"))
    parser.add_argument("--artifacts", nargs="*", type=Path, default=[])
    args = parser.parse_args()
    bench = Bench(args, resolve(args.model))
    print(ROW.format("", "true bits", "size", "minutes", "perplexity", "KL", "gammac's, of it"))
    print(ROW.format(*["---"] * 7))
    ours = [bench.kept(f"gammac {f.name}", partial(bench.artifact, f)) for f in args.artifacts]
    for row in ours:
        say(row, [])
    for spelled in args.peers:
        say(bench.kept(spelled, partial(bench.peer, spelled)), ours)
        gc.collect()


if __name__ == "__main__":
    main()
