"""DSA-QAT beside post-training quantization, static uniform training and plain training on the same tokens.

A row for each way to a quantized model: loss and perplexity on the test text, KL(original ‖ row) and
KL(tuned ‖ row) in nats a token, where "tuned" is the model trained on the same tokens in f32; or accuracy,
precision, recall and F1 of a classifier. Rounding the tuned model afterwards (RTN, GPTQ) tells what training
on the text is worth; static and dynamic training tell what is gained by rounding in the loop. Average bits
are payload bits of the blocks' linears; tables are equal in all rows. Two more tables: when the controller
moved widths, and λ against average bits. "late": the first half of the steps trains in f32, rounding then
starts from GPTQ's codes; "last fifth", "last tenth": all steps but those do. "reversed": the ranking of
layers turned around.

Run: python benchmarks/qat.py tiny --text TRAIN --test TEST --tokens 200000 --bits 4 6 [--seeds 0 1 2]
     python benchmarks/source_lines.py lines
     python benchmarks/qat.py tiny --task classification --text lines/train.jsonl --test lines/test.jsonl
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from judges import ClassJudge, Judge, Scores, TextJudge, Weights
from torch import Tensor
from trained_on_text import judged, parser_of

from gammac.formats import Format, Quantized, parse_format
from gammac.passes.quantizers import make_quantizer
from gammac.passes.training.compensate import gram_batches, gram_matrices
from gammac.passes.training.dsa_qat import DsaQat
from gammac.passes.training.graph import TrainingGraph
from gammac.passes.training.labelled import LabelledData
from gammac.passes.training.options import DsaQatOptions
from gammac.passes.training.tasks import TaskLoss, next_token, sequence_class
from gammac.passes.training.trainer import Data, Row, Schedule, Trainer
from gammac.targets.target import BLOCK
from gammac.training import NEXT_TOKEN, TASKS, Training, TrainRequest, make_training

LOOKS: Final = 10  # of the controller, at least
TRADE_OFFS: Final = (0.01, 0.1, 1.0, 10.0, 100.0)
LATE: Final = {"float_share": 0.5, "start": "gptq"}
LAST: Final = {"float_share": 0.8, "start": "gptq"}
LEAST: Final = {"float_share": 0.9, "start": "gptq"}
POST_TRAINING: Final = ("rtn", "gptq")
METHODS: Final[dict[str, dict[str, Any]]] = {
    "static": {}, "dsa-qat": {}, "static, late": LATE, "dsa-qat, late": LATE, "static, last fifth": LAST,
    "dsa-qat, last fifth": LAST, "static, last tenth": LEAST, "dsa-qat, last tenth": LEAST,
    "reversed": {"reverse": True},
}  # fmt: skip
DIGITS: Final = {"perplexity": 2, "%": 2}  # 4 elsewhere


class FullPrecision(DsaQat):
    """The same training with nothing rounded and nobody to move widths."""

    name = "full-precision"

    def __init__(self, training: Training, options: DsaQatOptions, task: TaskLoss = next_token) -> None:
        super().__init__(training.module, training.ctx, options, task, training.compiler, training.stored)
        self.grids = {}

    def begin(self, batch: Data) -> None:
        """Nothing to decide."""

    def after(self, gradients: Weights, batch: Data, step: int, steps: int, loss: float) -> Row:
        """Nothing to decide."""
        return {}


@dataclass
class Bench:
    """One seed of one model: the training data, the schedule, the references."""

    training: Training
    schedule: Schedule
    test: Tensor | LabelledData
    rows: dict[tuple[str, str], list[tuple[float, Scores]]]
    histories: list[tuple[str, list[Row]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        steps = self.training.used.steps(self.schedule.tokens, self.schedule.batch)
        self.every = max(1, min(DsaQatOptions().every, steps // LOOKS))
        self.module = self.training.module
        split = self.training.split
        self.task = sequence_class if split else next_token
        plain = FullPrecision(self.training, DsaQatOptions(), self.task)
        original = copied(plain)
        Trainer(plain, self.training.used, self.schedule).run()
        self.tuned = copied(plain)
        self.original = original
        self.graph = TrainingGraph(self.module)
        self.judge: Judge
        if isinstance(self.test, LabelledData):
            self.judge = ClassJudge(self.graph, self.test, len(split.labels) if split else 0)
        else:
            self.judge = TextJudge(self.graph, self.test, (self.original, self.tuned))

    def run(self, bits: Sequence[float], methods: Sequence[str]) -> None:
        """All rows."""
        self.add("32", "original, f32", 32, self.original)
        self.add("32", "tuned, f32", 32, self.tuned)
        for width in bits:
            rounding = [name for name in methods if name in POST_TRAINING]
            for what, weights in (("original", self.original), ("tuned", self.tuned)) if rounding else ():
                grams = self.grams(weights)
                for quantizer in rounding:
                    rounded = self.rounded(weights, grams, quantizer, width)
                    self.add(f"{width:g}", f"{quantizer.upper()} of {what}", width, rounded)
            options = DsaQatOptions(average_bits=width, every=self.every)
            for name in (name for name in methods if name in METHODS):
                changes = dict(METHODS[name])
                if name.startswith("static"):
                    changes["formats"] = f"w{width:g}g64"
                self.train(f"{width:g}", name, replace(options, **changes))

    def train(self, bits: str, name: str, options: DsaQatOptions) -> None:
        """One training of the method, and its row."""
        method = self.method(options)
        trainer = Trainer(method, self.training.used, self.schedule)
        self.histories.append((f"{name} {bits}", trainer.run()))
        weights = copied(method) | {n: q.dequantize() for n, q in method.quantized().items()}
        self.add(bits, name, method.controller.average_bits(), weights)

    def method(self, options: DsaQatOptions) -> DsaQat:
        """A fresh one."""
        t = self.training
        return DsaQat(t.module, t.ctx, options, self.task, t.compiler, t.stored)

    def add(self, bits: str, name: str, average: float, weights: Weights) -> None:
        """Judge a row and say so at once."""
        scores = self.judge(weights)
        self.rows.setdefault((bits, name), []).append((average, scores))
        shown = "  ".join(f"{key} {value:.4f}" for key, value in scores.items())
        print(f"seed {self.schedule.seed}  {bits:>3} {name:20} {shown}", flush=True)

    def grams(self, weights: Weights) -> dict[str, Tensor]:
        """Of what each block linear reads, on text that was trained on."""
        batches = gram_batches(self.training.used, self.schedule)
        names = [n for n, w in self.module.weights.items() if w.attrs.get("role") == BLOCK]
        return gram_matrices(self.graph, weights.__getitem__, batches, names)

    def rounded(self, weights: Weights, grams: Weights, quantizer: str, bits: float) -> dict[str, Tensor]:
        """Block linears in one width by a quantizer, tables by RTN in eight bits, as training has them."""
        found = dict(weights)
        for name, weight in self.module.weights.items():
            if "role" not in weight.attrs:
                continue
            block = weight.attrs["role"] == BLOCK
            format_ = parse_format(f"w{bits:g}g64" if block else DsaQatOptions().table)
            found[name] = _quantized(
                quantizer if block else "rtn", weights[name], grams.get(name), format_
            ).dequantize()
        return found

    def trade_offs(self) -> Iterator[tuple[float, float, float]]:
        """λ with the average bits before the first step and behind the last one."""
        for trade_off in TRADE_OFFS:
            method = self.method(DsaQatOptions(average_bits=8, trade_off=trade_off, every=self.every))
            short = replace(self.schedule, tokens=self.schedule.tokens // 8)
            history = Trainer(method, self.training.used, short).run()
            yield trade_off, history[0]["average_bits"], history[-1]["average_bits"]


def _quantized(name: str, weight: Tensor, gram: Tensor | None, format_: Format) -> Quantized:
    return make_quantizer(name).quantize(weight, gram, [format_.fit(weight.shape[1])])[0]


def copied(method: DsaQat) -> dict[str, Tensor]:
    """Every weight as it is, unrounded."""
    return {n: t.detach().clone() for n, t in (method.fixed | method.latents).items()}


def table(rows: Mapping[tuple[str, str], Sequence[tuple[float, Scores]]]) -> str:
    """Means over seeds; ± is the deviation, where there is more than one."""
    head = ("bits", "method", "average bits", *next(iter(rows.values()))[0][1])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (bits, name), found in rows.items():
        average = statistics.mean(average for average, _ in found)
        cells = [shown(key, [scores[key] for _, scores in found]) for key in head[3:]]
        lines.append("| " + " | ".join((bits, name, f"{average:.3f}", *cells)) + " |")
    return "\n".join(lines)


def shown(key: str, values: Sequence[float]) -> str:
    """A cell."""
    digits = DIGITS.get(key.split()[-1], 4)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def settled(histories: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """Changes of width in each fifth of the training; in the last one the controller is frozen."""
    lines = ["| controller | changes in fifths of the steps |", "|---|---|"]
    for name, rows in histories:
        fifths = [rows[i * len(rows) // 5 : (i + 1) * len(rows) // 5] for i in range(5)]
        counts = ", ".join(str(sum(r["changed"] for r in fifth)) for fifth in fifths)
        lines.append(f"| {name} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """The three tables."""
    parser = parser_of(__doc__, [4.0, 6.0])
    parser.add_argument("--task", default=NEXT_TOKEN, choices=TASKS)
    names = (*POST_TRAINING, *METHODS)
    parser.add_argument("--methods", nargs="+", default=list(names), choices=names)
    parser.add_argument("--batch", type=int, default=4, help="windows, or rows, of a step")
    parser.add_argument("--rows-only", action="store_true", help="leave out λ against average bits")
    args = parser.parse_args()
    rows: dict[tuple[str, str], list[tuple[float, Scores]]] = {}
    histories: list[tuple[str, list[Row]]] = []
    for seed in args.seeds:
        schedule = Schedule(args.tokens, args.batch, args.rate, seed=seed)
        request = TrainRequest(
            args.model, DsaQatOptions(), schedule, args.text, args.length, target="reference", task=args.task
        )
        training = make_training(request)
        test = judged(args, training)
        bench = Bench(training, schedule, test, rows, histories)
        bench.run(args.bits, args.methods)
    print(f"\n{args.model}, {args.tokens} tokens, {len(args.seeds)} seeds\n\n{table(rows)}\n")
    print(settled(histories))
    if args.rows_only:
        return
    print("\n| λ | average bits, first | last |\n|---|---|---|")
    for trade_off, first, last in bench.trade_offs():
        print(f"| {trade_off:g} | {first:.3f} | {last:.3f} |", flush=True)


if __name__ == "__main__":
    main()
