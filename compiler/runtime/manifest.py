"""manifest.json: where an artifact comes from, what was decided, and the sha256 of its files.

The text is a function of what was compiled: sorted keys, no times, no paths of the machine.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TypeVar

from gammac import __version__
from gammac.diagnostics import CompileError
from gammac.processor import CPU

FORMAT: Final = "gammac-artifact"
FORMAT_VERSION: Final = 1
KINDS: Final = ("decoder", "encoder")
TOOLS: Final = ("numpy", "onnx", "onnxruntime", "torch", "transformers")

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """A file of the artifact: its size and the hex sha256 of its bytes."""

    size_bytes: int
    sha256: str


def tool_versions(names: Sequence[str] = TOOLS) -> dict[str, str]:
    """The installed versions of the packages that decide what an artifact holds."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself. `files` is filled in by `seal`."""

    model: str
    """The source model's name: the last part of its path, or its name in the zoo."""

    model_digest: str
    """Digest of the source model's weights."""

    target: str
    kind: str
    """decoder (next-token logits, with a cache) or encoder (one output per token; of a classifier one row of
    logits for a text)."""

    emitter: str
    context: int
    """The longest sequence of tokens the module takes."""

    payload_bits: float
    """Mean code bits of the weights that could be chosen for."""

    true_bits: float
    """Everything stored for those weights, over their number."""

    whole_model_bits: float
    """File size in bits over the parameters, embedding and head included."""

    budgets: tuple[str, ...] = ()
    allocation: Mapping[str, str] = field(default_factory=dict)
    """Weight to the name of its format."""

    predicted: Mapping[str, float] = field(default_factory=dict)
    """The cost model's figures: seconds_per_token, joules_per_token, weight_bytes, …"""

    not_quantized: Mapping[str, str] = field(default_factory=dict)
    """Weight to the reason why it stayed as it was."""

    fallbacks: Mapping[str, str] = field(default_factory=dict)
    """Weight to how its format differs from the one asked for."""

    library: str = ""
    """The native library of the artifact's own operators, one of its files."""

    provider: str = CPU
    """What ONNX Runtime's operators were chosen for: cpu or cuda."""

    labels: tuple[str, ...] = ()
    """The classes of a classifier, in the order of its logits."""

    activations: str = ""
    """int8 or float: what products with quantized weights take; older artifacts don't say."""

    code: Mapping[str, str] = field(default_factory=dict)
    """The triple, core and features that native code was made for; older artifacts don't say."""

    adapters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Weight to what files of adapters call it, or the rows that it is made of."""

    adapter_base: str = ""
    """The digest of the codes that such files must have been trained on; older artifacts don't say."""

    tools: Mapping[str, str] = field(default_factory=tool_versions)
    gammac: str = __version__
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of manifest.json: equal manifests have equal texts."""
        # the format stands first, where a glance finds it; the rest is sorted
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        body = {name: value for name, value in sorted(asdict(self).items())}
        return json.dumps({**head, **_sorted(body)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return list(value) if isinstance(value, tuple) else value


def parse_manifest(text: str) -> Manifest:
    """The inverse of `Manifest.to_json`. Raises ValueError saying what is wrong with the text.

    Raises CompileError for a version that this gammac does not know.
    """
    data = _is(dict, json.loads(text), "the whole")
    if data.get("format") != FORMAT:
        raise ValueError(f"its format is {data.get('format')!r}, not {FORMAT!r}")
    found = data.get("format_version")
    if found != FORMAT_VERSION:
        raise CompileError(
            f"the artifact has format version {found}, this gammac {__version__} reads {FORMAT_VERSION}",
            hint=f"use the gammac that wrote it ({data.get('gammac')}), or compile it again with this one",
        )
    values: dict[str, Any] = {name: read(_entry(data, name), name) for name, read in _READERS.items()}
    if values["kind"] not in KINDS:
        raise ValueError(f"kind is {values['kind']!r}, not one of {', '.join(KINDS)}")
    return Manifest(**values)


def _entry(data: Mapping[str, Any], name: str) -> Any:
    if name not in data and name not in _LATER:
        raise ValueError(f"it has no {name}")
    return data.get(name, _LATER.get(name))


def _is(kind: type[T], value: Any, name: str) -> T:
    # bool is an int to Python, but not in a manifest
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value


def _text(value: Any, name: str) -> str:
    return _is(str, value, name)


def _count(value: Any, name: str) -> int:
    if _is(int, value, name) < 0:
        raise ValueError(f"{name} is negative")
    return int(value)


def _number(value: Any, name: str) -> float:
    return float(value) if isinstance(value, int) else _is(float, value, name)


def _list(value: Any, name: str) -> tuple[str, ...]:
    return tuple(_text(item, name) for item in _is(list, value, name))


def _table(read: Callable[[Any, str], T]) -> Callable[[Any, str], dict[str, T]]:
    def read_table(value: Any, name: str) -> dict[str, T]:
        return {key: read(item, f"{name}.{key}") for key, item in _is(dict, value, name).items()}

    return read_table


def _file(value: Any, name: str) -> FileEntry:
    entry = _is(dict, value, name)
    return FileEntry(_count(_entry(entry, "size_bytes"), name), _text(_entry(entry, "sha256"), name))


# what manifests did not have from the start
_LATER: Final[Mapping[str, Any]] = {
    "activations": "", "adapter_base": "", "adapters": {}, "code": {}, "labels": [], "provider": CPU,
}  # fmt: skip
_READERS: Final[Mapping[str, Callable[[Any, str], object]]] = {
    "model": _text, "model_digest": _text, "target": _text, "kind": _text, "emitter": _text,
    "context": _count, "payload_bits": _number, "true_bits": _number, "whole_model_bits": _number,
    "budgets": _list, "allocation": _table(_text), "predicted": _table(_number),
    "not_quantized": _table(_text), "fallbacks": _table(_text), "library": _text, "activations": _text,
    "code": _table(_text), "provider": _text, "labels": _list, "tools": _table(_text), "gammac": _text,
    "files": _table(_file), "adapters": _table(_list), "adapter_base": _text,
}  # fmt: skip
