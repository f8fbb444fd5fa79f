"""The artifact: a folder that runs elsewhere, and a manifest that says what is in it.

    manifest.json          what stands here, and the sha256 of every other file
    model.onnx(.data)      the module and its weights, or
    model.so, .params, .json    its code, its weights, and what a runtime must know of them: from TVM
    kernels.json           what is known of its device code, of an artifact for GPUs
    tokenizer.json …       what turns text into its tokens
    genai_config.json      the decoder's interface, also what onnxruntime-genai reads

A folder is put together beside its final place and renamed, so that nobody ever sees half of one.
Loading reads JSON and checksums and never unpickles. The sums find damage, not malice: whoever can
change a file can change its sum, and an artifact with a native library runs that library's code.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final

from gammac.diagnostics import CompileError, Diagnostic
from gammac.files import write_atomically
from gammac.runtime.manifest import FORMAT, FileEntry, Manifest, parse_manifest
from gammac.targets.tvm import names as tvm
from gammac.targets.tvm.cuda.report import KernelReport, parse_reports

MANIFEST: Final = "manifest.json"
MODEL: Final = "model.onnx"
# emitter → the files without which there is no model
MODEL_FILES: Final = {"onnx": (MODEL,), "tvm": tvm.MODEL_FILES}
COMPILE_AGAIN: Final = "copy the artifact again, or compile it again"


@dataclass(frozen=True)
class Artifact:
    """A folder whose manifest has been read and whose files are there."""

    folder: Path
    manifest: Manifest = field(repr=False)

    def path(self, name: str) -> Path:
        """The place of a file of the artifact."""
        assert name in self.manifest.files, f"{name} is no file of the artifact"
        return self.folder / name

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(entry.size_bytes for entry in self.manifest.files.values())

    @property
    def library(self) -> Path | None:
        """The native library of the artifact's own operators, if it needs one."""
        return self.path(self.manifest.library) if self.manifest.library else None


def is_artifact(folder: Path) -> bool:
    """Whether a folder calls itself an artifact, of whatever version and however damaged."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(4096)
    except OSError:
        return False


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Note size and sha256 of every file of `folder` and write the manifest, last; returns it.

    Raises CompileError when there is a link among the files: it would point elsewhere on another machine.
    """
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise CompileError(
                f"{name} is a link, an artifact holds only files", hint="copy what it points to"
            )
        if path.is_file() and name != MANIFEST:
            entries[name] = FileEntry(path.stat().st_size, sha256_of(path))
    sealed = replace(manifest, files=entries)
    write_atomically(folder / MANIFEST, sealed.to_json().encode())
    return sealed


def open_artifact(folder: Path, verify: bool = True) -> Artifact:
    """Read a folder's manifest and check its files: presence and size, and with `verify` the sha256.

    Raises CompileError naming every file that is missing or damaged.
    """
    manifest = _read_manifest(folder)
    found = [d for name, entry in manifest.files.items() for d in _complaints(folder, name, entry, verify)]
    found += [
        Diagnostic(f"{name} is not among the files of the manifest", hint=COMPILE_AGAIN)
        for name in filter(None, (*MODEL_FILES.get(manifest.emitter, ()), manifest.library))
        if name not in manifest.files
    ]
    if found:
        raise CompileError.from_diagnostics(f"{folder} is damaged", found)
    return Artifact(folder, manifest)


def device_kernels(artifact: Artifact) -> tuple[KernelReport, ...]:
    """What is known of the kernels of an artifact for GPUs; nothing for others. Raises CompileError."""
    if tvm.KERNELS_NAME not in artifact.manifest.files:
        return ()
    path = artifact.path(tvm.KERNELS_NAME)
    try:
        return parse_reports(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompileError(f"{path} can't be read: {error}", hint=COMPILE_AGAIN) from error


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CompileError(f"there is no folder {folder}", hint="give the folder that gammac compile wrote")
    if not path.is_file():
        raise CompileError(
            f"{folder} is not an artifact: it has no {MANIFEST}",
            hint="give the folder that gammac compile wrote",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompileError(f"{path} can't be read: {error}", hint=COMPILE_AGAIN) from error
    try:
        return parse_manifest(text)
    except (ValueError, RecursionError) as error:
        raise CompileError(f"{path} is damaged: {error}", hint=COMPILE_AGAIN) from error


def _complaints(folder: Path, name: str, entry: FileEntry, verify: bool) -> Iterator[Diagnostic]:
    if not _is_inside(folder, name):
        yield Diagnostic(f"{name!r} leaves the folder", hint="don't use this artifact: no gammac wrote it")
        return
    try:
        size_bytes = (folder / name).stat().st_size
        if not (folder / name).is_file():
            yield Diagnostic(f"{name} is no file", hint=COMPILE_AGAIN)
        elif size_bytes != entry.size_bytes:
            yield Diagnostic(f"{name} has {size_bytes} bytes, not {entry.size_bytes}", hint=COMPILE_AGAIN)
        elif verify and sha256_of(folder / name) != entry.sha256:
            yield Diagnostic(f"{name} has changed: its sha256 is not the one noted", hint=COMPILE_AGAIN)
    except FileNotFoundError:
        yield Diagnostic(f"{name} is missing", hint=COMPILE_AGAIN)
    except OSError as error:
        yield Diagnostic(f"{name} can't be read: {error.strerror}", hint=COMPILE_AGAIN)


def _is_inside(folder: Path, name: str) -> bool:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name:
        return False
    return (folder / name).resolve().is_relative_to(folder.resolve())
