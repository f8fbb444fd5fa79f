"""`gammac finetune --method qlora`: its options, and what it prints."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from gammac.cli.console import ERR, OUT, show_progress

if TYPE_CHECKING:
    from gammac.training import Finetuned

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS: Final = (
    click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="lora: its size."),
    click.option(
        "--alpha", type=float, default=16.0, show_default=True, help="lora: Δ is alpha / rank · B A."
    ),
    click.option("--dropout", type=float, default=0.0, show_default=True, help="lora: of what A reads."),
    click.option("--quantizer", default="", help="lora: of the base (default: nf, gptq, … as the format)."),
    click.option("--merge", is_flag=True, help="lora: add adapters to the weights, and quantize again."),
    click.option(
        "--merge-format",
        default="",
        help="lora: of merged weights (default: the base's, or integers as wide where the target lacks it).",
    ),
)  # fmt: skip
OWN: Final = ("rank", "alpha", "dropout", "quantizer", "merge", "merge_format")
DSA_QAT: Final = (
    "average_bits", "activations", "clip", "controller", "cost", "trade_off", "every", "gamma", "float_share",
    "start", "task",
)  # fmt: skip


def lora_options(command: Command) -> Command:
    """Adds OPTIONS to a command, in their order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def said(name: str) -> bool:
    """Whether the user gave an option of the command that runs."""
    source = click.get_current_context().get_parameter_source(name)
    return source != click.core.ParameterSource.DEFAULT


def demand_own(method: str, foreign: tuple[str, ...]) -> None:
    """Raises CompileError for options of another method."""
    from gammac.diagnostics import CompileError

    given = ["--" + name.replace("_", "-") for name in foreign if said(name)]
    if given:
        raise CompileError(
            f"{', '.join(given)}: {method} has no such option", hint="leave it out; gammac finetune --help"
        )


def run_lora(options: Mapping[str, Any]) -> "Finetuned":
    """Train adapters as the options say, and say what came of it. Raises CompileError."""
    from gammac.lora_training import finetune_lora
    from gammac.passes.training.lora_options import SCHEDULE, LoraOptions
    from gammac.passes.training.trainer import Schedule
    from gammac.runtime.staging import check_writable
    from gammac.training import TrainRequest, make_training

    demand_own(options["method"], DSA_QAT)
    check_writable(options["out"], overwrite=False)
    method = LoraOptions(
        options["method"], "+".join(options["formats"].split(",")) if said("formats") else "",
        options["table_format"], **{name: options[name] for name in OWN},
    )  # fmt: skip
    timed = ("tokens", "batch", "rate", "seed", "save_every")
    schedule = Schedule(**{name: options[name] for name in timed}, **SCHEDULE)
    request = TrainRequest(
        options["model"], method, schedule, options["text"], options["length"], options["target"],
        options["backend"] or "", options["trust_remote_code"],
    )  # fmt: skip
    with ERR.status("capturing the model"):
        training = make_training(request, options["cache"])
    found = finetune_lora(training, Path(options["out"]), options["cache"], show_progress)
    _print(found)
    return found


def _print(found: "Finetuned") -> None:
    figures, formats = found.trained.figures, sorted(set(found.trained.formats.values()))
    OUT.print(f"{found.trained.method}: {figures['tokens']} tokens → {found.folder}", highlight=False)
    beside = f", {figures['adapter_bits']:.3g} of them for adapters" if figures["adapter_bits"] else ""
    OUT.print(
        f"{', '.join(formats)}: {figures['true_bits']:.4g} true bits a block weight{beside}", highlight=False
    )
    OUT.print(
        f"held-out loss {figures['held_out_loss_quantized']:.4f} nats a token; "
        f"{figures['held_out_loss_base']:.4f} of the base alone, "
        f"{figures['held_out_loss_before']:.4f} of the model in f32",
        highlight=False,
    )
    if "merge_kl" in figures:
        OUT.print(
            f"merging cost a KL of {figures['merge_kl']:.3g} nats a token: the loss was "
            f"{figures['held_out_loss_beside']:.4f} with adapters beside the base",
            highlight=False,
        )
    OUT.print(f"gammac compile {found.folder} -o ARTIFACT takes it on", highlight=False)
