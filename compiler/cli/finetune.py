"""`gammac finetune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gammac.cli.console import ERR, OUT, show_progress
from gammac.cli.drawing import draw_history
from gammac.cli.lora import OWN, demand_own, lora_options, run_lora

if TYPE_CHECKING:
    from gammac.training import Finetuned


@click.command("finetune")
@click.argument("model")
@click.option(
    "--method", type=click.Choice(["dsa-qat", "qlora", "ir-qlora"]), default="dsa-qat", show_default=True
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The trained folder.")
@click.option(
    "--task",
    type=click.Choice(["next-token", "classification"]),
    default="next-token",
    show_default=True,
    help="classification: of labelled texts, a head is added.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="To train on (default: the text that gammac ships); classification: rows "
    '{"text": …, "label": …} of a .jsonl file.',
)
@click.option("--tokens", type=click.IntRange(1), default=1_000_000, show_default=True, help="In all.")
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens in a window.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Windows in a step.")
@click.option("--rate", type=float, default=3e-4, show_default=True, help="AdamW's largest rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--average-bits", type=float, default=4.0, show_default=True, help="Budget in payload bits.")
@click.option(
    "--formats",
    default="w2g64,w3g64,w4g64,w6g64,w8g64",
    show_default=True,
    help="Formats that block linears may get; one alone is uniform training. lora: one, the base's "
    "(default: nf4g64-dq, nf4g64-icq).",
)
@click.option("--table-format", default="w8g64", show_default=True, help="Of embedding and head.")
@click.option(
    "--activations",
    default="",
    help="Round what linears read, too: a8, a8tensor, …; weights: as many bits as the weight has.",
)
@click.option(
    "--controller",
    type=click.Choice(["bisection", "milp"]),
    default="bisection",
    show_default=True,
    help="How widths are chosen within the budget.",
)
@click.option(
    "--cost",
    type=click.Choice(["bits", "seconds", "bytes"]),
    default="bits",
    show_default=True,
    help="What a width costs besides, on the target.",
)
@click.option("--trade-off", type=float, default=0.0, help="A first λ, which then follows the loss.")
@click.option("--every", type=click.IntRange(1), default=50, show_default=True, help="Steps between looks.")
@click.option("--gamma", type=float, default=0.0, show_default=True, help="Weight of the noise penalty.")
@click.option(
    "--float-share",
    type=click.FloatRange(0, 0.99),
    default=0.0,
    show_default=True,
    help="Of the steps, before anything is rounded.",
)
@click.option(
    "--start",
    type=click.Choice(["rtn", "gptq"]),
    default="rtn",
    show_default=True,
    help="Codes that rounding starts from.",
)
@click.option("--clip", type=click.Choice(["mse", "none"]), default="mse", show_default=True)
@click.option("--target", default="cpu", show_default=True, help="A target's name, or a .toml file.")
@click.option("--backend", type=click.Choice(["onnx", "tvm"]), default=None)
@click.option(
    "--save-every", type=click.IntRange(1), default=50, show_default=True, help="Steps a checkpoint."
)
@click.option("--cache", type=click.Path(path_type=Path), help="Where checkpoints are kept.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@lora_options
def finetune_command(**options: Any) -> None:
    """Train MODEL with its quantization in the loop; `gammac compile OUT` makes the artifact of it.

    A killed run goes on from its last checkpoint when it is started again in the same way.
    """
    from gammac.passes.training.options import DsaQatOptions
    from gammac.passes.training.trainer import Schedule
    from gammac.runtime.staging import check_writable
    from gammac.training import TrainRequest, finetune, make_training

    if options["method"] != "dsa-qat":
        lora = run_lora(options)
        draw_history(lora.history, lora.folder)
        return
    demand_own("dsa-qat", OWN)
    check_writable(options["out"], overwrite=False)
    own = (
        "average_bits", "activations", "clip", "controller", "cost", "trade_off", "every", "gamma",
        "float_share", "start",
    )  # fmt: skip
    method = DsaQatOptions(
        formats="+".join(options["formats"].split(",")), table=options["table_format"],
        **{name: options[name] for name in own},
    )  # fmt: skip
    timed = ("tokens", "batch", "rate", "seed", "save_every")
    request = TrainRequest(
        options["model"], method, Schedule(**{name: options[name] for name in timed}), options["text"],
        options["length"], options["target"], options["backend"] or "", options["trust_remote_code"],
        options["task"],
    )  # fmt: skip
    with ERR.status("capturing the model"):
        training = make_training(request, options["cache"])
    found = finetune(training, options["out"], show_progress)
    draw_history(found.history, found.folder)
    _print(found)


def _print(found: "Finetuned") -> None:
    from collections import Counter

    figures = found.trained.figures
    OUT.print(f"{found.trained.method}: {figures['tokens']} tokens → {found.folder}", highlight=False)
    counts = sorted(Counter(found.trained.formats.values()).items())
    widths = ", ".join(f"{count} × {name}" for name, count in counts)
    OUT.print(f"{figures['average_bits']:.4g} payload bits; weights: {widths}", highlight=False)
    if "held_out_accuracy" in figures:
        names = ("accuracy", "precision", "recall", "f1")
        scores = ", ".join(f"{name} {figures[f'held_out_{name}']:.4f}" for name in names)
        OUT.print(f"{figures['held_out_examples']} held-out rows: {scores}", highlight=False)
    OUT.print(
        f"held-out loss {figures['held_out_loss_quantized']:.4f} nats, quantized; "
        f"{figures['held_out_loss_before']:.4f} before, in f32",
        highlight=False,
    )
    OUT.print(f"gammac compile {found.folder} -o ARTIFACT takes it on", highlight=False)
