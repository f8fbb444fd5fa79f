"""The rows of the table as data: a name, bits, a group size, and the options of a compile that make them.

    [[row]]
    name = "GPTQ"                  # as the table writes it
    bits = [4, 3, 2]               # a row for each; headline bits, as papers count
    group = [64, "channel"]        # a row for each; left out where a method has no groups
    quantizer = "gptq"             # from here on: options of `gammac compile` by name
    formats = "w{bits}{group}"     # the default; {group} reads g64 or channel

Whatever a row leaves open is as `gammac study` was told.
"""

import itertools
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.driver import Request
from gammac.formats import parse_formats
from gammac.passes import Choices
from gammac.passes.quantizers import QUANTIZERS
from gammac.texts import read_text

SHIPPED: Final = "rows.toml"
OWN: Final = ("name", "bits", "group")
CHANNEL: Final = "channel"
# options of the command line that Choices calls otherwise
RENAMED: Final = {"formats": "block", "table_formats": "table"}
OF_REQUEST: Final = ("budget", "target")
# one format for all weights, and a budget that every format keeps
UNIFORM: Final[Mapping[str, Any]] = {"strategy": "uniform", "budget": "32"}
Scalar = str | int | float | bool


@dataclass(frozen=True)
class RowSpec:
    """A method at some bits. `group` is "" where the method has none.

    `recipe` is the options as written, with their placeholders; `options` those of this row.
    """

    name: str
    bits: float
    group: str
    recipe: str
    options: Mapping[str, Scalar]

    @property
    def label(self) -> str:
        """For example `GPTQ 3 g64`."""
        group = f"g{self.group}" if self.group.isdigit() else self.group
        active = f"A{self.activations}" if self.activations else ""
        return " ".join(filter(None, (self.name, f"{self.bits:g}", active, group)))

    @property
    def activations(self) -> str:
        """Bits of activations; "" where they stay as they are."""
        found = re.search(r"\d+", str(self.options.get("activations", "")))
        return found[0] if found else ""

    @property
    def lacking(self) -> str:
        """What this build does not have of what the row needs; "" if it has everything."""
        name = str(self.options.get("quantizer", Choices.quantizer)).partition(":")[0]
        if name not in QUANTIZERS:
            return f"no quantizer {name!r}"
        unknown = next((k for k in self.options if not _is_option(k)), None)
        return f"no option {_dashed(unknown)!r}" if unknown else ""

    def request(self, base: Request) -> Request:
        """What a compile of this row would be asked for. Raises CompileError for an option that isn't one."""
        given = {**UNIFORM, **self.options}
        of_request: dict[str, Any] = {k: str(given.pop(k)) for k in OF_REQUEST if k in given}
        choices = {RENAMED.get(k, k): _as_choice(self.label, k, v) for k, v in given.items()}
        return replace(base, choices=replace(base.choices, **choices), **of_request)


def read_rows(path: Path | None = None) -> tuple[RowSpec, ...]:
    """The rows of a file, or those that gammac ships. Raises CompileError naming what is wrong."""
    if path is not None:
        return parse_rows(read_text(path), str(path))
    text = (resources.files("gammac.study") / SHIPPED).read_text(encoding="utf-8")
    return parse_rows(text, SHIPPED, may_lack=True)


def parse_rows(text: str, where: str = "<rows>", *, may_lack: bool = False) -> tuple[RowSpec, ...]:
    """Read the TOML; `where` is named in errors. Raises CompileError.

    Options and formats of rows whose quantizer is missing are taken as they are; with `may_lack` also an
    option that this build doesn't know makes a row missing, and is no mistake.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CompileError(f"{where} is not TOML: {error}") from error
    entries = table.get("row", [])
    if (
        set(table) != {"row"}
        or not isinstance(entries, list)
        or not all(isinstance(e, dict) for e in entries)
    ):
        raise CompileError(f"{where} has no [[row]] entries, or others beside them", hint="see docs/study.md")
    rows = [row for entry in entries for row in _expanded(entry, where)]
    labels = [row.label for row in rows]
    twice = next((label for i, label in enumerate(labels) if label in labels[:i]), None)
    if twice:
        raise CompileError(f"{where}: {twice} stands there twice", hint="give one of them another name")
    for row in rows:
        if not (row.lacking and (may_lack or row.lacking.startswith("no quantizer"))):
            parse_formats(row.request(Request("")).choices.block)
    return tuple(rows)


def chosen(
    rows: Sequence[RowSpec], methods: Sequence[str] = (), bits: Sequence[float] = (),
    groups: Sequence[str] = (),
) -> tuple[RowSpec, ...]:  # fmt: skip
    """The rows with these names, bits and groups; nothing given means all.

    Raises CompileError for a name that no row has, for a method asked for whose quantizer this build lacks,
    and when no row is left.
    """
    names = {row.name.lower(): row.name for row in rows}
    for method in methods:
        if method.lower() not in names:
            raise CompileError(f"no method {method!r}", hint=f"there are {', '.join(names.values())}")
    wanted = {method.lower() for method in methods}
    found = [
        row
        for row in rows
        if (not wanted or row.name.lower() in wanted)
        and (not bits or row.bits in bits)
        and (not groups or (row.group or "none") in groups)
    ]
    lacking = next((row for row in found if wanted and row.lacking), None)
    if lacking:
        raise CompileError(
            f"{lacking.name}: this build has {lacking.lacking}",
            hint=f"there are {', '.join(QUANTIZERS)}",
        )
    if not found:
        raise CompileError("no row is left", hint="ask for other --methods, --bits or --groups")
    return tuple(found)


# ---- reading an entry ---------------------------------------------------------------------------


def _expanded(entry: Mapping[str, Any], where: str) -> list[RowSpec]:
    name = entry.get("name")
    if not isinstance(name, str) or not name or "bits" not in entry:
        raise CompileError(f"{where}: a row needs a name and bits: {dict(entry)}", hint="see docs/study.md")
    if "," in name:
        raise CompileError(f"{where}: {name!r} has a comma", hint="it parts names in --methods")
    place = f"{where}: {name}"
    options = {k.replace("-", "_"): v for k, v in entry.items() if k not in OWN}
    recipe = " ".join(_spelled(k, v) for k, v in options.items())
    rows = []
    for bits, group in itertools.product(_listed(entry["bits"]), _listed(entry.get("group", ""))):
        if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits <= 16:
            raise CompileError(f"{place}: {bits!r} are no bits", hint="write bits = [4, 3, 2]")
        if not _is_group(group):
            raise CompileError(f"{place}: {group!r} is no group", hint='write group = [64, "channel"]')
        own = {"formats": "w{bits}{group}", **options}
        own = {k: _filled(v, bits, str(group)) if isinstance(v, str) else v for k, v in own.items()}
        rows.append(RowSpec(name, float(bits), str(group), recipe, own))
    return rows


def _is_group(group: Any) -> bool:
    return group in ("", CHANNEL) or (isinstance(group, int) and not isinstance(group, bool) and group > 0)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _filled(text: str, bits: float, group: str) -> str:
    spelled = f"g{group}" if group.isdigit() else CHANNEL
    return text.replace("{bits}", f"{bits:g}").replace("{group}", spelled)


def _spelled(key: str, value: Any) -> str:
    """As on the command line."""
    if isinstance(value, bool):
        return f"--{_dashed(key)}" if value else f"--no-{_dashed(key)}"
    return f"--{_dashed(key)} {value}"


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _is_option(key: str) -> bool:
    """Whether a row may say this: a field of Choices by its name on the command line, or of the request."""
    named = (set(typing.get_type_hints(Choices)) - set(RENAMED.values())) | set(RENAMED)
    return key in named or key in OF_REQUEST


def _as_choice(label: str, key: str, value: Any) -> Any:
    """An option's value as Choices holds it."""
    if not _is_option(key):
        raise CompileError(
            f"{label}: no option {_dashed(key)!r}", hint="gammac compile --help lists the options"
        )
    if key in RENAMED:
        return "+".join(str(value).split(","))
    hint = typing.get_type_hints(Choices)[key]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        wished = " or ".join(k.__name__ for k in kinds if k is not types.NoneType)
        raise CompileError(f"{label}: {_dashed(key)} = {value!r} is no {wished}")
    return value
