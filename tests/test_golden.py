"""Golden IR: each file of tests/ir is passes, a module, and what becomes of it (or the errors).

    // passes: keep_precision
    module @m { … }
    // ---- becomes
    module @m { … }

`pytest --update-golden` rewrites the second half; the change is reviewed like code. A file with
`// passes:` alone (no names) goes through the parser and the verifier.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.ir import Module, parse, to_text, verify
from gammac.passes import PASSES
from gammac.passes.options import parse_passes
from gammac.pipeline import Context, Pipeline
from gammac.targets.target import load_target
from gammac.weights import WeightStore

FOLDER = Path(__file__).parent / "ir"
BECOMES = "// ---- becomes\n"


class Zeros(WeightStore):
    """The digests of a golden file stand for zeros, those of vectors for ones."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        weights = {w.digest: w for w in module.weights.values()}
        self.made = {d: torch.full(w.type.shape, float(w.type.rank == 1)) for d, w in weights.items()}

    def get(self, digest: str) -> dict[str, Tensor]:
        return {"data": self.made[digest]} if digest in self.made else super().get(digest)


def result_of(header: str, body: str, name: str) -> str:
    """The module behind the passes, or the errors."""
    try:
        module = parse(body, name)
        errors = verify(module)
        if errors:
            return "".join(f"// {line}\n" for d in errors for line in str(d).splitlines())
        passes = parse_passes(header.removeprefix("// passes:").strip(), PASSES)
        return to_text(Pipeline(passes).run(module, Context(load_target("cpu-x86"), Zeros(module))))
    except CompileError as error:
        return "".join(f"// {line}\n" for line in str(error).splitlines())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.gir")), ids=lambda p: p.stem)
def test_golden(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text()
    header, _, rest = text.partition("\n")
    assert header.startswith("// passes:"), f"{path.name} starts with // passes: …"
    body, _, expected = rest.partition(BECOMES)
    # the body keeps its line numbers: errors name them
    found = result_of(header, "\n" + body, path.name)
    if request.config.getoption("--update-golden"):
        path.write_text(f"{header}\n{body}{BECOMES}{found}")
    assert found == expected or request.config.getoption("--update-golden")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.gir")), ids=lambda p: p.stem)
def test_golden_round_trip(path: Path) -> None:
    expected = path.read_text().partition(BECOMES)[2]
    if expected.startswith("module"):
        assert to_text(parse(expected, path.name)) == expected
