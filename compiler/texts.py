"""Texts as token windows: calibration and evaluation read the same definition."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.weights import digest_of


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token windows i64 [windows, length]; equal tokens have equal digests."""

    tokens: Tensor

    @property
    def digest(self) -> str:
        """The digest of the tokens."""
        return digest_of({"tokens": self.tokens})

    def spread(self, windows: int) -> "Calibration":
        """So many of the windows, evenly spaced; all of them where there are fewer."""
        count = len(self.tokens)
        return Calibration(self.tokens[torch.linspace(0, count - 1, min(windows, count)).long()])


def read_text(path: Path) -> str:
    """A text file. Raises CompileError when it can't be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompileError(f"{path} can't be read as text: {error}", hint="give a UTF-8 text file") from error


def token_windows(
    text: str, tokenizer: Any, length: int, windows: int | None, spread: bool = False
) -> Tensor:
    """The first `windows` non-overlapping windows of `length` tokens, i64 [windows, length].

    No special tokens are added. With `spread` the windows are taken evenly over the whole text
    rather than from its start. Raises CompileError when the text has fewer than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) // length
    if whole == 0:
        raise CompileError(
            f"the text has {len(ids)} tokens, less than one window of {length}",
            hint="give a longer text, or shorter windows",
        )
    table = torch.tensor(ids[: whole * length], dtype=torch.int64).reshape(whole, length)
    if windows is None or windows >= whole:
        return table
    if spread:
        return table[torch.linspace(0, whole - 1, windows).long()]
    return table[:windows]
