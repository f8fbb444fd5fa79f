"""What the DSA-QAT paper claims, beside what is measured here; prints Markdown tables.

The paper names neither its task nor its data. Here the task is benchmarks/source_lines.py: the language of a
line of source, judged on lines of files that were not trained on. The classifier's scores are the artifact's.
Noise of σ standard deviations of a weight is added to tables (embeddings) or to the blocks' weights, the mean
of three draws. BLEU compares greedy continuations of a language model that was trained in DSA-QAT with
those of the same model trained on the same tokens in f32, by tokens. Latency is measured on the artifact with
one thread; latency, memory and energy by target are predictions of the target files.

Run: python benchmarks/qat_claims.py tiny [--bits 4] [--tokens 150000] [--rows 600] [--targets cpu-x86-avx2 …]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from bleu import bleu
from qat import FullPrecision, copied
from source_lines import write
from torch import Tensor

from gammac.classification import scores_of, tokenized
from gammac.driver import Plan, Request, compile_model, make_plan
from gammac.formats import load_float
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.raise_patterns import RaisePatterns
from gammac.passes.training.dsa_qat import DsaQat
from gammac.passes.training.efficiency import size_reduction
from gammac.passes.training.graph import TrainingGraph
from gammac.passes.training.options import DsaQatOptions
from gammac.passes.training.tasks import TaskLoss, next_token, sequence_class
from gammac.passes.training.trainer import Schedule, Trainer
from gammac.pipeline import Context, Pipeline
from gammac.runtime.classify import ClassScores, classify, read_rows
from gammac.runtime.generate import load_tokenizer
from gammac.runtime.session import open_session
from gammac.targets.cost import module_cost
from gammac.targets.energy import decode_joules
from gammac.targets.target import load_target
from gammac.training import Training, TrainRequest, finetune, make_training

SIGMAS: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
DRAWS: Final = 3
FORWARD: Final = 128  # tokens of a timed forward
ROUNDS: Final = 30
PROMPT, CONTINUATION, PROMPTS = 32, 32, 32
RATE: Final = 1e-3

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """Weights by name, rounded and not, of the same data and tokens."""

    graph: TrainingGraph
    rounded: Weights
    full: Weights


def full_precision(training: Training) -> dict[str, Tensor]:
    """The weights after the same training in f32."""
    method = FullPrecision(training, DsaQatOptions(), task_of(training))
    Trainer(method, training.used, training.request.schedule).run()
    return copied(method)


def read_back(plan: Plan) -> dict[str, Tensor]:
    """The weights of a trained folder, as a training would name them."""
    ctx = Context(plan.target, plan.store)
    module = Pipeline((FoldConstants(), RaisePatterns())).run(plan.module, ctx)
    return {name: load_float(weight, plan.store) for name, weight in module.weights.items()}


def task_of(training: Training) -> TaskLoss:
    """The loss that the training's request asks for."""
    return sequence_class if training.split else next_token


def noisy(weights: Weights, names: list[str], sigma: float, seed: int) -> dict[str, Tensor]:
    """The weights, those named with noise of σ of their standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(weights)
    for name in names:
        weight = weights[name]
        found[name] = weight + sigma * weight.std() * torch.randn(weight.shape, generator=generator)
    return found


@torch.no_grad()
def continuation(graph: TrainingGraph, weights: Weights, prompts: Tensor) -> list[list[int]]:
    """The likeliest tokens behind each prompt i64 [prompts, length]."""
    tokens = prompts
    for _ in range(CONTINUATION):
        logits = graph.run(tokens, weights.__getitem__)[:, -1]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    found: list[list[int]] = tokens[:, prompts.shape[1] :].tolist()
    return found


def milliseconds(forward: Callable[[], object]) -> float:
    """The median of some rounds, after one that doesn't count."""
    found = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        forward()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[1:])


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Markdown."""
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def classifier(args: argparse.Namespace, folder: Path) -> None:
    """The paper's scores, size, latency; robustness of the classifier."""
    train_file, test_file = write(folder / "lines", args.rows)
    options = DsaQatOptions(average_bits=args.bits, formats=args.formats)
    schedule = Schedule(args.tokens, batch=8, rate=RATE, seed=args.seed)
    request = TrainRequest(args.model, options, schedule, train_file, target="cpu-x86", task="classification")
    training = make_training(request)
    done = finetune(training, folder / "trained")
    plan = make_plan(Request(str(folder / "trained"), "cpu-x86", f"{args.bits:g}"))
    artifact = compile_model(plan, folder / "artifact").folder
    session, rows = open_session(artifact, threads=1), read_rows(test_file)
    assert training.split is not None and training.source.tokenizer is not None
    labels = training.split.labels
    ours = classify(session, load_tokenizer(artifact), rows, labels)
    data = tokenized(rows, labels, training.source.tokenizer, session.context)
    models = Trained(TrainingGraph(training.module), read_back(plan), full_precision(training))

    def scores(weights: Weights) -> ClassScores:
        with torch.no_grad():
            return scores_of(lambda tokens: models.graph.run(tokens, weights.__getitem__), data, len(labels))

    full = scores(models.full)
    forward = milliseconds(lambda: session.logits(torch.arange(3, 3 + FORWARD)[None].numpy()))
    size = float(done.trained.figures["size_reduction"])
    print(f"{args.model}: {len(rows)} test rows, {len(labels)} classes, {args.tokens} tokens")
    print_table(
        ("figure", "the paper", "here, artifact", "here, f32"),
        [
            *((name, "> 97 %", f"{100 * getattr(ours, name):.2f} %", f"{100 * getattr(full, name):.2f} %")
              for name in ("accuracy", "precision", "recall", "f1")),
            ("a forward", "< 20 ms, of an unnamed length and device",
             f"{forward:.1f} ms, {FORWARD} tokens, 1 thread", ""),
            ("smaller than f32", "> 60 %, with INT4/6/8", f"{100 * size:.1f} % of the blocks", "0 %"),
        ],
    )  # fmt: skip
    print(
        "\nThe paper contradicts itself: of INT4, INT6 and INT8 alone a model is "
        f"{', '.join(f'{100 * size_reduction(b):.2f} %' for b in (4, 6, 8))} smaller than f32; "
        f"60 % is {32 * 0.4:g} bits on average."
    )
    predictions(training, {n: str(f) for n, f in done.trained.formats.items()}, args.targets)
    robustness(training, models, lambda weights: scores(weights).accuracy)


def predictions(training: Training, formats: Mapping[str, str], targets: list[str]) -> None:
    """What the target files say, f32 first and the trained formats behind it."""
    rows = []
    for name in targets:
        target = load_target(name)
        costs = [module_cost(training.module, target, chosen) for chosen in (None, formats)]
        joules = [decode_joules(training.module, target, chosen) or 0.0 for chosen in (None, formats)]
        rows.append((
            name,
            " → ".join(f"{1e3 * cost.prefill_seconds:.1f}" for cost in costs),
            " → ".join(f"{cost.peak_bytes / 1e6:.1f}" for cost in costs),
            " → ".join(f"{1e3 * joule:.2f}" for joule in joules),
        ))  # fmt: skip
    print_table(("target, f32 → trained", "ms a prefill", "MB at the peak", "mJ a token"), rows)


def robustness(training: Training, models: Trained, accuracy: Callable[[Weights], float]) -> None:
    """Accuracy by σ."""
    rows = []
    for role in ("table", "block"):
        names = [n for n, w in training.module.weights.items() if w.attrs.get("role") == role]
        for sigma in SIGMAS:
            cells = [
                statistics.mean(accuracy(noisy(weights, names, sigma, draw)) for draw in range(DRAWS))
                for weights in (models.rounded, models.full)
            ]
            what = "embeddings" if role == "table" else "block weights"
            rows.append((what, f"{sigma:g}", *(f"{100 * cell:.2f} %" for cell in cells)))
    print_table(("noise in", "σ", "accuracy, DSA-QAT", "accuracy, f32"), rows)


def language_model(args: argparse.Namespace) -> None:
    """BLEU of continuations."""
    options = DsaQatOptions(average_bits=args.bits, formats=args.formats)
    schedule = Schedule(args.tokens, rate=3e-4, seed=args.seed)
    training = make_training(TrainRequest(args.model, options, schedule, args.text, 128, "cpu-x86"))
    method = DsaQat(
        training.module, training.ctx, options, compiler=training.compiler, stored=training.stored
    )
    before = copied(method)
    Trainer(method, training.used, schedule).run()
    rounded = copied(method) | {n: q.dequantize() for n, q in method.quantized().items()}
    models = Trained(method.graph, rounded, full_precision(training))
    windows = next(training.held_out.parts(PROMPTS)).tokens[:, :PROMPT]
    wanted = continuation(models.graph, models.full, windows)
    rows = []
    for name, weights in (("DSA-QAT", models.rounded), ("the model as it came, f32", before)):
        found = continuation(models.graph, weights, windows)
        rows.append((name, f"{100 * bleu(found, wanted):.1f}"))
    print_table(("continuations of", "BLEU against f32 that was trained"), rows)


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--formats", default=DsaQatOptions().formats)
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--rows", type=int, default=600, help="a class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="of the language model (default: what gammac ships)")
    parser.add_argument(
        "--targets", nargs="+", default=["cpu-x86-avx2", "cpu-x86-avx512", "edge-aarch64-rpi5", "cuda-sm80"]
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        classifier(args, Path(folder))
    language_model(args)


if __name__ == "__main__":
    main()
