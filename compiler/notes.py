"""What became of a user's wishes: weights that stay floats, other group sizes, formats that nothing runs."""

from collections.abc import Iterator
from typing import Final

from gammac.formats import parse_format, parse_formats
from gammac.ir import Module, Weight
from gammac.passes import Choices
from gammac.targets.onnx.emit import emitted_function
from gammac.targets.target import BLOCK, Target

ADAPTER: Final = "of a low-rank adapter"
INCOHERENCE: Final = "a factor of incoherence"
NO_ROLE: Final = "neither a block's linear, nor the token embedding, nor the head"


def not_quantized(module: Module) -> Iterator[tuple[str, str]]:
    """Weights of two dimensions that stay floats, and why."""
    for name, weight in module.weights.items():
        if weight.type.rank == 2 and "stored" not in weight.attrs:
            served = ADAPTER if "adapter" in weight.attrs else INCOHERENCE
            yield name, served if "serves" in weight.attrs else NO_ROLE


def fallbacks(choices: Choices, module: Module) -> Iterator[tuple[str, str]]:
    """Weights whose group size is not one that was asked for, and why."""
    if choices.trained:
        return  # its formats are those that were asked for
    for name, weight in module.weights.items():
        stored = weight.attrs.get("stored")
        wished = parse_formats(choices.block if weight.attrs.get("role") == BLOCK else choices.table)
        if stored is not None and stored not in {f.name for f in wished}:
            found = parse_format(str(stored))
            asked = [f.name for f in wished if f.with_group(found.group) == found]
            yield name, f"{' or '.join(asked)} does not fit {_columns(weight)} inputs: {stored}"


def never_run(choices: Choices, target: Target, module: Module, *, compiler: bool) -> Iterator[str]:
    """The formats that a user listed for blocks and that no weight could have."""
    if choices.block == Choices().block or choices.trained:
        return
    widths = {_columns(w) for w in module.weights.values() if w.attrs.get("role") == BLOCK}
    for format_ in parse_formats(choices.block):
        if not any(target.fit(format_, BLOCK, columns, compiler=compiler) for columns in widths):
            yield format_.name


def notes_on(choices: Choices, target: Target, module: Module, *, compiler: bool) -> Iterator[str]:
    """What a user should know of a module as it was emitted, and might not expect."""
    adapters = sum("adapter" in w.attrs for w in module.weights.values())
    if adapters:
        yield f"adapters stay f32, in {adapters} weights"
    left = [name for name, why in not_quantized(module) if why != ADAPTER]
    if left:
        yield f"{len(left)} weights stay f32: {', '.join(left)}"
    trained = {str(w.attrs["trained_as"]) for w in module.weights.values() if "trained_as" in w.attrs}
    if trained:
        yield f"{', '.join(sorted(trained))} is stored with f16 scales: {target.emitter} reads no others"
    changed = list(fallbacks(choices, module))
    if changed:
        yield f"{len(changed)} weights got another group size: {changed[0][0]}: {changed[0][1]}"
    unused = list(never_run(choices, target, module, compiler=compiler))
    if unused:
        yield f"{target.name} ({target.emitter}) runs {', '.join(unused)} on none of the weights"
    rounded = {op.attrs["bits"] for op in emitted_function(module).ops if op.name == "fake_quantize"}
    if rounded:
        yield f"linears of blocks read activations of {', '.join(sorted(map(str, rounded)))} bits"
    if not compiler and not choices.trained:
        yield "no C++ compiler: rows are split between 2, 4 and 8 bits; with one, every width has a kernel"


def _columns(weight: Weight) -> int:
    return int(str(weight.type.shape[-1]))
