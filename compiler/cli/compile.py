"""`gammac compile`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gammac.cli.console import ERR, OUT, show_progress
from gammac.cli.options import request_of, shared_options

if TYPE_CHECKING:
    from gammac.driver import Compiled, Plan
    from gammac.pipeline import Step


class StrategyOption(click.Option):
    """Its help lists the strategies, which import torch: they are read only when help is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """What `--help` prints."""
        from gammac.passes.sensitivity import STRATEGIES

        self.help = f'How modules are scored: {", ".join(STRATEGIES)}; options as in "fisher{{windows=32}}".'
        return super().get_help_record(ctx)


@click.command("compile")
@click.argument("model")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    default=("3",),
    show_default=True,
    help="3 (payload bits), 3bpw (true bits), 80MB, 12ms/token; several hold together.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The artifact's folder.")
@click.option("--strategy", cls=StrategyOption, default="gamma", show_default=True)
@click.option(
    "--inputs",
    type=click.Choice(["full", "quantized"]),
    default="full",
    show_default=True,
    help="gptq: calibrate on the full-precision or on the already quantized model.",
)
@click.option(
    "--learn-rounding/--no-learn-rounding",
    default=False,
    show_default=True,
    help="Learn codes and scales block by block behind the allocation: minutes, and worth them at few bits.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="The longest sequence, in tokens (default: the model's; with TVM at most 2048).",
)
@click.option(
    "--activations",
    type=click.Choice(["int8", "float"]),
    help="tvm: what products with quantized weights take (default: int8 where there are dot products).",
)
@shared_options
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write a numbered .gir after each pass."
)
@click.option("--dry-run", is_flag=True, help="Tell size, bits, latency, memory and time; do nothing.")
@click.option("--timings", is_flag=True, help="Print what each pass took.")
@click.option("--keep-existing", is_flag=True, help="Refuse to replace an artifact that is there.")
def compile_command(**options: Any) -> None:
    """Compile MODEL: a zoo name, a transformers folder, a .gguf file or a hub name."""  # fmt: skip
    from gammac import tables
    from gammac.driver import compile_model, make_plan
    from gammac.runtime.staging import check_writable

    check_writable(options["out"], not options["keep_existing"])
    chosen = {name: options[name] for name in ("strategy", "inputs", "learn_rounding")}
    request = request_of(options, "+".join(options["budgets"]), options["seed"], **chosen)
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
