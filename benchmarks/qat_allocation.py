"""What DSA-QAT's sensitivities are worth before anything is trained with them.

A model is tuned in f32; the controller looks at it with each set of weights α, β, κ and chooses widths for an
average; block linears get GPTQ's codes at those widths, all else stays f32. KL(tuned ‖ row) in nats a token
and loss are taken on windows of the same text that were not trained on: what is chosen by these numbers has
seen no test text. "of a weight": sensitivities are not multiplied by ‖W‖² and the number of weights.

Run: python benchmarks/qat_allocation.py smollm2-135m --text TRAIN --tokens 20000 --rate 5e-5 --bits 4 3
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from qat import FullPrecision, copied
from torch import Tensor
from trained_on_text import parser_of

from gammac.formats import Format, parse_format
from gammac.passes.quantizers import make_quantizer
from gammac.passes.training.compensate import gram_batches, gram_matrices
from gammac.passes.training.controller import Controller
from gammac.passes.training.dsa_qat import DsaQat
from gammac.passes.training.graph import TrainingGraph
from gammac.passes.training.options import DsaQatOptions
from gammac.passes.training.sensitivity import Layer
from gammac.passes.training.tasks import next_token
from gammac.passes.training.trainer import Data, Schedule, Trainer
from gammac.training import Training, TrainRequest, make_training

LOOKS: Final = 8  # batches whose gradients are smoothed before the controller chooses
BATCH: Final = 4
TERMS: Final = {
    "α = β = ½": (0.5, 0.5, 0.0), "gradients alone": (1.0, 0.0, 0.0), "activations alone": (0.0, 1.0, 0.0),
    "α = β = κ = ½": (0.5, 0.5, 0.5),
}  # fmt: skip
OF_A_WEIGHT: Final = "α = β = ½, of a weight"


class OfAWeight(Controller):
    """Sensitivities of a weight of the layer, not of the layer."""

    def layer(self, name: str, weight: Tensor) -> Layer:
        """See Controller."""
        return replace(super().layer(name, weight), square=1.0, size=1)


class Bench:
    """A tuned model, GPTQ's codes of it as they are asked for, and windows that it has not seen."""

    def __init__(self, training: Training, schedule: Schedule, windows: int) -> None:
        assert isinstance(training.used, Data)
        self.training, self.used = training, training.used
        self.steps = self.used.steps(schedule.tokens, schedule.batch)
        plain = FullPrecision(training, DsaQatOptions())
        Trainer(plain, self.used, schedule).run()
        self.tuned = copied(plain)
        self.graph = TrainingGraph(training.module)
        # the next batches of the schedule, then what is judged on: a pass gives each window once
        batches = [
            self.used.batch(self.steps + i, BATCH, schedule.seed) for i in range(LOOKS + windows // BATCH)
        ]
        assert (self.steps + len(batches)) * BATCH <= len(self.used), "the text has too few windows"
        self.looks, judged = batches[:LOOKS], batches[LOOKS:]
        self.judged = [part.tokens for part in judged]
        self.wanted = [self.predicted(self.tuned, part) for part in self.judged]
        blocks = [n for n, w in training.module.weights.items() if w.attrs.get("role") == "block"]
        grams = gram_batches(self.used, schedule)
        self.grams = gram_matrices(self.graph, self.tuned.__getitem__, grams, blocks)
        self.codes: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def predicted(self, weights: Mapping[str, Tensor], part: Tensor) -> Tensor:
        """Log-probabilities of each next token."""
        return self.graph.run(part, weights.__getitem__)[:, :-1].log_softmax(-1)

    def judge(self, formats: Mapping[str, Format]) -> tuple[float, float]:
        """KL and loss of the tuned model in formats."""
        weights = self.tuned | {name: self.rounded(name, format_) for name, format_ in formats.items()}
        kl = loss = 0.0
        for part, log_p in zip(self.judged, self.wanted, strict=True):
            log_q = self.predicted(weights, part)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            loss -= float(log_q.gather(2, part[:, 1:, None]).sum())
        count = sum(part[:, 1:].numel() for part in self.judged)
        return kl / count, loss / count

    def rounded(self, name: str, format_: Format) -> Tensor:
        """By GPTQ."""
        if (name, format_.name) not in self.codes:
            found = make_quantizer("gptq").quantize(self.tuned[name], self.grams[name], [format_])[0]
            self.codes[name, format_.name] = found.dequantize()
        return self.codes[name, format_.name]

    def uniform(self, bits: int) -> dict[str, Format]:
        """One width for all."""
        return {n: parse_format(f"w{bits}g64").fit(gram.shape[0]) for n, gram in self.grams.items()}

    def chosen(
        self, bits: int, terms: tuple[float, float, float], kind: type[Controller]
    ) -> dict[str, Format]:
        """What a controller takes for the tuned model."""
        alpha, beta, kappa = terms
        options = DsaQatOptions(average_bits=bits, alpha=alpha, beta=beta, kappa=kappa)
        t = self.training
        method = DsaQat(t.module, t.ctx, options, next_token, t.compiler, t.stored)
        with torch.no_grad():
            for name, latent in method.latents.items():
                latent.copy_(self.tuned[name])
        own = method.controller
        offered = {n: fs for names, fs in zip(own.groups, own.offered, strict=True) for n in names}
        controller = kind(t.module, t.ctx, options, offered)
        for batch in self.looks:
            controller.observe(method.analyser.gradients(batch, next_token))
        weights = {n: self.tuned[n] for n in controller.names}
        controller.decide(weights, *method.analyser.look(self.looks[-1]), first=True)
        return controller.formats()


def main() -> None:
    """A row for each width and set of terms."""
    args = parser_of(__doc__, [4, 3]).parse_args()
    schedule = Schedule(args.tokens, BATCH, args.rate, seed=args.seeds[0])
    request = TrainRequest(args.model, DsaQatOptions(), schedule, args.text, args.length, target="reference")
    bench = Bench(make_training(request), schedule, args.windows)
    print("| average bits | S_l | KL(tuned) | loss |\n|---|---|---|---|", flush=True)
    for bits in args.bits:
        rows = {"uniform": bench.uniform(bits)}
        rows |= {name: bench.chosen(bits, terms, Controller) for name, terms in TERMS.items()}
        rows[OF_A_WEIGHT] = bench.chosen(bits, (0.5, 0.5, 0.0), OfAWeight)
        for name, formats in rows.items():
            kl, loss = bench.judge(formats)
            print(f"| {bits} | {name} | {kl:.4f} | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
