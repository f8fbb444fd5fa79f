"""`gammac sparsify`."""

from pathlib import Path
from typing import Any

import click

from gammac.cli.console import OUT, show_progress
from gammac.cli.drawing import draw_history


@click.command("sparsify")
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The checkpoint's folder.")
@click.option(
    "--method",
    type=click.Choice(["sparseforge", "ast", "cast", "maskllm", "dense"]),
    default="sparseforge",
    show_default=True,
    help="How masks are found; dense prunes nothing and is tuned on the same tokens.",
)
@click.option("--tokens", type=click.IntRange(1), default=1_000_000, show_default=True)
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens in a window.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Windows in a step.")
@click.option("--rate", default=1e-4, show_default=True, help="Adam's first step, falling to a tenth.")
@click.option(
    "--score",
    type=click.Choice(["hessian_obd", "hessian_ratio", "fisher", "magnitude"]),
    help="sparseforge: what ranks weights (default: hessian_obd).",
)
@click.option(
    "--hardening/--no-hardening", default=None, help="sparseforge: pull masks to 2:4 (default: yes)."
)
@click.option("--distill/--no-distill", default=True, show_default=True, help="KL to the dense model, too.")
@click.option(
    "--bypass",
    type=click.IntRange(0),
    default=0,
    help="A low-rank way around each mask, at first a sum of so many inputs (such as 64; default: none).",
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="What is trained on (default: the calibration text)."
)
@click.option("--seed", default=0, show_default=True)
def sparsify_command(**options: Any) -> None:
    """Train MODEL so that of every four inputs of a block linear two weights are zero.

    The result is a checkpoint: `gammac compile OUT --sparsity 2:4` keeps its zeros. A killed run goes on from
    its last checkpoint when the same command is given again.
    """
    from gammac.sparsify.run import SparsifyRequest, perplexity, sparsify

    out = options.pop("out")
    own = {k: v for k in ("score", "hardening") if (v := options.pop(k)) is not None}
    trainer = sparsify(SparsifyRequest(**options, options=own), out, show_progress)
    draw_history(trainer.rows, out)
    found = trainer.report
    lines = [
        f"{options['model']} → {out}: {len(trainer.sparse)} weights 2:4 in {trainer.steps} steps",
        f"perplexity on text set apart: {perplexity(found['before']):.2f} before, "
        f"{perplexity(found['after']):.2f} behind",
    ]
    if trainer.sparse:
        change = found["behind_final_mask"] / found["before_final_mask"] - 1
        lines.append(f"the final mask changed the loss by {100 * change:+.2f} %")
        lines.append(f"next: gammac compile {out} --sparsity 2:4 --backend tvm -o DIR")
    for line in lines:
        OUT.print(line, highlight=False, markup=False, soft_wrap=True)
