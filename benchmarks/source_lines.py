"""A classification task from texts that every installation of gammac has: which language a line is in.

    python   code of the standard library, without comments and docstrings
    english  docstrings of the standard library
    c++      the headers that torch ships

Files are divided before lines are: no line of the test comes from a file that was trained on. The rows depend
on the versions of Python and torch, and on nothing else.

Run: python benchmarks/source_lines.py FOLDER [--rows 600] (rows a class; writes train.jsonl and test.jsonl)
"""

import argparse
import ast
import json
import sysconfig
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Final

import torch

APART: Final = 5  # every so manieth file is for the test
A_FILE: Final = 12  # lines at most, so that many files count
LEAST, MOST = 24, 100  # characters


def python_lines(path: Path) -> Iterator[str]:
    """Lines of code."""
    text = path.read_text(encoding="utf-8")
    prose = {line for node in docstrings(text) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    for number, line in enumerate(text.splitlines(), 1):
        if number not in prose and "#" not in line:
            yield line


def docstrings(text: str) -> Iterator[ast.Expr]:
    """Every string that stands as a statement."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node


def english_lines(path: Path) -> Iterator[str]:
    """Lines of docstrings that are sentences rather than examples or signatures."""
    for node in docstrings(path.read_text(encoding="utf-8")):
        value = node.value.value if isinstance(node.value, ast.Constant) else None
        for line in value.splitlines() if isinstance(value, str) else ():
            if len(line.split()) >= 5 and not set(line) & set("=<>()[]{}_\\|`*"):
                yield line


def cpp_lines(path: Path) -> Iterator[str]:
    """Lines of a header that are neither comments nor part of the preprocessor's."""
    for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
        if not line.strip().startswith(("//", "*", "/*", "#")) and not line.endswith("\\"):
            yield line


def files_of(label: str) -> list[Path]:
    """Where a class's lines come from, in a fixed order."""
    if label == "c++":
        return sorted((Path(torch.__file__).parent / "include" / "ATen").glob("*.h"))
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


READERS: Final = {"c++": cpp_lines, "english": english_lines, "python": python_lines}


def rows_of(label: str, files: Sequence[Path], count: int, seen: Set[str]) -> list[dict[str, str]]:
    """The first `count` lines of a class, no more than A_FILE from one file, none twice and none that was
    seen before."""
    found: dict[str, None] = {}
    for path in files:
        lines = dict.fromkeys(line.strip() for line in READERS[label](path))
        fitting = [x for x in lines if LEAST <= len(x) <= MOST and x not in found and x not in seen]
        found |= dict.fromkeys(fitting[:: max(1, len(fitting) // A_FILE)][:A_FILE])
    return [{"text": text, "label": label} for text in list(found)[:count]]


def write(folder: Path, rows: int) -> tuple[Path, Path]:
    """train.jsonl with so many rows a class, test.jsonl with a quarter; the classes take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "test.jsonl"
    seen: set[str] = set()
    for path, test, count in ((paths[0], False, rows), (paths[1], True, rows // 4)):
        classes = []
        for label in READERS:
            files = [f for i, f in enumerate(files_of(label)) if (i % APART == 0) == test]
            classes.append(rows_of(label, files, count, seen))
        seen |= {row["text"] for rows_ in classes for row in rows_}
        turns = (row for turn in zip(*classes, strict=False) for row in turn)
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in turns), encoding="utf-8"
        )
    return paths


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=600, help="a class")
    args = parser.parse_args()
    for path in write(args.folder, args.rows):
        print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} rows")


if __name__ == "__main__":
    main()
