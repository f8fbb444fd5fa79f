"""The tree's promises: packaging, layers, file sizes, and a clean ruff."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = CONFIG["tool"]["setuptools"]["package-dir"]

# A file imports only what stands on its own line or above it.
LAYERS = [
    ["gammac"],
    ["gammac.diagnostics"],
    ["gammac.files", "gammac.processor", "gammac.adapter_file"],
    ["gammac.ir"],
    ["gammac.weights"],
    ["gammac.formats", "gammac.budget", "gammac.progress", "gammac.texts"],
    ["gammac.targets", "gammac.targets.target", "gammac.targets.padding", "gammac.targets.cost"],
    ["gammac.cache", "gammac.pipeline", "gammac.calibration", "gammac.trials", "gammac.target_rows"],
    ["gammac.passes"],
    ["gammac.targets.onnx", "gammac.targets.tvm"],
    ["gammac.models_zoo"],
    ["gammac.frontend"],
    ["gammac.runtime"],
    ["gammac.backends", "gammac.room"],
    ["gammac.closing_check", "gammac.notes", "gammac.trained_model"],
    ["gammac.driver", "gammac.summary"],
    [
        "gammac.dryrun",
        "gammac.evaluation",
        "gammac.explain",
        "gammac.calibrate",
        "gammac.model_costs",
        "gammac.peers",
    ],
    ["gammac.sparsify", "gammac.classification"],
    ["gammac.training", "gammac.lora_training"],
    ["gammac.sweep", "gammac.pareto"],
    ["gammac.sweep_report"],
    ["gammac.plots"],
    ["gammac.training_plots"],
    ["gammac.study"],
    ["gammac.tables"],
    ["gammac.cli", "gammac.__main__"],
]


def sources() -> dict[str, Path]:
    """Import name → file, for every module of the package."""
    found = {}
    for name, folder in sorted(FOLDERS.items()):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((name, *(p for p in parts if p != "__init__")))] = path
    return found


def layer_of(module: str) -> int:
    """The place of the longest prefix of `module` that LAYERS names."""
    best = max(
        ((len(prefix), level) for level, row in enumerate(LAYERS) for prefix in row
         if module == prefix or (module.startswith(prefix + ".") and prefix != "gammac")),
        default=(0, -1),
    )  # fmt: skip
    assert best[1] >= 0, f"{module} has no place in the layers: add it to LAYERS"
    return best[1]


def imports_of(path: Path) -> set[str]:
    """The gammac modules that a file imports, wherever in the file; type-only imports don't count."""
    tree = ast.parse(path.read_text())
    type_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gammac"):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("gammac")}
    return found


@pytest.mark.parametrize("module", sources())
def test_imports_point_down_the_layers(module: str) -> None:
    path = sources()[module]
    # the cache and the pipeline know each other: a cached step is still a step
    allowed = {"gammac.cache": {"gammac.pipeline"}}
    upward = {
        imported
        for imported in imports_of(path)
        if layer_of(imported) > layer_of(module) and imported not in allowed.get(module, set())
    }
    assert not upward, f"{module} imports {sorted(upward)}, which stand above it"


def test_every_package_on_disk_is_listed() -> None:
    listed = set(CONFIG["tool"]["setuptools"]["packages"])
    on_disk = {name for name, path in sources().items() if path.name == "__init__.py"}
    assert listed == on_disk


def test_no_folder_of_the_package_hides_another() -> None:
    for name in ("passes", "targets", "models_zoo"):
        assert not (ROOT / "compiler" / name).exists()


def test_files_stay_small() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources().values()
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long, f"split these: {long}"


def test_every_file_says_what_it_is_for() -> None:
    silent = [str(p) for p in sources().values() if ast.get_docstring(ast.parse(p.read_text())) is None]
    assert not silent


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_is_content(command: list[str]) -> None:
    folders = ["compiler", "passes", "targets", "models_zoo", "tests", "benchmarks"]
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *folders], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
