"""WeightStore: digest → named arrays. Bytes are loaded when asked for, never all at once.

A digest pins content, not place: it is the sha256 of each array's name, element type, shape and
bytes. Source weights stay in the model's own safetensors files and are only pointed at; what passes
make (codes, scales, Gram matrices) is written below the store's folder, one file an object.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from gammac.diagnostics import CompileError
from gammac.files import write_atomically

Arrays = Mapping[str, Tensor]
DIGEST: Final = "sha256:"  # what every digest starts with


def digest_of(arrays: Arrays) -> str:
    """`sha256:…` of the content of `arrays`."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name].detach().contiguous()
        sha.update(f"{name}:{array.dtype}:{list(array.shape)};".encode())
        if array.numel():
            sha.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return DIGEST + sha.hexdigest()


class WeightStore:
    """Content-addressed arrays; without a folder everything stays in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._sources: dict[str, tuple[Path, str]] = {}

    def put(self, arrays: Arrays) -> str:
        """Keep arrays and return their digest."""
        digest = digest_of(arrays)
        plain = {name: array.detach().contiguous() for name, array in arrays.items()}
        if self.folder is None:
            self._memory[digest] = plain
        elif not self._object_path(digest).exists():
            write_atomically(self._object_path(digest), save(plain))
        return digest

    def point_at(self, path: Path, key: str, tensor: Tensor) -> str:
        """Remember that `tensor`, as float32, can be read again from `path` under `key`."""
        digest = digest_of({"data": tensor.float()})
        self._sources[digest] = (path, key)
        if self.folder is not None:
            record = json.dumps({"path": str(path.resolve()), "key": key})
            write_atomically(self._pointer_path(digest), record.encode())
        return digest

    def __contains__(self, digest: str) -> bool:
        if digest in self._memory or digest in self._sources:
            return True
        if self.folder is None:
            return False
        return self._object_path(digest).exists() or self._pointer_path(digest).exists()

    def get(self, digest: str) -> dict[str, Tensor]:
        """The arrays behind a digest. Raises CompileError when they are not to be had."""
        if digest in self._memory:
            return self._memory[digest]
        try:
            if self.folder is not None and self._object_path(digest).exists():
                return load_file(self._object_path(digest))
            return {"data": self._read_source(digest)}
        except (SafetensorError, OSError) as error:
            if self.folder is not None and isinstance(error, SafetensorError):
                self._object_path(digest).unlink(missing_ok=True)  # so that it is written again
            raise CompileError(
                f"the bytes of {digest[:19]}… can't be read: {error}",
                hint="the cache or the model's files have changed; run the compile again",
            ) from error

    def tensor(self, digest: str) -> Tensor:
        """The one float tensor behind a digest that `put({"data": …})` or `point_at` made."""
        return self.get(digest)["data"]

    def _read_source(self, digest: str) -> Tensor:
        path, key = self._sources.get(digest) or self._read_pointer(digest)
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor.float()

    def _read_pointer(self, digest: str) -> tuple[Path, str]:
        if self.folder is None or not self._pointer_path(digest).exists():
            raise CompileError(
                f"no bytes are known for {digest[:19]}…",
                hint="a .gir file needs the cache of the compile that wrote it: give its --cache",
            )
        record = json.loads(self._pointer_path(digest).read_text())
        return Path(record["path"]), str(record["key"])

    def _object_path(self, digest: str) -> Path:
        assert self.folder is not None
        name = digest.removeprefix(DIGEST)
        return self.folder / "objects" / name[:2] / f"{name}.safetensors"

    def _pointer_path(self, digest: str) -> Path:
        assert self.folder is not None
        name = digest.removeprefix(DIGEST)
        return self.folder / "sources" / name[:2] / f"{name}.json"
