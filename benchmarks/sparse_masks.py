"""2:4 masks on a model: one-shot ones at equal calibration data, and trained ones at an equal token budget.

One-shot rows: the perplexity and KL(dense ‖ pruned) of magnitude and Wanda without any update, of all three
masks with the sweep's error feedback, and of SparseGPT rounded to 4 and 3 bits. Trained rows: every method of
`gammac sparsify` and a dense model tuned on the same tokens; SparseForge's ablations with --ablations. The
windows that are judged are none that was trained on; one-shot masks are calibrated on the calibration text.

Run: python benchmarks/sparse_masks.py tiny [--tokens 200000] [--seeds 0 1 2] [--rate 3e-4] [--test FILE]
"""

import argparse
import math
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gammac.driver import Request, context_of, make_plan, resolve
from gammac.formats import keep_two, parse_format
from gammac.models_zoo.texts import default_calibration_text
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.masks.methods import METHODS
from gammac.passes.masks.trainer import Trainer
from gammac.passes.quantizers import make_quantizer
from gammac.passes.raise_patterns import RaisePatterns
from gammac.pipeline import Pipeline
from gammac.sparsify.model import LanguageModel, load_model
from gammac.sparsify.run import make_method
from gammac.texts import read_text, token_windows

BATCH: Final = 4
ABLATIONS: Final[tuple[dict[str, Any], ...]] = (
    {"score": "fisher"}, {"score": "magnitude"}, {"score": "hessian_ratio"}, {"hardening": False},
)  # fmt: skip


def judged(problem: LanguageModel, parameters: dict[str, Tensor], windows: Tensor) -> tuple[float, float]:
    """Perplexity, and KL(dense ‖ these parameters) in nats a token."""
    loss, kl, count = 0.0, 0.0, 0
    with torch.no_grad():
        for part in torch.split(windows, BATCH):
            log_q = problem.logits(parameters, part)[:, :-1].log_softmax(-1)
            log_p = problem.model(input_ids=part).logits[:, :-1].log_softmax(-1)
            loss -= float(log_q.gather(2, part[:, 1:, None]).sum())
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            count += part[:, 1:].numel()
    return math.exp(loss / count), kl / count


def one_shot(name: str, problem: LanguageModel, test: Tensor) -> None:
    """A row for each mask."""
    plan = make_plan(Request(name, "reference"), artifact=False)
    ctx = context_of(plan)
    module = Pipeline((FoldConstants(), RaisePatterns(), CollectGrams())).run(plan.module, ctx)

    def row(what: str, pruned: Any) -> None:
        changed = dict(problem.parameters)
        for n in problem.sparse:
            changed[n] = pruned(changed[n], ctx.store.tensor(str(module.weights[n].attrs["gram"])))
        perplexity, kl = judged(problem, changed, test)
        print(f"one-shot  {what:34} perplexity {perplexity:9.2f}  KL {kl:.4f}", flush=True)

    def swept(mask: str, name: str = "s24f16") -> Any:
        quantizer, format_ = make_quantizer(f"gptq:mask={mask}"), parse_format(name)
        return lambda w, gram: quantizer.quantize(w, gram, [format_.fit(w.shape[1])])[0].dequantize()

    row("dense", lambda w, gram: w)
    row("magnitude", lambda w, gram: w * keep_two(w.abs()))
    row("wanda", lambda w, gram: w * keep_two(w.abs() * gram.diagonal().clamp(min=0).sqrt()))
    for mask in ("magnitude", "wanda", "sparsegpt"):
        row(f"{mask}, with feedback", swept(mask))
    for bits in (4, 3):
        row(f"sparsegpt, s24w{bits}g64", swept("sparsegpt", f"s24w{bits}g64"))


def trained(args: argparse.Namespace, windows: Tensor, test: Tensor) -> None:
    """A row for each method and seed."""
    wanted: list[tuple[str, dict[str, Any]]] = [(n, {}) for n in args.methods]
    wanted += [("sparseforge", options) for options in ABLATIONS] if args.ablations else []
    steps = args.tokens // (BATCH * args.length)
    for name, options in wanted:
        for seed in args.seeds:
            problem = LanguageModel(load_model(resolve(args.model)), windows, BATCH, seed)
            trainer = Trainer(problem, make_method(name, options), steps, args.rate, seed)
            trainer.run()
            perplexity, kl = judged(problem, problem.parameters, test)
            jump = trainer.report.get("behind_final_mask", 1) / trainer.report.get("before_final_mask", 1) - 1
            what = " ".join((name, *(f"{k}={v}" for k, v in options.items())))
            soft = [r["binarity"] for r in trainer.rows if not r["frozen"]]
            print(
                f"{args.tokens} tokens  {what:34} seed {seed}  perplexity {perplexity:9.2f}  KL {kl:.4f}  "
                f"final mask {100 * jump:+.2f} %  binarity {soft[-1]:.3f}",
                flush=True,
            )


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--text", type=Path, help="trained on (default: the calibration text)")
    parser.add_argument("--test", type=Path, help="judged on (default: the last sixteenth of that text)")
    args = parser.parse_args()
    source = resolve(args.model)
    text = read_text(args.text) if args.text else default_calibration_text()
    windows = token_windows(text, source.tokenizer, args.length, None)
    held = len(windows) // 16
    test = windows[-held:]
    if args.test:
        test = token_windows(read_text(args.test), source.tokenizer, args.length, None)
    test, windows = test[:64], windows[:-held]
    print(f"{args.model}: {windows.numel()} tokens to train on, {test.numel()} to judge on", flush=True)
    one_shot(args.model, LanguageModel(load_model(source), windows, BATCH, 0), test)
    trained(args, windows, test)


if __name__ == "__main__":
    main()
