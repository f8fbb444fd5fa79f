"""Rates of kernels for a core that is not at hand: `llvm-mca` on the loop that LLVM really made of them.

What it counts is the core's pipelines, with everything in the first cache: what memory takes stands beside it
in the cost model. A core that llvm-mca does not model can be analysed as its nearest relative.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.formats import IntegerFormat
from gammac.targets.target import Analysed
from gammac.targets.tvm.build import core_features
from gammac.targets.tvm.kernels import Isa, Kernel, Layout, decode_linear, lowering, prefill_linear
from gammac.targets.tvm.kernels.layout import PANEL

ITERATIONS: Final = 100
# a size like those of models; the loop over a panel's groups is the same for all
SIZE: Final = 2048
_LABEL: Final = re.compile(r"^(\.L\w+):")
_TARGET: Final = re.compile(r"\.L\w+")
# llvm-mca has no model of it on RISC-V, and it holds up nothing
_PREFETCH: Final = "prefetch."
_NO_CODE: Final = (".", "//", "#", "@", ";")


def find_mca(path: str = "") -> str:
    """llvm-mca: the one that is named, or the newest on the path. Raises CompileError without one."""
    names = [path] if path else ["llvm-mca", *(f"llvm-mca-{number}" for number in range(14, 30))]
    found = [place for name in names if (place := shutil.which(name))]
    if not found:
        raise CompileError(
            f"there is no {path or 'llvm-mca'} here", hint="apt-get install llvm, or give its path"
        )
    return max(found, key=_version_of)


def _version_of(mca: str) -> tuple[int, ...]:
    said = subprocess.run([mca, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", said)
    return tuple(map(int, match.groups())) if match else (0,)


def analyse(format_: IntegerFormat, isa: Isa, ghz: float, mca: str, core: str) -> Analysed:
    """The rates of a format's kernels with int8 inputs on one core at `ghz`, which `mca` models as `core`.

    Raises CompileError for a core that it doesn't model. The group is at most 64: its products are then one
    unrolled loop.
    """
    block = Layout(format_, SIZE, SIZE).block
    decode = _loop(decode_linear(format_, SIZE, SIZE, isa, integer=True), isa)
    prefill = _loop(prefill_linear(format_, SIZE, SIZE, isa, integer=True), isa)
    panels, tokens = isa.tile
    cycles = [count_cycles(loop, isa, mca, core) for loop in (decode, prefill)]
    version = ".".join(map(str, _version_of(mca)))
    return Analysed(
        format_.bits,
        format_.group,
        gweights=_rounded(block * PANEL * ghz / cycles[0]),
        gflops=_rounded(2 * block * PANEL * panels * tokens * ghz / cycles[1]),
        source=f"llvm-mca {version} as {core} at {ghz:g} GHz: {len(decode)} instructions, "
        f"{cycles[0]:g} cycles for {block * PANEL} weights of one token",
    )


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _loop(kernel: Kernel, isa: Isa) -> list[str]:
    return hot_loop(assembly_of(kernel, isa))


def assembly_of(kernel: Kernel, isa: Isa) -> str:
    """What LLVM makes of a kernel."""
    import tvm  # type: ignore[import-untyped]

    module = tvm.IRModule({kernel.name: kernel.func.with_attr("global_symbol", kernel.name)})
    with lowering():
        built: Any = tvm.compile(module, target=tvm.target.Target(isa.llvm_target()))
    return str(built.mod.inspect_source("asm"))


def hot_loop(assembly: str) -> list[str]:
    """The instructions of the longest loop that has no loop in it, its branch back included."""
    lines = assembly.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    spans = {
        (labels[name], i)
        for i, line in enumerate(lines)
        if line.startswith("\t") and not line.strip().startswith(_NO_CODE)
        for name in _TARGET.findall(line)
        if labels.get(name, i) < i
    }
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    bodies = [
        [text for line in lines[start : end + 1] if (text := _code(line))] for start, end in sorted(inner)
    ]
    return max(bodies, key=len)


def _code(line: str) -> str:
    text = line.strip()
    return "" if not line.startswith("\t") or text.startswith((*_NO_CODE, _PREFETCH)) else text


def count_cycles(loop: list[str], isa: Isa, mca: str, core: str) -> float:
    """Cycles of one turn of a loop in steady state. Raises CompileError for what llvm-mca can't model."""
    command = [mca, f"-mtriple={isa.code['triple']}", f"-mcpu={core}", f"-iterations={ITERATIONS}"]
    features = ",".join(f"+{name}" for name in sorted(core_features(isa)))
    done = subprocess.run(
        [*command, f"-mattr={features}"], input="\n".join(loop) + "\n", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if done.returncode != 0 or found is None:
        words = next((line for line in done.stderr.splitlines() if "error" in line), "it says nothing")
        raise CompileError(
            f"{Path(mca).name} can't analyse code for {core}: {words}",
            hint="name a core that it models, such as the nearest relative, with --core",
        )
    return int(found[1]) / ITERATIONS
