"""What is known of device code without a GPU: what the assembler says of each kernel, its loads in PTX."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from gammac.targets.tvm.cuda.toolkit import REAL, VIRTUAL, Compiled

_ENTRY: Final = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_STACK: Final = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED: Final = re.compile(r"Used (\d+) registers")
_SHARED: Final = re.compile(r"(\d+) bytes smem")
_KERNEL: Final = re.compile(r"^\.visible \.entry (\w+)\(", re.MULTILINE)
_LOAD: Final = re.compile(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)")
_SUFFIX: Final = "_kernel"


@dataclass(frozen=True)
class KernelReport:
    """One kernel on one architecture. Bytes of shared memory and stack are a block's and a thread's."""

    kernel: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    loads: Mapping[str, int]
    """Bytes of a thread's load from the GPU's memory → how many such instructions the PTX has."""


def read_report(compiled: Compiled) -> tuple[KernelReport, ...]:
    """By kernel, then architecture."""
    loads = {arch: dict(loads_of(text)) for arch, text in compiled.ptx.items()}
    found = []
    for name, arch, said in _entries(compiled.said):
        stack, stores, read = map(int, _group(_STACK, said))
        ptx = loads.get(arch.replace(REAL, VIRTUAL), {}).get(name, {})
        (registers,), shared = _group(_USED, said), _SHARED.search(said)
        found.append(
            KernelReport(
                name.removesuffix(_SUFFIX), arch, int(registers), int(shared[1]) if shared else 0, stack,
                stores + read, ptx,
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda r: (r.kernel, r.arch)))


def _entries(said: str) -> Iterator[tuple[str, str, str]]:
    """Kernel, architecture, and what is said of it."""
    starts = list(_ENTRY.finditer(said))
    ends = [m.start() for m in starts[1:]] + [len(said)]
    for start, end in zip(starts, ends, strict=True):
        yield start[1], start[2], said[start.end() : end]


def _group(pattern: re.Pattern[str], said: str) -> tuple[str, ...]:
    found = pattern.search(said)
    assert found is not None, f"nvcc said something else: {said}"
    return found.groups()


def loads_of(ptx: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Each kernel of a PTX text, and its loads from the GPU's memory by their bytes."""
    starts = list(_KERNEL.finditer(ptx))
    ends = [m.start() for m in starts[1:]] + [len(ptx)]
    for start, end in zip(starts, ends, strict=True):
        sizes = [int(m[1] or 1) * int(m[2]) // 8 for m in _LOAD.finditer(ptx, start.end(), end)]
        yield start[1], {str(size): sizes.count(size) for size in sorted(set(sizes))}


def to_json(reports: tuple[KernelReport, ...]) -> str:
    """Equal reports have equal texts."""
    return json.dumps([asdict(r) for r in reports], indent=1, sort_keys=True) + "\n"


def parse_reports(text: str) -> tuple[KernelReport, ...]:
    """The inverse of `to_json`. Raises ValueError for a text that is none."""
    data: Any = json.loads(text)
    try:
        return tuple(KernelReport(**row) for row in data)
    except TypeError as error:
        raise ValueError(f"a row is wrong: {error}") from error
