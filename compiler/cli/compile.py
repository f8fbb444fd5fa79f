"""`gammac compile`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gammac.cli.console import ERR, OUT, show_progress

if TYPE_CHECKING:
    from gammac.driver import Compiled, Plan, Request
    from gammac.pipeline import Step


@click.command("compile")
@click.argument("model")
@click.option("--target", default="cpu", show_default=True, help="A target's name, or a .toml file.")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    default=("3",),
    show_default=True,
    help="3 (payload bits), 3bpw (true bits), 80MB, 12ms/token; several hold together.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The artifact's folder.")
@click.option(
    "--formats",
    help="Formats that block linears may get, e.g. w2g64,w3g64,w4g64,w8g64; one alone is uniform.",
)
@click.option(
    "--table-formats", default="w4g64,w8g64", show_default=True, help="The same for embedding and head."
)
@click.option(
    "--group-size",
    default="64",
    show_default=True,
    help="Group size where --formats is not given: 32, 64, 96, 128, channel.",
)
@click.option("--symmetric", is_flag=True, help="No zero points, where --formats is not given.")
@click.option("--quantizer", default="gptq", show_default=True, help="gptq or rtn.")
@click.option(
    "--clip",
    type=click.Choice(["mse", "none"]),
    default="mse",
    show_default=True,
    help="How a group's range is chosen.",
)
@click.option(
    "--act-order/--no-act-order",
    default=True,
    show_default=True,
    help="gptq: columns by decreasing activation.",
)
@click.option("--damping", default=0.01, show_default=True, help="gptq: share of the mean diagonal.")
@click.option(
    "--inputs",
    type=click.Choice(["full", "quantized"]),
    default="full",
    show_default=True,
    help="gptq: calibrate on the full-precision or on the already quantized model.",
)
@click.option(
    "--strategy", default="fisher", show_default=True, help="How modules are scored: fisher, weight_mse."
)
@click.option(
    "--tie/--no-tie",
    default=None,
    help="One format for linears that the target fuses (default: as the target says).",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Calibration text (default: the one that gammac ships).",
)
@click.option("--calibration-windows", default=128, show_default=True)
@click.option("--calibration-length", default=512, show_default=True, help="Tokens in a window.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write a numbered .gir after each pass."
)
@click.option("--dry-run", is_flag=True, help="Tell size, bits, latency, memory and time; do nothing.")
@click.option("--timings", is_flag=True, help="Print what each pass took.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Where finished work is kept (default: the user's cache).",
)
@click.option("--keep-existing", is_flag=True, help="Refuse to replace an artifact that is there.")
@click.option("--portable", is_flag=True, help="Only stock kernels: no native library in the artifact.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def compile_command(**options: Any) -> None:
    """Compile MODEL: a zoo name, a transformers folder, a .gguf file or a hub name."""  # fmt: skip
    from gammac import tables
    from gammac.driver import compile_model, make_plan
    from gammac.runtime.staging import check_writable

    check_writable(options["out"], not options["keep_existing"])
    request = _request(options)
    with ERR.status("capturing the model"):
        plan = make_plan(request, options["cache"])
    if options["dry_run"]:
        from gammac.dryrun import estimate

        OUT.print(tables.estimate(plan, estimate(plan)))
        return
    observers = [_dumper(options["dump_ir"])] if options["dump_ir"] else []
    compiled = compile_model(
        plan,
        options["out"],
        overwrite=not options["keep_existing"],
        progress=show_progress,
        observers=observers,
    )
    if options["timings"]:
        OUT.print(tables.timings(compiled.steps))
    _print_compiled(plan, compiled)


def _request(options: dict[str, Any]) -> "Request":
    from gammac.driver import Request
    from gammac.passes import Choices

    group = options["group_size"] if options["group_size"] == "channel" else f"g{options['group_size']}"
    suffix = "-sym" if options["symmetric"] else ""
    block = options["formats"] or ",".join(f"w{bits}{group}{suffix}" for bits in (2, 3, 4, 8))
    same = ("quantizer", "clip", "act_order", "damping", "inputs", "strategy", "tie")
    choices = Choices(
        "+".join(block.split(",")),
        "+".join(options["table_formats"].split(",")),
        **{k: options[k] for k in same},
    )
    taken = ("model", "target", "calibration", "calibration_windows", "calibration_length", "seed",
             "portable", "trust_remote_code")  # fmt: skip
    return Request(budget="+".join(options["budgets"]), choices=choices, **{k: options[k] for k in taken})


def _dumper(folder: Path) -> Any:
    from gammac.files import write_atomically
    from gammac.ir import to_text

    def dump(step: "Step") -> None:
        write_atomically(folder / f"{step.index:02}-{step.pass_.name}.gir", to_text(step.after).encode())

    return dump


def _print_compiled(plan: "Plan", compiled: "Compiled") -> None:
    from gammac import tables
    from gammac.summary import by_projection

    title = f"{compiled.manifest.model} → {compiled.folder}"
    OUT.print(tables.weights(title, by_projection(compiled.module, plan.target)))
    for line in tables.closing_lines(compiled):
        OUT.print(line, highlight=False, markup=False, soft_wrap=True)
