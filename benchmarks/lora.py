"""Adapters on a quantized base: does tuning repair what rounding broke?

A row for each base before tuning, and after it: loss and perplexity on a test text, KL(original ‖ row) in
nats a token, true bits with the adapters in f32, and the mean entropy of a group's codes in bits. QLoRA's
base is NormalFloat, IR-QLoRA's the same around offsets. A tuned model follows its text: a test text unlike
it says what else was lost.

Run: python benchmarks/lora.py tiny --text TRAIN --test TEST --tokens 200000 --bits 4 3 2 [--seeds 0 1 2]
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from trained_on_text import judged_windows, parser_of

from gammac.formats import load_float
from gammac.lora_training import base_of, context_of
from gammac.passes.quantizers.icq import entropies
from gammac.passes.training.lora import Lora
from gammac.passes.training.lora_options import IR_QLORA, QLORA, SCHEDULE, LoraOptions
from gammac.passes.training.trainer import Data, Schedule, Trainer
from gammac.training import TrainRequest, make_training

HEAD: Final = ("base", "tuning", "true bits", "entropy", "loss", "perplexity", "KL(original)")
BASES: Final = {QLORA: "nf{}g64-dq", IR_QLORA: "nf{}g64-icq"}


class Scores(NamedTuple):
    """Of one model on the test windows."""

    bits: float
    entropy: float
    loss: float
    kl: float


def rows_of(args: argparse.Namespace, method: str, bits: int, seed: int) -> Iterator[tuple[str, str, Scores]]:
    """A base, and what tuning makes of it."""
    options = LoraOptions(method, BASES[method].format(bits), rank=args.rank)
    schedule = Schedule(args.tokens, rate=args.rate, seed=seed, **SCHEDULE)
    training = make_training(
        TrainRequest(args.model, options, schedule, args.text, args.length, target="reference")
    )
    ctx = context_of(training, None)
    lora = Lora(training.module, ctx, options, base_of(training, ctx))
    test = Data(judged_windows(args, training))
    original = {n: load_float(w, ctx.store) for n, w in training.module.weights.items()}.__getitem__
    if method == QLORA:
        yield "f32", "none", Scores(32, math.nan, lora.evaluate(test, original), 0)
    codes = [lora.base[name] for name in lora.names]
    weights = sum(q.codes.numel() for q in codes)
    base_bits = sum(q.format.storage_bits(*q.codes.shape) for q in codes) / weights
    shares = [entropies(_by_group(q.codes.long()), 1 << bits).mean() for q in codes]
    entropy = statistics.mean(float(share) for share in shares)
    fixed, name = lora.fixed.__getitem__, options.base.name
    yield name, "none", Scores(base_bits, entropy, lora.evaluate(test, fixed), lora.kl(test, original, fixed))
    Trainer(lora, training.used, schedule, training.checkpoints).run()
    learnt = sum(t.numel() for t in lora.learnt.values() if t.ndim == 2)
    found = Scores(
        base_bits + 32 * learnt / weights, entropy, lora.evaluate(test), lora.kl(test, original, None)
    )
    yield name, method, found


def _by_group(codes: torch.Tensor, size: int = 64) -> torch.Tensor:
    return codes.reshape(len(codes), -1, size)


def main() -> None:
    """One table, means over the seeds."""
    parser = parser_of(__doc__, [4, 3, 2])
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    found: dict[tuple[str, str], list[Scores]] = {}
    for seed in args.seeds:
        for bits in args.bits:
            for method in BASES:
                for base, tuning, scores in rows_of(args, method, bits, seed):
                    found.setdefault((base, tuning), []).append(scores)
    print(f"{args.model}, {args.tokens} tokens, {len(args.seeds)} seeds\n\n| {' | '.join(HEAD)} |")
    print("|---" * len(HEAD) + "|")
    for (base, tuning), many in found.items():
        bits, entropy, loss, kl = (statistics.mean(column) for column in zip(*many, strict=True))
        said = "" if math.isnan(entropy) else f"{entropy:.3f}"
        print(f"| {base} | {tuning} | {bits:.3f} | {said} | {loss:.4f} | {math.exp(loss):.2f} | {kl:.4f} |")


if __name__ == "__main__":
    main()
