"""Docs that can be checked are checked: the table of ops, the README's commands and options."""

import re
from pathlib import Path

import click

from gammac.cli import main
from gammac.ir import OPS
from gammac.passes import STRATEGIES, Choices, default_pipeline
from gammac.passes.quantizers import QUANTIZERS

ROOT = Path(__file__).resolve().parent.parent


def test_every_op_stands_in_the_reference() -> None:
    text = (ROOT / "docs" / "ir.md").read_text()
    for name, spec in OPS.items():
        attrs = ", ".join([*spec.required, *(f"[{o}]" for o in spec.optional if o != "compute")])
        assert f"| `{name}` | {attrs} | {' '.join(spec.doc.split())} |" in text, f"docs/ir.md lacks {name}"


def test_the_commands_of_the_docs_exist() -> None:
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for path in texts:
        for command, rest in re.findall(r"gammac (\w+)((?: [^`\n|]*)?)", path.read_text()):
            if command not in main.commands:
                continue
            found, words = main.commands[command], rest.split()
            if isinstance(found, click.Group) and words and words[0] in found.commands:
                found = found.commands[words[0]]
            known = {o for p in found.params for o in (*p.opts, *p.secondary_opts)}
            for option in re.findall(r"(?<!\S)(--?[a-z][\w-]*)", rest.split("#")[0].split('"')[0]):
                assert option in known, f"{path.name}: gammac {command} has no {option}"


def test_the_tutorial_names_the_dumps_in_order() -> None:
    named = re.findall(r"^\| `\d\d-(\w+)` \|", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE)
    assert named == [p.name for p in default_pipeline(Choices(), "onnx", compiler=True)]


def test_readme_names_what_can_be_chosen() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in (*QUANTIZERS, *STRATEGIES))
