"""`gammac compile`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from gammac.cli.console import ERR, OUT, show_progress
from gammac.cli.limits import limit_options, limits_of
from gammac.cli.options import LateHelp, request_of, shared_options

if TYPE_CHECKING:
    from gammac.driver import Compiled, Plan
    from gammac.pipeline import Step


# fields of Choices that sweep does not let choose
CHOSEN: Final = (
    "strategy", "inputs", "learn_rounding", "learn_by", "distill", "smooth_quant", "smooth_alpha",
    "activations", "adapters", "objective",
)  # fmt: skip
BUDGET: Final = "3"


def _strategies() -> str:
    from gammac.passes.sensitivity import STRATEGIES

    return f'How modules are scored: {", ".join(STRATEGIES)}; options as in "fisher{{windows=32}}".'


WHAT_CODES_ARE: Final = ("formats", "group_size", "symmetric", "quantizer", "activations", "sparsity")


@click.command("compile")
@click.argument("model")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    help="3 (payload bits; the default), 3bpw (true bits), 80MB, 12ms/token; several hold together.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="The artifact's folder; only --dry-run needs none."
)
@click.option(
    "--recipe",
    type=click.Choice(["fast", "balanced", "best"]),
    help="Options that go well together: fast (fisher), balanced (gamma, the defaults), best (rotated "
    "trellis codes, allocated by fisher, where TVM runs them; else gamma on guided Gram matrices and "
    "learned rounding; then distillation). What you choose yourself holds.",
)
@click.option("--strategy", cls=LateHelp, late=_strategies, default="gamma", show_default=True)
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
    "--learn-by",
    type=click.Choice(["sign", "gumbel"]),
    default="sign",
    show_default=True,
    help="How codes are learnt: signs of gradients straight through the rounding, or mixtures of "
    "neighbouring codes that grow sharp.",
)
@click.option(
    "--distill/--no-distill",
    default=False,
    show_default=True,
    help="Then learn scales and norms end to end from full precision's predictions.",
)
@click.option(
    "--smooth-quant/--no-smooth-quant",
    default=False,
    show_default=True,
    help="Hand the outliers of activations over to the weights, for --activations.",
)
@click.option("--smooth-alpha", default=0.85, show_default=True, help="How much of them: 0 to 1.")
@click.option(
    "--activations",
    default="",
    help="Round what linears read: a8 (a step a token) or a8tensor (one step), 2 to 8 bits. Weights get as "
    "many, one scale a row, unless --formats or --budget says otherwise.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="The longest sequence, in tokens (default: the model's; with TVM at most 2048).",
)
@click.option(
    "--product-inputs",
    type=click.Choice(["int8", "float"]),
    help="tvm: what products with quantized weights take (default: int8).",
)
@click.option(
    "--static-library",
    is_flag=True,
    help="tvm: write libmodel.a and gammac_model.h as well, for C programs that need nothing of TVM.",
)
@limit_options
@shared_options
@click.option(
    "--adapters",
    default="",
    metavar="FILE",
    help="MODEL is a folder of gammac finetune --method qlora: these of the same base, not its own.",
)
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

    if options["out"]:
        check_writable(options["out"], not options["keep_existing"])
    elif not options["dry_run"]:
        raise click.MissingParameter(param=next(p for p in compile_command.params if p.name == "out"))
    _follow_recipe(options)
    chosen = {name: options[name] for name in CHOSEN}
    budget = "+".join((*options["budgets"], *limits_of(options))) or _default_budget(options)
    request = request_of(options, budget, options["seed"], **chosen)
    with ERR.status("capturing the model"):
        plan = make_plan(request, options["cache"])
    if options["dry_run"]:
        from gammac.dryrun import estimate

        OUT.print(tables.estimate(plan, estimate(plan)))
        return
    if options["recipe"]:
        OUT.print(f"recipe {options['recipe']}: {_expected_time(plan)}", highlight=False)
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


def _expected_time(plan: "Plan") -> str:
    from gammac import tables
    from gammac.dryrun import NoEstimate, estimate

    try:
        return tables.expected_time(estimate(plan))
    except NoEstimate:
        return "what it takes is not known beforehand"


def _follow_recipe(options: dict[str, Any]) -> None:
    """Set what the recipe says where the user said nothing."""
    from gammac.passes.recipes import recipe
    from gammac.targets.target import BLOCK, load_target

    if not options["recipe"]:
        return
    source = click.get_current_context().get_parameter_source
    left_open = {name for name in options if source(name) == click.core.ParameterSource.DEFAULT}
    target = load_target(options["target"], options["backend"] or None)
    kinds = target.kinds(BLOCK, compiler=True) if left_open.issuperset(WHAT_CODES_ARE) else ()
    for name, value in recipe(options["recipe"], kinds).items():
        if name in left_open:
            options[name] = value


def _default_budget(options: dict[str, Any]) -> str:
    """As trained, for a trained folder; as many bits as activations have, where formats follow from them."""
    from gammac.passes.quantize_activations import parse_activations
    from gammac.passes.training.trained import is_trained, read_trained

    if is_trained(Path(options["model"])):
        return read_trained(Path(options["model"])).budget
    if options["formats"] or not options["activations"]:
        return BUDGET
    return str(parse_activations(options["activations"]).bits)


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
