"""finetune(): from a model and a text to a trained folder that `gammac compile` takes on.

capture → train under autograd on that very module → codes, checkpoint, report
"""

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from gammac.adapter_file import demand_no_bypass
from gammac.backends import backend_of
from gammac.cache import key_of
from gammac.classification import (
    CLASSIFICATION,
    Split,
    make_classifier,
    scores_of,
    split_rows,
    tokenized,
    write_held_out,
)
from gammac.diagnostics import CompileError
from gammac.driver import TOKENIZER_FILES, resolve
from gammac.files import write_atomically
from gammac.formats import Format, load_float, parse_formats
from gammac.frontend.checkpoint import write_checkpoint
from gammac.frontend.export import Source, build_skeleton, capture
from gammac.frontend.source import quiet
from gammac.ir import Module, to_text
from gammac.models_zoo.fetch import default_cache
from gammac.models_zoo.texts import default_calibration_text
from gammac.passes.choices import demand_activations
from gammac.passes.fold_constants import FoldConstants
from gammac.passes.quantize_activations import parse_activations
from gammac.passes.raise_patterns import RaisePatterns
from gammac.passes.training.dsa_qat import DsaQat
from gammac.passes.training.efficiency import FULL_BITS, compression_ratio, energy, size_reduction, speed_up
from gammac.passes.training.labelled import LabelledData
from gammac.passes.training.lora_options import LoraOptions, demand_lora
from gammac.passes.training.options import AS_WEIGHTS, DsaQatOptions
from gammac.passes.training.tasks import next_token, sequence_class
from gammac.passes.training.trained import Trained, write_trained
from gammac.passes.training.trainer import Batches, Data, Schedule, Trainer
from gammac.pipeline import Context, Pipeline
from gammac.progress import Progress, no_progress
from gammac.runtime.classify import read_rows
from gammac.runtime.staging import check_writable, staging
from gammac.targets.cost import module_cost
from gammac.targets.target import Target, load_target
from gammac.texts import read_text, token_windows
from gammac.weights import WeightStore, digest_of

NEXT_TOKEN: Final = "next-token"
TASKS: Final = (NEXT_TOKEN, CLASSIFICATION)
APART: Final = 16  # every so manieth window is held out
HISTORY: Final = "history.csv"
BITS: Final = "bits.csv"


@dataclass(frozen=True)
class TrainRequest:
    """Everything that decides a trained folder. `text` None: the calibration text that gammac ships; for
    classification it is a .jsonl file of labelled texts, of `length` tokens at most in training."""

    model: str
    options: DsaQatOptions | LoraOptions
    schedule: Schedule
    text: Path | None = None
    length: int = 256
    target: str = "cpu"
    backend: str = ""
    trust_remote_code: bool = False
    task: str = NEXT_TOKEN


@dataclass(frozen=True)
class Training:
    """A request whose parts have been found and checked."""

    request: TrainRequest
    source: Source
    module: Module
    stored: frozenset[str]  # names of weights as they were captured
    ctx: Context
    compiler: bool
    used: Batches
    held_out: Batches
    checkpoints: Path
    split: Split | None = None  # labelled rows


@dataclass(frozen=True)
class Finetuned:
    """What a training leaves: the folder, what stands in its training.json, and a row a step."""

    folder: Path
    trained: Trained
    history: Sequence[Mapping[str, Any]] = field(repr=False)


def make_training(request: TrainRequest, cache: Path | None = None) -> Training:
    """Find the model and the text, capture, and check what can be checked. Raises CompileError."""
    target = load_target(request.target, request.backend or None)
    folder = cache or default_cache()
    compiler = backend_of(target, folder).every_width
    if isinstance(request.options, LoraOptions):
        demand_lora(request.options, target, compiler)
    else:
        _demand_kernels(request.options, target, compiler)
    split = _split(request)
    source = resolve(request.model, request.trust_remote_code)
    demand_no_bypass(source.folder)
    if split is not None:
        source = make_classifier(source, split.labels, request.schedule.seed, folder)
    store = WeightStore(folder / "weights")
    module = capture(source, store)
    used, held_out = _data(request, source, module, split)
    ctx, stored = Context(target, store, seed=request.schedule.seed), frozenset(module.weights)
    module = Pipeline((FoldConstants(), RaisePatterns())).run(module, ctx)
    read = (part for data in (used, held_out) for part in data.parts(len(data)))
    tokens = {str(i): torch.cat((p.tokens, p.labels[:, None]), 1) if p.labels is not None else p.tokens
              for i, p in enumerate(read)}  # fmt: skip
    key = key_of(to_text(module), repr(request.options), repr(request.schedule), target.digest,
                 digest_of(tokens), str(compiler))  # fmt: skip
    return Training(
        request, source, module, stored, ctx, compiler, used, held_out, folder / "training" / key, split
    )


def _split(request: TrainRequest) -> Split | None:
    """The labelled rows of a classification. Raises CompileError."""
    if request.task not in TASKS:
        raise CompileError(f"no task {request.task!r}", hint=f"there are {', '.join(TASKS)}")
    if request.task == NEXT_TOKEN:
        return None
    if request.text is None:
        raise CompileError("classification needs labelled texts", hint="give --text FILE.jsonl")
    return split_rows(read_rows(request.text))


def _data(
    request: TrainRequest, source: Source, module: Module, split: Split | None
) -> tuple[Batches, Batches]:
    """What trains and what is held out, as tokens. Raises CompileError."""
    if source.tokenizer is None or (split is None and module.attrs.get("kind") == "encoder"):
        raise CompileError(
            f"{source.name} does not predict a next token, or has no tokenizer",
            hint="gammac finetune trains decoders on text; with --task classification encoders, too",
        )
    longest = int(str(module.attrs["max_positions"]))
    length = min(request.length, longest)
    if split is not None:
        used = tokenized(split.used, split.labels, source.tokenizer, length)
        return used, tokenized(split.held_out, split.labels, source.tokenizer, longest)
    text = read_text(request.text) if request.text else default_calibration_text()
    windows = token_windows(text, source.tokenizer, length, None)
    apart = torch.arange(len(windows)) % APART == 0
    if len(windows) < 2:
        raise CompileError("the text has less than two windows", hint="give a longer text, or --length")
    return Data(windows[~apart]), Data(windows[apart])


def _demand_kernels(options: DsaQatOptions, target: Target, compiler: bool) -> None:
    """Raises CompileError for activations that the target's emitter does not run with these formats."""
    formats = parse_formats(options.formats)
    if options.activations == AS_WEIGHTS:
        for format_ in formats:
            demand_activations(int(min(8, max(2, format_.bits))), [format_], target.emitter, compiler)
    elif options.activations:
        demand_activations(parse_activations(options.activations).bits, formats, target.emitter, compiler)


def finetune(training: Training, out: Path, progress: Progress = no_progress) -> Finetuned:
    """Train, from a killed run's checkpoint if there is one, and leave a trained folder at `out`.

    Raises CompileError; then nothing is left there.
    """
    check_writable(out, overwrite=False)
    request, options = training.request, training.request.options
    assert isinstance(options, DsaQatOptions)
    method = DsaQat(
        training.module, training.ctx, options, sequence_class if training.split else next_token,
        training.compiler, training.stored,
    )  # fmt: skip
    before = method.evaluate(training.held_out, quantized=False)
    trainer = Trainer(method, training.used, request.schedule, training.checkpoints)
    history = trainer.run(progress)
    figures = {
        "tokens": history[-1]["tokens"],
        "average_bits": method.controller.average_bits(),
        "held_out_loss_before": before,  # of the model as it came, in f32
        "held_out_loss_quantized": method.evaluate(training.held_out),
        "held_out_loss_latent": method.evaluate(training.held_out, quantized=False),
        "held_out_tokens": sum(part.tokens.numel() for part in training.held_out.parts(1)),
    }
    figures |= _scores(training, method)
    weights = method.quantized()
    figures |= _efficiency(training, {n: q.format for n, q in weights.items()}, method)
    trained = Trained(
        method.name, f"{options.average_bits:g}", {n: q.format.name for n, q in weights.items()},
        method.activations(), {**asdict(options), **asdict(request.schedule)}, figures,
    )  # fmt: skip
    changed = {n: q.dequantize() for n, q in weights.items()} | method.floats()
    with staging(out, overwrite=False) as folder:
        write_model(training, changed, folder)
        write_trained(folder, trained, weights)
        write_history(history, folder)
        if training.split:
            write_held_out(training.split.held_out, folder)
    shutil.rmtree(training.checkpoints, ignore_errors=True)
    return Finetuned(out, trained, history)


def _scores(training: Training, method: DsaQat) -> dict[str, float | int]:
    """A classifier's scores on the rows that were held out."""
    if training.split is None:
        return {}
    assert isinstance(training.held_out, LabelledData)
    found = scores_of(method.predictor(), training.held_out, len(training.split.labels))
    return {f"held_out_{name}": value for name, value in asdict(found).items()}


def _efficiency(training: Training, formats: Mapping[str, Format], method: DsaQat) -> dict[str, float]:
    """The paper's figures over the blocks' linears: energy as a share of f32's, and the speed-up of a decoded
    token that the target's model predicts."""
    names = {n: training.module.weights[n].type.numel() for n in method.controller.names}
    bits = {n: float(formats[n].bits) for n in names}
    mean = method.controller.average_bits()
    full = module_cost(training.module, training.ctx.target)
    small = module_cost(training.module, training.ctx.target, {n: f.name for n, f in formats.items()})
    return {
        "compression_ratio": compression_ratio(mean),
        "size_reduction": size_reduction(mean),
        "energy": energy(bits, names) / energy(dict.fromkeys(names, float(FULL_BITS)), names),
        "predicted_speed_up": speed_up(full.decode_seconds, small.decode_seconds),
    }


def write_model(training: Training, changed: Mapping[str, torch.Tensor], folder: Path) -> None:
    """The model as transformers loads it, its weights what their codes stand for."""
    source = training.source
    with quiet():
        skeleton = build_skeleton(source)
        source.config.save_pretrained(folder)
        if source.tokenizer is not None and source.gguf is not None:
            source.tokenizer.save_pretrained(folder)
    for name in TOKENIZER_FILES if source.gguf is None else ():
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    pairs = {
        n: (load_float(training.module.weights[n], training.ctx.store), t) for n, t in changed.items()
    }  # fmt: skip
    write_checkpoint(source, skeleton, pairs, folder / "model.safetensors")


def write_history(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """history.csv, a row a step; bits.csv, a row each time that the controller looked."""
    steps = [{k: v for k, v in row.items() if k != "bits"} for row in history]
    looks = [{"step": row["step"], **row["bits"]} for row in history if "bits" in row]
    write_atomically(folder / HISTORY, _table(steps))
    if looks:
        write_atomically(folder / BITS, _table(looks))


def _table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()
