"""llama.cpp's own quantizations with an importance matrix, through llama-cpp-python."""

import ctypes
from pathlib import Path
from typing import Any, Final

from gammac.diagnostics import CompileError
from gammac.frontend.source import Source
from gammac.peers.gguf_model import gguf_name, write_gguf
from gammac.peers.importance import as_c_array, input_squares
from gammac.runtime.peers import GGUF, import_llama_cpp

PLAIN: Final = ("F16", "BF16", "Q8_0")
"""Types that use no importance matrix."""


def build_llama_cpp(source: Source, type_: str, folder: Path) -> None:
    """Write `source` in a type such as Q4_0, Q3_K_M, IQ3_XXS or F16 to the folder. Raises CompileError."""
    llama = import_llama_cpp()
    file_type = _file_type(llama, type_)
    plain = folder / "f16.gguf"
    write_gguf(source, plain)
    params = llama.llama_model_quantize_default_params()
    params.ftype = file_type
    if type_ not in PLAIN:
        importance = {gguf_name(name): values for name, values in input_squares(source).items()}
        params.imatrix = as_c_array(llama, importance)
    names = (str(plain).encode(), str(folder / GGUF).encode())
    if llama.llama_model_quantize(*names, ctypes.byref(params)) != 0:
        raise CompileError(
            f"llama.cpp can't quantize {source.name} to {type_}",
            hint="make the file with llama-quantize, which says why, and give --vs FILE.gguf",
        )
    plain.unlink()


def _file_type(llama: Any, type_: str) -> int:
    prefix = "LLAMA_FTYPE_MOSTLY_"
    known = {name.removeprefix(prefix): name for name in dir(llama) if name.startswith(prefix)}
    if type_ not in known:
        raise CompileError(f"llama.cpp has no type {type_!r}", hint=f"one of {', '.join(sorted(known))}")
    return int(getattr(llama, known[type_]))
