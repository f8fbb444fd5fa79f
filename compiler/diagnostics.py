"""What gammac says when something is wrong: where, what, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnostic:
    """One complaint. `loc` is a PyTorch module path or a `file:line:column`."""

    message: str
    loc: str = ""
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.loc}: " if self.loc else ""
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{where}{self.message}{hint}"


class CompileError(Exception):
    """A mistake that the user can mend. The command line prints it without a traceback."""

    def __init__(self, message: str, *, hint: str = "", loc: str = "") -> None:
        super().__init__(message)
        self.diagnostics: Sequence[Diagnostic] = (Diagnostic(message, loc, hint),)

    @classmethod
    def from_diagnostics(cls, title: str, diagnostics: Sequence[Diagnostic]) -> "CompileError":
        """One error that lists everything found, under a title."""
        error = cls(title)
        error.diagnostics = tuple(diagnostics)
        return error

    def __str__(self) -> str:
        title = str(self.args[0])
        if len(self.diagnostics) == 1 and self.diagnostics[0].message == title:
            return str(self.diagnostics[0])
        return "\n".join([title, *map(str, self.diagnostics)])
