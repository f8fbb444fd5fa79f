"""Finished work, by content: module text and pass options → module; any key → a small record.

A second compile with another budget finds everything up to the scores here; a killed compile finds
the layers that it had finished. Entries are plain text and JSON; deleting the folder loses only time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gammac import __version__
from gammac.diagnostics import CompileError
from gammac.files import write_atomically
from gammac.ir import Module, parse, to_text
from gammac.weights import DIGEST, WeightStore

if TYPE_CHECKING:
    from gammac.pipeline import Context, Pass


def key_of(*parts: str) -> str:
    """A digest of some texts and of gammac's version."""
    return hashlib.sha256("\0".join([__version__, *parts]).encode()).hexdigest()


def _digests_in(found: object) -> Iterator[str]:
    """Everything in the store that attributes or a record point at."""
    if isinstance(found, Mapping):
        for value in found.values():
            yield from _digests_in(value)
    elif isinstance(found, str) and found.startswith(DIGEST):
        yield found


class PassCache:
    """Without a folder it remembers nothing."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def module_of(self, pass_: "Pass", module: Module, ctx: "Context") -> tuple[Module, bool]:
        """The result of a pass, and whether it was found here rather than computed."""
        from gammac.pipeline import full_options_text

        if self.folder is None:
            return pass_.run(module, ctx), False
        key = key_of(to_text(module), full_options_text(pass_), ctx.fingerprint(pass_.reads))
        path = self._path("modules", key, "gir")
        found = self._read_module(path, ctx)
        if found is not None:
            return found, True
        result = pass_.run(module, ctx)
        write_atomically(path, to_text(result).encode())
        return result, False

    def _read_module(self, path: Path, ctx: "Context") -> Module | None:
        if not path.exists():
            return None
        try:
            module = parse(path.read_text(), str(path))
        except (CompileError, UnicodeDecodeError):  # a damaged entry costs time, never a wrong result
            return None
        needed = (d for w in module.weights.values() for d in (w.digest, *_digests_in(w.attrs)))
        return module if all(digest in ctx.store for digest in needed) else None

    def record(
        self, key: str, compute: Callable[[], dict[str, Any]], store: WeightStore | None = None
    ) -> dict[str, Any]:
        """A JSON record by key, computed when it is missing, or when `store` lacks what it points at."""
        found = self._read_record(key)
        if found is None or (store is not None and any(d not in store for d in _digests_in(found))):
            found = compute()
            if self.folder is not None:
                write_atomically(self._path("records", key, "json"), json.dumps(found).encode())
        return found

    def has_record(self, key: str) -> bool:
        """Whether `record` would find what it needs."""
        return self._read_record(key) is not None

    def _read_record(self, key: str) -> dict[str, Any] | None:
        """None for one that is missing or damaged."""
        if self.folder is None:
            return None
        try:
            found = json.loads(self._path("records", key, "json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _path(self, kind: str, key: str, suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / kind / key[:2] / f"{key}.{suffix}"
