"""mypy --strict over every file, under the name that it is imported by.

The folders are not named like the packages, so mypy is handed (path, name) pairs rather than paths.
"""

import tomllib
from pathlib import Path

import mypy.build
import mypy.main
from mypy.modulefinder import BuildSource

ROOT = Path(__file__).resolve().parent.parent


def test_mypy_is_content() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    _, options = mypy.main.process_options(["--config-file", str(ROOT / "pyproject.toml"), "-c", ""])
    options.incremental = True
    options.cache_dir = str(ROOT / ".mypy_cache")
    pairs = []
    for name, folder in config["tool"]["setuptools"]["package-dir"].items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            module = ".".join((name, *(p for p in parts if p != "__init__")))
            pairs.append(BuildSource(str(path), module))
    result = mypy.build.build(pairs, options)
    assert not result.errors, "\n".join(result.errors)
