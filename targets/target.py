"""A target is numbers: what its emitter can run fast, and how fast. They stand in TOML files beside this one.

A format that a kernel row does not list is never chosen: runtimes answer such formats with a path that
expands the whole weight at every call, tens of times slower, and say nothing.
"""

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.formats import CHANNEL, FALLBACK_GROUPS, INTEGER, Format, IntegerFormat
from gammac.processor import CPU, PROVIDERS, host_flags

BLOCK: Final = "block"
TABLE: Final = "table"
HOST: Final = "cpu"
# what a short name stands for, besides `cpu`, which is this machine
ALIASES: Final[Mapping[str, str]] = {"cuda": "cuda-sm80", "edge": "edge-aarch64-rpi5"}
ANY: Final = "any"  # kind of formats of a kernel that runs them all, whatever its bits and groups
NO_EMITTER: Final = "none"  # of a target for what needs no artifact
REFERENCE: Final = "reference"  # such a target, which gammac ships
# what a processor must have for a target; the first that fits is this machine's
HOSTS: Final = (
    ("cpu-x86-avx512", {"avx512_vnni", "avx512vbmi"}),
    ("cpu-x86-avx2", {"avx2", "fma"}),
)

# what energy is counted by: bytes read from memory, multiply-adds of integers and of floats
ENERGY: Final = ("byte", "int8_mac", "float_mac")

ByGroup = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Kernel:
    """Formats that one operator of the runtime runs fast, and its rates on one thread.

    `gweights` (10^9 weights a second, one token) and `gflops` (many tokens) are given by group size;
    a group takes the entry of the largest listed size that is not above it.
    """

    op: str
    bits: tuple[float, ...]
    groups: tuple[int, ...]  # 0: one scale a row
    gweights: ByGroup
    gflops: ByGroup
    role: str = BLOCK
    kind: str = INTEGER  # of formats
    symmetric: bool = True
    asymmetric: bool = True
    needs_compiler: bool = False  # a C++ compiler where `gammac compile` runs
    scale_bytes: int = 2
    resident: float = 1.0  # bytes in memory for a byte on disk: runtimes repack
    row_multiple: int = 1  # a weight has so many rows, or a multiple

    def runs(self, format_: Format) -> bool:
        """Whether this operator is fast for a format."""
        if self.kind == ANY:
            return True
        if format_.kind != self.kind or format_.bits not in self.bits or format_.group not in self.groups:
            return False
        if isinstance(format_, IntegerFormat):
            return self.symmetric if format_.symmetric else self.asymmetric
        return True

    def rate(self, table: ByGroup, format_: Format) -> float:
        """The entry of `gweights` or `gflops` for a format."""
        group = format_.group or max(size for size, _ in table)
        below = [item for item in table if item[0] <= group]
        return max(below)[1] if below else min(table)[1]


@dataclass(frozen=True)
class Measured:
    """One linear [rows, columns] times some tokens, timed on the device."""

    op: str
    format: str
    rows: int
    columns: int
    threads: int
    seconds: float
    tokens: int = 1


@dataclass(frozen=True)
class Analysed:
    """Rates of integer formats of a width on one thread, from the code that the emitter writes.

    They take the place of a `Kernel`'s; the row of the largest group counts that is not above a format's.
    """

    bits: int
    group: int
    gweights: float
    gflops: float
    source: str


@dataclass(frozen=True)
class Target:
    """A device and the runtime on it. Rates are for one thread unless said."""

    name: str
    description: str
    emitter: str
    arch: str
    sources: tuple[str, ...]
    threads: int
    memory_bytes: int
    dram_gbps: float
    dram_gbps_peak: float  # with all threads
    float_gflops: float
    attention_gbps: float  # cache bytes that decoding reads
    attention_gflops: float
    overhead_us: Mapping[str, float]  # op -> cost of a call; "default" for the others
    kernels: tuple[Kernel, ...]
    archs: tuple[str, ...] = ()  # of a GPU: what device code is compiled for
    cpu: str = ""  # the core that code is for, as LLVM spells it, and what it has beyond that: "+dotprod"
    features: tuple[str, ...] = ()
    ghz: float = 0.0
    provider: str = CPU  # of ONNX Runtime's operators: PROVIDERS
    tie: bool = False  # linears that read the same value get one format, so that they fuse
    refusal: str = ""  # why nothing can be compiled for it
    last_logits: bool = False  # a prefill's logits are those of its last token alone
    runtime_bytes: int = 0  # what the runtime takes besides weights, values and cache
    energy: Mapping[str, float] = field(default_factory=dict)  # ENERGY -> picojoules
    measured: tuple[Measured, ...] = ()
    analysed: tuple[Analysed, ...] = ()
    digest: str = ""

    @property
    def bandwidth(self) -> float:
        """Bytes a second that the default number of threads reads from memory."""
        return min(self.dram_gbps * self.threads, self.dram_gbps_peak) * 1e9

    def kernel_for(
        self, format_: Format, role: str, in_features: int, *, rows: int = 0, compiler: bool = True
    ) -> Kernel | None:
        """The first row that runs a format (fitted to the row length) fast on a weight of so many rows (0:
        any number); None if there is none."""
        fitted = format_.fit(in_features)
        if not fitted.holds(in_features):
            return None
        fits = (k for k in self.kernels if k.role == role and k.runs(fitted) and rows % k.row_multiple == 0)
        return next((k for k in fits if compiler or not k.needs_compiler), None)

    def rates(self, format_: Format, kernel: Kernel) -> tuple[float, float]:
        """10^9 weights a second for one token, and 10^9 operations for many, of one thread."""
        rows = [a for a in self.analysed if format_.kind == INTEGER and a.bits == format_.bits]
        if not rows:
            return kernel.rate(kernel.gweights, format_), kernel.rate(kernel.gflops, format_)
        below = [a for a in rows if not format_.group or a.group <= format_.group]
        row = max(below, key=lambda a: a.group) if below else min(rows, key=lambda a: a.group)
        return row.gweights, row.gflops

    def kinds(self, role: str, *, compiler: bool) -> frozenset[str]:
        """The kinds of formats that it runs fast."""
        rows = (k for k in self.kernels if k.role == role and (compiler or not k.needs_compiler))
        return frozenset(k.kind for k in rows)

    def fit(
        self, format_: Format, role: str, in_features: int, *, rows: int = 0, compiler: bool = True
    ) -> Format | None:
        """The format, or the next smaller group, or one scale a row, that divides the row and runs fast."""
        smaller = [g for g in FALLBACK_GROUPS if not format_.group or g < format_.group]
        for group in dict.fromkeys([format_.group, *smaller, CHANNEL]):
            fitted = format_.with_group(group)
            divides = group == CHANNEL or in_features % group == 0
            if divides and self.kernel_for(fitted, role, in_features, rows=rows, compiler=compiler):
                return fitted
        return None

    def formats(self, role: str, in_features: int, *, compiler: bool) -> tuple[IntegerFormat, ...]:
        """Every integer format that runs fast on weights with `in_features` columns, narrow ones first."""
        found = {
            IntegerFormat(int(bits), group, symmetric)
            for kernel in self.kernels
            if kernel.role == role
            and kernel.kind in (INTEGER, ANY)
            and (compiler or not kernel.needs_compiler)
            for bits in kernel.bits
            for group in kernel.groups
            if group == CHANNEL or in_features % group == 0
            for symmetric in (False, True)
            if (kernel.symmetric if symmetric else kernel.asymmetric)
        }
        return tuple(sorted(found))


def host_target() -> str:
    """The name of the shipped target that fits this machine best."""
    flags = host_flags()
    return next((name for name, needed in HOSTS if flags.issuperset(needed)), "cpu-x86")


def target_names() -> tuple[str, ...]:
    """The targets that gammac ships; beside them `cpu` stands for the one that fits this machine."""
    files = resources.files("gammac.targets").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def load_target(name_or_path: str, backend: str | None = None) -> Target:
    """A shipped target by name, one of your own by its .toml file's path, `cpu` (this machine) or `cuda`.

    `backend` picks the emitter where a target has figures for several (default: its own).
    Raises CompileError for an unknown name, a file that is not there, or one with a mistake in it.
    """
    where = name_or_path if name_or_path.endswith(".toml") else f"{name_or_path}.toml"
    return parse_target(target_text(name_or_path), where, backend)


def target_text(name_or_path: str) -> str:
    """The TOML of a target. Raises CompileError where there is none."""
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise CompileError(f"there is no target file {name_or_path}")
        return path.read_text(encoding="utf-8")
    name_or_path = host_target() if name_or_path == HOST else ALIASES.get(name_or_path, name_or_path)
    if name_or_path not in target_names():
        names = ", ".join((HOST, *ALIASES, *target_names()))
        raise CompileError(
            f"there is no target {name_or_path!r}",
            hint=f"there are {names}; or give the path of a .toml file",
        )
    return (resources.files("gammac.targets") / f"{name_or_path}.toml").read_text(encoding="utf-8")


def parse_target(text: str, where: str = "<target>", backend: str | None = None) -> Target:
    """Read a target's TOML, for one of its backends. `where` is named in errors. Raises CompileError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CompileError(f"{where} is not TOML: {error}") from error
    others = table.pop("backend", {})
    if backend and backend != table.get("emitter"):
        table, text = _of_backend(table, others, backend, where), f"{text}\n{backend}"
    kernels = [_record(Kernel, row, f"{where}: kernel") for row in _rows(table, "kernel", where)]
    measured = [_record(Measured, row, f"{where}: measured") for row in _rows(table, "measured", where)]
    digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    analysed = [_record(Analysed, row, f"{where}: analysed") for row in _rows(table, "analysed", where)]
    rows = {"kernels": kernels, "measured": measured, "analysed": analysed}
    target = _record(Target, {**table, **rows, "digest": digest}, where)
    assert isinstance(target, Target)
    if target.provider not in PROVIDERS:
        raise CompileError(f"{where}: provider is {' or '.join(PROVIDERS)}, not {target.provider!r}")
    if "default" not in target.overhead_us:
        raise CompileError(f"{where}: overhead_us lacks default")
    if target.energy and set(target.energy) != set(ENERGY):
        raise CompileError(f"{where}: energy is given by {', '.join(ENERGY)}, not {', '.join(target.energy)}")
    return target


def _of_backend(table: dict[str, Any], others: Mapping[str, Any], backend: str, where: str) -> dict[str, Any]:
    """The device's figures with those of another runtime on it. What was measured is the first one's."""
    if backend not in others:
        there = ", ".join((str(table.get("emitter")), *others))
        raise CompileError(f"{where} has no figures for the backend {backend!r}", hint=f"it has {there}")
    kept = {key: value for key, value in table.items() if key not in ("kernel", "measured", "analysed")}
    return {**kept, **others[backend], "emitter": backend}


def _rows(table: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    rows = table.pop(key, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CompileError(f"{where}: write each {key} as a [[{key}]] row")
    return rows


def _record(kind: type[Any], row: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a table: every key known, every needed one there, of the right type."""
    known = {f.name: f for f in fields(kind)}
    unknown = [key for key in row if key not in known]
    missing = [n for n, f in known.items() if _needed(f) and n not in row]
    if unknown or missing:
        said = f"does not know {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        names = [n for n in known if n != "digest"]
        near = get_close_matches(unknown[0], names, 1) if unknown else []
        raise CompileError(
            f"{where} {said}", hint=f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
        )
    return kind(**{key: _value(known[key].type, value, f"{where}: {key}") for key, value in row.items()})


def _needed(of: Field[Any]) -> bool:
    return of.default is MISSING and of.default_factory is MISSING


def _value(type_: Any, value: Any, where: str) -> Any:
    """A TOML value as a field holds it. Raises CompileError where the type is another."""
    scalar = type_ in (str, int, float, bool)
    if scalar and type_ is float and type(value) is int:
        return float(value)
    if scalar and type(value) is not type_:
        raise CompileError(f"{where} is a {type_.__name__}, not {value!r}")
    if not scalar and not isinstance(value, list | dict):
        raise CompileError(f"{where} is a list or a table, not {value!r}")
    if type_ == ByGroup:
        return _by_group(value, where)
    return tuple(value) if isinstance(value, list) else value


def _by_group(value: Any, where: str) -> ByGroup:
    if not isinstance(value, dict) or not value or not all(str(key).isdigit() for key in value):
        raise CompileError(f"{where} is a table from group size to rate, such as {{ 32 = 46, 64 = 59 }}")
    return tuple(sorted((int(key), float(rate)) for key, rate in value.items()))
