"""What `gammac bench --vs` compares with: other runtimes' own quantized models of the same source.

    peers_of("llama.cpp:Q4_0,openvino", "smollm2-135m", cache, say)

A peer is a path that is there already (a .gguf file, an OpenVINO .xml, a folder of
onnxruntime-genai or of gammac), or a runtime's name with a type of quantization, whose model is then
built once into the cache.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gammac import __version__
from gammac.diagnostics import CompileError
from gammac.driver import resolve
from gammac.frontend.source import Source
from gammac.peers.genai import build_genai
from gammac.peers.llama_cpp import build_llama_cpp
from gammac.peers.openvino import build_openvino
from gammac.runtime.manifest import tool_versions
from gammac.runtime.peers import GGUF, IMPORTS, OPENVINO, Contestant, runtime_of


@dataclass(frozen=True)
class Recipe:
    """How a runtime's model is made: the packages, the usual type, the file in it that the runtime opens."""

    packages: tuple[str, ...]
    default: str
    opens: str
    build: Callable[[Source, str, Path], None]
    """Source, type and an empty folder; raises CompileError."""


RECIPES: Final[Mapping[str, Recipe]] = {
    "llama.cpp": Recipe(("llama-cpp-python",), "Q4_0", GGUF, build_llama_cpp),
    "openvino": Recipe(("openvino", "nncf"), "int4", OPENVINO, build_openvino),
    "onnxruntime": Recipe(("onnxruntime-genai",), "int4", "", build_genai),
}


def peers_of(
    names: str, model: str | None, cache: Path, skip: Callable[[str], None] = print
) -> list[Contestant]:
    """The contestants that a comma-separated list names, built where they must be.

    That a peer is not installed is told to `skip` rather than raised, as long as another one is left.
    Raises CompileError for an unknown name, for a model that a peer can't take, or if none is left.
    """
    found: list[Contestant] = []
    skipped: list[CompileError] = []
    for name in dict.fromkeys(part.strip() for part in names.split(",") if part.strip()):
        runtime, _, type_ = name.partition(":")
        if Path(name).exists():
            found.append(Contestant(name, runtime_of(Path(name)), Path(name)))
        elif runtime not in RECIPES:
            raise CompileError(
                f"no peer {name!r}: neither a path nor a runtime",
                hint=f"one of {', '.join(RECIPES)}, with a type behind a colon, as in llama.cpp:Q3_K_M",
            )
        elif (missing := _missing(runtime)) is not None:
            skipped.append(missing)
        else:
            found.append(_built(runtime, type_ or RECIPES[runtime].default, model, cache))
    if skipped and not found:
        raise skipped[0]
    for error in skipped:
        skip(f"skipped: {error}")
    return found


def _missing(runtime: str) -> CompileError | None:
    try:
        IMPORTS[runtime]()
    except CompileError as error:
        return error
    return None


def _built(runtime: str, type_: str, model: str | None, cache: Path) -> Contestant:
    if model is None:
        raise CompileError(f"{runtime} needs the model that it is to run", hint="give --model MODEL")
    recipe, source = RECIPES[runtime], resolve(model)
    place = cache / "peers" / f"{source.name}-{runtime}-{type_}-{_key(source, recipe)}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
        try:
            recipe.build(source, type_, work)
            os.replace(work, place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Contestant(f"{runtime} {type_}", runtime, place / recipe.opens)


def _key(source: Source, recipe: Recipe) -> str:
    """What a built model depends on: the source's files as they are now, gammac and the packages."""
    files = sorted(p for p in source.folder.iterdir() if p.is_file())
    stamps = [f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256(
        "\n".join([__version__, *stamps, *_versions(recipe.packages)]).encode()
    ).hexdigest()[:12]


def _versions(packages: Sequence[str]) -> list[str]:
    return [f"{name} {version}" for name, version in tool_versions(packages).items()]
