"""One scoring run, several targets: each gets its own allocation, and inspect says why."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from gammac.cli import main
from gammac.explain import explain, on_device
from gammac.formats import parse_format
from gammac.ir import Module, parse, to_text
from gammac.passes.allocate import Allocate
from gammac.pipeline import Context, Pipeline
from gammac.targets import cost
from gammac.targets.target import Target, load_target

HOST, PI = load_target("cpu-x86-avx512", "tvm"), load_target("edge")
FORMATS = ("w2g64", "w3g64", "w4g64", "w8g64")
LAYERS = 8


def scored() -> Module:
    """A chain of linears; what a bit is worth differs from one to the next."""
    weights, ops = [], []
    for i in range(LAYERS):
        scores = ", ".join(f"{f} = {(1 + i) ** 2 * 4.0 ** -parse_format(f).bits:.6g}" for f in FORMATS)
        weights.append(
            f'  weight @l{i} : f32[2048,2048] = sha256:{i}a {{role = "block", scores = {{{scores}}}}}'
        )
        ops.append(f"    %{i + 1} = linear %{i if i else 'x'}, @l{i} : f32[batch,seq,2048]")
    return parse("\n".join([
        "module @chain {", *weights, "  func @decode(%x: f32[batch,seq,2048]) {", *ops,
        f"    return y = %{LAYERS}", "  }", "}",
    ]))  # fmt: skip


def seconds(target: Target, format_: str) -> float:
    return cost.linear_seconds(2048, 2048, parse_format(format_), target)


def allocated(target: Target) -> Module:
    """Half way in time between two bits and four bits everywhere."""
    call = LAYERS * (seconds(target, "w2g64") + seconds(target, "w4g64")) / 2
    return Pipeline((Allocate(budget=f"{1e6 * call:.3f}us/token", tie=False),)).run(scored(), Context(target))


def formats(module: Module) -> list[str]:
    return [str(w.attrs["format"]) for w in module.weights.values()]


def test_each_target_gets_its_own_allocation() -> None:
    host, pi = formats(allocated(HOST)), formats(allocated(PI))
    assert host != pi
    # three bits are unpacked from two planes: on the PC that takes longer than four bits, which its memory
    # delivers in time; on the board reading is what takes long
    assert seconds(HOST, "w3g64") > seconds(HOST, "w4g64") and "w3g64" not in host
    assert seconds(PI, "w3g64") < seconds(PI, "w4g64") and "w3g64" in pi


@pytest.mark.parametrize(("target", "why"), [(HOST, "unpacking its weights"), (PI, "reading its bytes")])
def test_the_reason_is_told(target: Target, why: str) -> None:
    module = scored()
    module = module.with_weights(*(w.with_attrs(format="w3g64") for w in module.weights.values()))
    lines = list(on_device(explain(module, module.weights["l0"], target), target))
    assert lines[0].startswith(f"on {target.name}: ") and why in lines[0]
    slower = [line for line in lines[1:] if "w4g64" in line and "would take no longer there" in line]
    assert bool(slower) == (target is HOST)


def test_inspect_tells_it(tmp_path: Path) -> None:
    path = tmp_path / "allocated.gir"
    path.write_text(to_text(allocated(PI)))
    said = CliRunner().invoke(main, ["inspect", str(path), "--target", "edge", "--weight", "l0"])
    assert said.exit_code == 0, said.output
    assert "on edge-aarch64-rpi5: " in said.output and "µs a token" in said.output
