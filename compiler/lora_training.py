"""finetune_lora(): from a model and a text to a quantized base with adapters, or to what both add up to.

capture → base codes, which stay → train adapters beside them → adapters.safetensors, or merged codes
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from gammac.cache import PassCache
from gammac.formats import Format, Quantized, load_candidate, load_float
from gammac.ir import Module
from gammac.models_zoo.fetch import default_cache
from gammac.passes.add_adapters import with_adapters
from gammac.passes.candidates import Candidates
from gammac.passes.collect_grams import CollectGrams
from gammac.passes.quantizers import make_quantizer
from gammac.passes.training.adapters import ADAPTERS, write_adapters
from gammac.passes.training.lora import Lora
from gammac.passes.training.lora_options import LoraOptions, demand_divisible, runs
from gammac.passes.training.trained import Trained, write_trained
from gammac.passes.training.trainer import Batches, Data, Trainer
from gammac.pipeline import Context, Pipeline
from gammac.progress import Progress, no_progress
from gammac.runtime.staging import check_writable, staging
from gammac.targets.cost import module_cost
from gammac.targets.target import REFERENCE, load_target
from gammac.texts import Calibration
from gammac.training import Finetuned, Training, write_history, write_model

CALIBRATED_ON: Final = 128  # windows of the training text, as a compile takes of its calibration text


def finetune_lora(
    training: Training, out: Path, cache: Path | None = None, progress: Progress = no_progress
) -> Finetuned:
    """Train, from a killed run's checkpoint if there is one, and leave a trained folder at `out`.

    Raises CompileError; then nothing is left there.
    """
    check_writable(out, overwrite=False)
    options = training.request.options
    assert isinstance(options, LoraOptions)
    demand_divisible(options, training.module)
    ctx = context_of(training, cache, progress)
    method = Lora(training.module, ctx, options, base_of(training, ctx))
    history = Trainer(method, training.used, training.request.schedule, training.checkpoints).run(progress)
    figures = {"tokens": history[-1]["tokens"], **_losses(training, method)}
    codes: Mapping[str, Quantized] = method.base
    if options.merge:
        codes = merged_codes(training, method, ctx)
        figures |= _cost_of_merging(training, method, codes)
    figures |= _storage(training, method, codes)
    formats = {n: q.format.name for n, q in codes.items()}
    # up, so that a compile that is asked for it keeps it
    budget = math.ceil(figures["payload_bits"] * 1e4) / 1e4
    request = {**asdict(options), **asdict(training.request.schedule)}
    trained = Trained(method.name, f"{budget:g}", formats, {}, request, figures)
    with staging(out, overwrite=False) as folder:
        write_model(training, {n: q.dequantize() for n, q in codes.items()}, folder)
        write_trained(folder, trained, codes)
        if not options.merge:
            write_adapters(folder / ADAPTERS, method.adapters())
        write_history(history, folder)
    shutil.rmtree(training.checkpoints, ignore_errors=True)
    return Finetuned(out, trained, history)


def windows(batches: Batches) -> Data:
    """Windows of a text: what adapters are trained on."""
    assert isinstance(batches, Data)
    return batches


def context_of(training: Training, cache: Path | None, progress: Progress = no_progress) -> Context:
    """The training's context with a place for finished codes, and with text to calibrate on."""
    passes = PassCache((cache or default_cache()) / "passes")
    calibration = Calibration(windows(training.used).tokens).spread(CALIBRATED_ON)
    return replace(training.ctx, cache=passes, calibration=calibration, progress=progress)


# ---- codes --------------------------------------------------------------------------------------


def base_of(training: Training, ctx: Context) -> dict[str, Quantized]:
    """The codes that adapters learn beside; found again where they were made before."""
    options = training.request.options
    assert isinstance(options, LoraOptions)
    # the target need not run the base as it is: merged, it is quantized again, or its scales become f16
    if options.merge or not runs(options.base, ctx.target, training.compiler):
        ctx = replace(ctx, target=load_target(REFERENCE))
    return _codes(training, training.module, options, options.base, ctx)


def merged_codes(training: Training, method: Lora, ctx: Context) -> dict[str, Quantized]:
    """Base and adapters added up and quantized again; embedding and head as they are."""
    weights = [training.module.weights[n] for n in method.names]
    summed = [replace(w, digest=ctx.store.put({"data": method.merged(w.name)})) for w in weights]
    options = method.options
    format_ = options.merged(ctx.target, training.compiler)
    found = _codes(training, training.module.with_weights(*summed), options, format_, ctx)
    return {n: q if n in method.names else method.base[n] for n, q in found.items()}


def _codes(
    training: Training, module: Module, options: LoraOptions, format_: Format, ctx: Context
) -> dict[str, Quantized]:
    quantizer = options.quantizer_for(format_)
    grams = (CollectGrams(),) if make_quantizer(quantizer).needs_gram else ()
    candidates = Candidates(format_.name, options.table, quantizer, compiler=training.compiler)
    module = Pipeline((*grams, candidates)).run(module, ctx)
    roles = [w for w in module.weights.values() if "role" in w.attrs]
    return {w.name: load_candidate(w, candidates.formats_for(w, ctx)[0].name, ctx.store) for w in roles}


# ---- figures ------------------------------------------------------------------------------------


def _losses(training: Training, method: Lora) -> dict[str, Any]:
    held_out = windows(training.held_out)
    original = {n: load_float(w, training.ctx.store) for n, w in training.module.weights.items()}
    return {
        "held_out_loss_before": method.evaluate(held_out, original.__getitem__),  # of f32
        "held_out_loss_base": method.evaluate(held_out, method.fixed.__getitem__),
        "held_out_loss_quantized": method.evaluate(held_out),
        "held_out_tokens": held_out.tokens.numel(),
    }


def _cost_of_merging(training: Training, method: Lora, codes: Mapping[str, Quantized]) -> dict[str, float]:
    held_out = windows(training.held_out)
    weights: dict[str, Tensor] = {**method.fixed, **{n: q.dequantize() for n, q in codes.items()}}
    return {
        "held_out_loss_beside": method.evaluate(held_out),
        "held_out_loss_quantized": method.evaluate(held_out, weights.__getitem__),
        "merge_kl": method.kl(held_out, None, weights.__getitem__),
    }


def _storage(training: Training, method: Lora, codes: Mapping[str, Quantized]) -> dict[str, float]:
    """Bits a block weight: of the codes; with scales and adapters; of the adapters alone, as f32."""
    module = training.module
    reference = load_target(REFERENCE)
    formats = {n: q.format.name for n, q in codes.items()}
    blocks = sum(module.weights[n].type.numel() for n in method.names)
    if not method.options.merge:
        module = with_adapters(module, method.adapters().factors, training.ctx.store)
    cost = module_cost(module, reference, formats)
    learnt = 0 if method.options.merge else sum(t.numel() for t in method.learnt.values() if t.ndim == 2)
    return {
        "payload_bits": cost.payload_bits, "true_bits": cost.true_bits, "adapter_bits": 32 * learnt / blocks,
    }  # fmt: skip
