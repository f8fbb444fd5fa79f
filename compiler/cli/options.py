"""Options that compile and sweep share: what may be chosen, for which device, calibrated on what."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from gammac.driver import Request

Command = TypeVar("Command", bound=Callable[..., Any])


class LateHelp(click.Option):
    """Help that lists what imports torch: `late` makes it, only when help is asked for."""

    def __init__(self, *names: Any, late: Callable[[], str], **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.late = late

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """What `--help` prints."""
        self.help = self.late()
        return super().get_help_record(ctx)


def _quantizers() -> str:
    from gammac.formats import INTEGER
    from gammac.passes.quantizers import QUANTIZERS

    integer = [name for name, q in QUANTIZERS.items() if INTEGER in q.kinds]
    own = [name for name in QUANTIZERS if name not in integer]
    listed = f"For integers: {', '.join(integer)}; for formats of their own: {', '.join(own)}."
    return f"{listed} Options as in quip:greedy=9."


CALIBRATION_WINDOWS: Final = click.option(
    "--calibration-windows", type=click.IntRange(1), default=128, show_default=True
)
CALIBRATION_LENGTH: Final = click.option(
    "--calibration-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a window."
)
OPTIONS: Final = (
    click.option("--target", default="cpu", show_default=True, help="A target's name, or a .toml file."),
    click.option(
        "--formats",
        help="Formats that block linears may get, e.g. w2g64,w3g64,w4g64,w8g64; one alone is uniform.",
    ),
    click.option(
        "--table-formats", default="w4g64,w8g64", show_default=True, help="The same for embedding and head."
    ),
    click.option(
        "--group-size",
        default="64",
        show_default=True,
        help="Group size where --formats is not given: 32, 64, 96, 128, channel.",
    ),
    click.option("--symmetric", is_flag=True, help="No zero points, where --formats is not given."),
    click.option("--quantizer", cls=LateHelp, late=_quantizers, default="gptq", show_default=True),
    click.option(
        "--clip",
        type=click.Choice(["mse", "none"]),
        default="mse",
        show_default=True,
        help="How a group's range is chosen.",
    ),
    click.option(
        "--act-order/--no-act-order",
        default=True,
        show_default=True,
        help="gptq: columns by decreasing activation.",
    ),
    click.option(
        "--sparsity",
        type=click.Choice(["2:4", "auto", "n:8", "unstructured"]),
        help="2:4: of every four inputs of a block linear two weights stay; auto: dense and 2:4 formats "
        "compete; n:8, unstructured: several densities compete, on the target reference.",
    ),
    click.option(
        "--mask",
        help="Which weights stay: sparsegpt (default), wanda or magnitude; or 2:4 learnt block by block: "
        'sparseforge, ast, cast or maskllm, options as in "sparseforge{steps=400}". Weights that are 2:4 '
        "already, as gammac sparsify leaves them, keep their zeros.",
    ),
    click.option("--damping", default=0.01, show_default=True, help="gptq: share of the mean diagonal."),
    click.option(
        "--guided/--no-guided",
        default=False,
        show_default=True,
        help="gptq: a calibration token counts by how much the loss depends on it (a backward run more).",
    ),
    click.option(
        "--rotate/--no-rotate",
        default=False,
        show_default=True,
        help="Rotate the residual stream and the heads' values first: few weights stand out then.",
    ),
    click.option(
        "--incoherence",
        help="Turn each linear by random orthogonal matrices that the artifact multiplies by: kronecker, "
        "hadamard or none (default: kronecker with quip); options as in kronecker:rescale=on.",
    ),
    click.option(
        "--awq-scales/--no-awq-scales",
        default=None,
        help="Scale channels by what they carry, for the narrowest of the formats (default: with awq).",
    ),
    click.option(
        "--tie/--no-tie",
        default=None,
        help="One format for linears that the target fuses (default: as the target says).",
    ),
    click.option(
        "--refine/--no-refine",
        default=None,
        help="Check the allocation end to end and improve it (default: for the strategy gamma).",
    ),
    click.option(
        "--calibration",
        type=click.Path(path_type=Path),
        help="Calibration text (default: the one that gammac ships).",
    ),
    CALIBRATION_WINDOWS,
    CALIBRATION_LENGTH,
    click.option(
        "--cache",
        type=click.Path(path_type=Path),
        help="Where finished work is kept (default: the user's cache).",
    ),
    click.option(
        "--backend",
        type=click.Choice(["onnx", "tvm"]),
        default=None,
        help="What runs the artifact: ONNX Runtime, or code compiled by TVM (default: the target's).",
    ),
    click.option("--portable", is_flag=True, help="Only stock kernels: no native library in the artifact."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
)


# fields of a request that only some commands let choose, and what stands for no choice
OPTIONAL: Final[Mapping[str, Any]] = {
    "backend": "", "context": 0, "product_inputs": "", "static_library": False,
}  # fmt: skip


def shared_options(command: Command) -> Command:
    """Adds OPTIONS to a command, in their order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def request_of(options: Mapping[str, Any], budget: str, seed: int, **chosen: Any) -> "Request":
    """What a user asks for; `chosen` are fields of Choices that only one command lets choose."""
    from gammac.driver import Request
    from gammac.passes import Choices
    from gammac.passes.choices import with_sparsity
    from gammac.passes.quantize_activations import parse_activations

    group = options["group_size"] if options["group_size"] == "channel" else f"g{options['group_size']}"
    suffix = "-sym" if options["symmetric"] else ""
    every = ",".join(f"w{bits}{group}{suffix}" for bits in (2, 3, 4, 8))
    activations = chosen.get("activations")
    block = options["formats"] or (parse_activations(activations).weights if activations else every)
    if options["sparsity"]:
        block = with_sparsity("+".join(block.split(",")), options["sparsity"])
    same = ("quantizer", "clip", "act_order", "damping", "tie", "refine", "rotate", "guided", "awq_scales",
            "incoherence")  # fmt: skip
    choices = Choices(
        "+".join(block.split(",")),
        "+".join(options["table_formats"].split(",")),
        **{k: options[k] for k in same} | _masked(options, block),
        **chosen,
    )
    chosen_too = {k: options[k] or empty for k, empty in OPTIONAL.items() if k in options}
    taken = ("model", "target", "calibration", "calibration_windows", "calibration_length", "portable",
             "trust_remote_code")  # fmt: skip
    return Request(
        budget=budget, seed=seed, choices=choices, **chosen_too, **{k: options[k] for k in taken}
    )  # fmt: skip


def _masked(options: Mapping[str, Any], block: str) -> dict[str, str]:
    """The quantizer with the mask that the user chose, or the method that learns it. Raises CompileError for
    an unknown one, and where nothing is masked."""
    from gammac.diagnostics import CompileError
    from gammac.formats import parse_formats
    from gammac.passes.sparsifiers import SPARSIFIERS
    from gammac.passes.sparsify import TRAINED_MASKS

    if not options["mask"]:
        return {}
    if all(f.density == 1 for f in parse_formats(block)):
        raise CompileError("--mask says which weights stay in sparse formats", hint="--sparsity 2:4 or auto")
    name = options["mask"].partition("{")[0]
    if name in TRAINED_MASKS:
        return {"mask": options["mask"]}
    if name != options["mask"] or name not in SPARSIFIERS:
        raise CompileError(
            f"no mask {options['mask']!r}", hint=f"there are {', '.join((*SPARSIFIERS, *TRAINED_MASKS))}"
        )
    return {"quantizer": f"{options['quantizer']}:mask={name}"}
