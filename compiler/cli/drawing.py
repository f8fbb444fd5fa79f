"""Figures of what was trained, where they can be drawn."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gammac.cli.console import ERR


def draw_history(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Curves of a training into its folder; a note without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        ERR.print("note: no plots without matplotlib: pip install 'gammac\\[plots]'", highlight=False)
        return
    from gammac.training_plots import draw_training

    draw_training(history, folder)
