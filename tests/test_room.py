"""What can't fit a device is refused before any work, with what would fit."""

from dataclasses import replace
from pathlib import Path

import pytest
from allocation_models import MODEL
from click.testing import CliRunner

from gammac.cli import main
from gammac.diagnostics import CompileError
from gammac.formats import parse_format
from gammac.ir import parse
from gammac.room import Room, demand_room, least_room
from gammac.targets.cost import stored_bytes
from gammac.targets.target import TABLE, load_target

PI = load_target("edge")
FORMATS = ("w2g64+w4g64", "w4g64+w8g64")


def module(**attrs: int):  # type: ignore[no-untyped-def]
    return parse(MODEL).with_attrs(layers=2, kv_heads=3, head_dim=16, max_positions=128, **attrs)


def test_the_least_is_counted() -> None:
    two, four = parse_format("w2g64"), parse_format("w4g64")
    shapes = {"q": (64, 64), "k": (32, 64), "up": (128, 64), "down": (64, 128)}
    blocks = sum(stored_bytes(*shape, two, PI) for shape in shapes.values())
    expected = blocks + stored_bytes(256, 64, four, PI, TABLE) + 4 * 64
    assert least_room(module(), PI, *FORMATS) == Room(expected, 2 * 4 * 2 * 3 * 16)


def test_a_context_or_a_model_that_fits_is_named() -> None:
    room = least_room(module(), PI, *FORMATS)
    exactly = replace(PI, memory_bytes=room.bytes(64))
    demand_room(module(), exactly, FORMATS, 64)
    with pytest.raises(CompileError, match=r"cache of 65 tokens[^$]*a context of 64 tokens would fit"):
        demand_room(module(), exactly, FORMATS, 65)
    with pytest.raises(CompileError, match=r"a model of 0\.0 million parameters would fit"):
        demand_room(module(), replace(PI, memory_bytes=1000), FORMATS, 0)


def test_a_microcontroller_is_refused_with_figures(tmp_path: Path) -> None:
    command = ["compile", "tiny", "--target", "mcu-cortex-m7", "--context", "1024", "-o", str(tmp_path / "o")]
    result = CliRunner().invoke(main, command)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 1
    assert "nothing can be compiled for mcu-cortex-m7: its artifacts map files and start threads" in said
    assert "mcu-cortex-m7 has 3.0 MB" in said and "a context of" in said and "would fit" in said
    assert "edge-armv7-rpi2 is the smallest" in said and not (tmp_path / "o").exists()
