"""DSA-QAT: a controller moves bits between layers while they train ("Quantization Aware Training Techniques
for Efficient Transformer-Driven Large Language Models", Tummuri, section III).

Every block weight is fake-quantized in a format of its own, tables in one that stays; norms and biases learn
in f32. What linears of blocks read is rounded, too, if `activations` says so. At first nothing is rounded, if
`float_share` says so ("to stabilize early training, the model parameters were initially kept in 32-bit").
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Final

import torch
from torch import Tensor

from gammac.formats import Format, IntegerFormat, Quantized, load_float
from gammac.ir import Module, WeightRef
from gammac.passes.candidates import Candidates
from gammac.passes.finetune.student import READ_BY
from gammac.passes.quantize_activations import ActivationFormat, parse_activations
from gammac.passes.training.analyser import Analyser
from gammac.passes.training.compensate import compensated, gram_batches, gram_matrices
from gammac.passes.training.controller import Controller
from gammac.passes.training.efficiency import FULL_BITS
from gammac.passes.training.fake_quantize import HeldGrid, round_activations
from gammac.passes.training.graph import TrainingGraph, block_weight
from gammac.passes.training.losses import quantization_aware_loss, relative_noise
from gammac.passes.training.options import AS_WEIGHTS, GPTQ, DsaQatOptions
from gammac.passes.training.tasks import TaskLoss, next_token
from gammac.passes.training.trainer import Batches, Data, Row, Schedule
from gammac.pipeline import Context

# of a range, for activations with one step: it is an exponential mean of batches' largest magnitudes
RANGE_KEEP: Final = 0.9


class DsaQat:
    """The method for a trainer: latents, the formats that they have at the moment, and the controller.

    `stored` names the weights that a checkpoint holds: a norm that a pass computed stays as it is.
    `compiler`: whether formats that need a C++ compiler can be had.
    """

    name = "dsa-qat"

    def __init__(
        self, module: Module, ctx: Context, options: DsaQatOptions, task: TaskLoss = next_token,
        compiler: bool = True, stored: Set[str] | None = None,
    ) -> None:  # fmt: skip
        self.module, self.options, self.task = module, options, task
        self.graph = TrainingGraph(module)
        plain = _plain(module) if stored is None else _plain(module) & stored
        trained = [n for n, w in module.weights.items() if "role" in w.attrs or n in plain]
        floats = {n: load_float(w, ctx.store).clone() for n, w in module.weights.items()}
        self.latents = {n: floats.pop(n).requires_grad_() for n in trained}
        self.fixed = floats
        offered = _offered(module, ctx, options, compiler)
        self.grids = {n: HeldGrid(fs[-1], options.clip) for n, fs in offered.items()}
        blocks = {n: fs for n, fs in offered.items() if module.weights[n].attrs["role"] == "block"}
        self.controller = Controller(module, ctx, options, blocks)
        self.analyser = Analyser(self.graph, self._latent, bool(options.activations), options.kappa > 0)
        self.readers = _first_readers(module)
        self.ranges: dict[str, float] = {}
        self.noises: list[Tensor] = []
        self.rounding = False
        self.calibration: tuple[Data, ...] = ()

    # ---- forwards -------------------------------------------------------------------------------

    def parameters(self) -> Mapping[str, Tensor]:
        """Latents of tables, blocks, norms and biases."""
        return self.latents

    def _latent(self, name: str) -> Tensor:
        return self.latents[name] if name in self.latents else self.fixed[name]

    def loss(self, batch: Data, step: int) -> tuple[Tensor, Row]:
        """The quantization-aware loss of a batch, in nats a predicted position."""
        self.noises = []
        used = {n: grid(self.latents[n]) for n, grid in self.grids.items()} if self.rounding else {}
        outputs = self.graph.run(
            batch.tokens, lambda n: used[n] if n in used else self._latent(n), self._read
        )
        if self.rounding and not self.options.activations and self.options.gamma:
            self.noises = [relative_noise(self.latents[n], used[n]) for n in self.controller.names]
        task = self.task(outputs, batch)
        noise = float(sum(float(x.detach()) for x in self.noises)) / max(1, len(self.noises))
        total = quantization_aware_loss(task, self.noises, self.options.gamma)
        return total, {"task": float(task.detach()), "noise": noise}

    def _read(self, name: str, values: Tensor) -> Tensor:
        """What the linears of weight `name`, the first of those that read the values, get to read."""
        format_ = self.activation(name) if self.rounding else None
        if format_ is None:
            return values
        if format_.static and torch.is_grad_enabled():
            largest = float(values.detach().abs().max())
            before = self.ranges.get(name, largest)
            self.ranges[name] = RANGE_KEEP * before + (1 - RANGE_KEEP) * largest
        rounded = round_activations(values, format_.bits, self.step_of(name))
        if torch.is_grad_enabled() and self.options.gamma:
            self.noises.append(relative_noise(values, rounded))
        return rounded

    def activation(self, name: str) -> ActivationFormat | None:
        """How the input of a weight is rounded; as wide as the widest weight that reads it, if so asked."""
        if not self.options.activations:
            return None
        if self.options.activations != AS_WEIGHTS:
            return parse_activations(self.options.activations)
        widest = max(self.grids[n].format.bits for n, first in self.readers.items() if first == name)
        return ActivationFormat(int(min(8, max(2, widest))), static=False)

    def step_of(self, name: str) -> float | None:
        """The step of a static activation, as the artifact will have it; None: each token has its own."""
        format_ = self.activation(name)
        if format_ is None or not format_.static:
            return None
        return float(f"{max(self.ranges[name], 1e-5) / (2 ** (format_.bits - 1) - 1):.6g}")

    def predictor(self, quantized: bool = True) -> Callable[[Tensor], Tensor]:
        """The model as it is now, tokens i64 [batch, seq] to its first result, without gradients."""
        with torch.no_grad():
            used = {n: g.quantized(self.latents[n]).dequantize() for n, g in self.grids.items() if quantized}
        read = self._read if quantized else None

        @torch.no_grad()
        def predict(tokens: Tensor) -> Tensor:
            return self.graph.run(tokens, lambda n: used[n] if n in used else self._latent(n), read)

        return predict

    def evaluate(self, data: Batches, quantized: bool = True, batch: int = 8) -> float:
        """The mean task loss over data, in nats, without a gradient."""
        predict = self.predictor(quantized)
        losses = (float(self.task(predict(part.tokens), part)) * len(part) for part in data.parts(batch))
        return sum(losses) / len(data)

    # ---- the controller -------------------------------------------------------------------------

    def prepare(self, data: Batches, schedule: Schedule) -> None:
        """Keep what Gram matrices are made of."""
        if self.options.start == GPTQ:
            self.calibration = tuple(gram_batches(data, schedule))

    def begin(self, batch: Data) -> None:
        """Round from the first step on, unless floats train first."""
        if not self.options.float_share:
            self._start_rounding(batch)

    def after(self, gradients: Mapping[str, Tensor], batch: Data, step: int, steps: int, loss: float) -> Row:
        """Smooth the gradients' variances; every so many steps look again, unless it is too late."""
        self.controller.observe(gradients)
        self.controller.follow(loss)
        starts = step + 1 == self._float_steps(steps)
        looks, changed = self.rounding and (step + 1) % self.options.every == 0, 0
        if starts:
            self._start_rounding(batch)
        elif looks:
            frozen = step + 1 >= steps * (1 - self.options.freeze)
            changed = self._look(batch, first=False, frozen=frozen)
        said: Row = {
            "average_bits": self.controller.average_bits() if self.rounding else FULL_BITS,
            "lambda": self.controller.trade_off, "changed": changed,
        }  # fmt: skip
        bits = {n: format_.bits for n, format_ in self.controller.formats().items()}
        return said | ({"bits": bits} if starts or looks or (self.rounding and step == 0) else {})

    def _float_steps(self, steps: int) -> int:
        """Steps before anything is rounded; one at least, and one less than all, if there are to be any."""
        share = self.options.float_share
        return max(1, min(steps - 1, round(share * steps))) if share else 0

    def _start_rounding(self, batch: Data) -> None:
        """Analyse the model on a batch, and allocate."""
        self.rounding = True
        self.controller.observe(self.analyser.gradients(batch, self.task))
        self._look(batch, first=True)

    def _look(self, batch: Data, *, first: bool, frozen: bool = False) -> int:
        """Choose widths, where they may still change, and scales; how many layers changed.

        After RTN scales are chosen anew for all weights; GPTQ's codes stay for those that keep their width.
        """
        changed = 0
        if not frozen:
            errors, distortions = self.analyser.look(batch)
            weights = {n: self.latents[n].detach() for n in self.controller.names}
            changed = self.controller.decide(weights, errors, distortions, first=first)
        formats = self.controller.formats()
        new = [n for n, format_ in formats.items() if first or self.grids[n].format != format_]
        for name, format_ in formats.items():
            self.grids[name].format = format_
        for name in self.grids if first or self.options.start != GPTQ else new:
            self.grids[name].refresh(self.latents[name])
        if self.options.start == GPTQ and new:
            self._compensate(new)
        return changed

    @torch.no_grad()
    def _compensate(self, names: Sequence[str]) -> None:
        """Move latents of integer formats to where they round to GPTQ's codes."""
        grams = gram_matrices(self.graph, self._latent, self.calibration, names)
        for name in names:
            format_ = self.grids[name].format
            if isinstance(format_, IntegerFormat):
                latent, self.grids[name].grid = compensated(self.latents[name], grams[name], format_)
                self.latents[name].copy_(latent)

    # ---- state and result -----------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Scales that are held."""
        return {f"{part}/{n}": t for n, grid in self.grids.items() for part, t in grid.tensors().items()}

    def facts(self) -> dict[str, Any]:
        """Formats, ranges of activations, and what the controller remembers."""
        return {
            "ranges": self.ranges, "controller": self.controller.facts(), "rounding": self.rounding,
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The inverse of `tensors` and `facts`."""
        self.ranges = {n: float(v) for n, v in facts["ranges"].items()}
        self.rounding = facts["rounding"]
        self.controller.restore(facts["controller"])
        for name, format_ in self.controller.formats().items():
            self.grids[name].format = format_
        for name, grid in self.grids.items():
            grid.restore({p: tensors[f"{p}/{name}"] for p in ("scales", "zeros") if f"{p}/{name}" in tensors})

    def quantized(self) -> dict[str, Quantized]:
        """Each weight with a role as it is to be stored."""
        return {n: grid.quantized(self.latents[n]) for n, grid in self.grids.items()}

    def floats(self) -> dict[str, Tensor]:
        """What was trained and stays f32: norms and biases."""
        return {n: t.detach() for n, t in self.latents.items() if n not in self.grids}

    def activations(self) -> dict[str, dict[str, Any]]:
        """By weight name, how what it reads is rounded: bits, and the scale where there is one."""
        found: dict[str, dict[str, Any]] = {}
        for name, first in self.readers.items():
            format_, step = self.activation(first), self.step_of(first)
            if format_ is not None:
                found[name] = {"bits": format_.bits, **({} if step is None else {"scale": step})}
        return found


def _offered(
    module: Module, ctx: Context, options: DsaQatOptions, compiler: bool
) -> dict[str, tuple[Format, ...]]:
    """By weight name the formats that it may get, narrow ones first, fitted to its width and the target."""
    fitting = Candidates(options.formats, options.table, compiler=compiler)
    found = {n: fitting.formats_for(w, ctx) for n, w in module.weights.items() if "role" in w.attrs}
    return {n: tuple(sorted(formats)) for n, formats in found.items()}


def _plain(module: Module) -> set[str]:
    """What trains in f32: norms' gains, biases, and matrices without a role, such as a classifier's head."""
    ops = module.functions["forward"].ops
    found = {o.name for op in ops if op.name in READ_BY for o in op.operands if isinstance(o, WeightRef)}
    matrices = {ref.name for op in ops if (ref := op.weight()) and op.name in ("linear", "embedding")}
    ranked = {n for n in found if module.weights[n].type.rank == 1}
    return ranked | {n for n in matrices if "role" not in module.weights[n].attrs}


def _first_readers(module: Module) -> dict[str, str]:
    """By block weight name, the weight of the first linear that reads the same value."""
    first: dict[object, str] = {}
    names = (
        (block_weight(op, module), op.operands[0]) for op in module.functions["forward"].ops if op.operands
    )
    return {name: first.setdefault(value, name) for name, value in names if name}
