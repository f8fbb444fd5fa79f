"""onnxruntime-genai's own builder."""

import subprocess
import sys
from pathlib import Path

from gammac.diagnostics import CompileError
from gammac.frontend.source import Source


def build_genai(source: Source, type_: str, folder: Path) -> None:
    """Write `source` in int4, fp16 or fp32 to the folder, by the builder's defaults. Raises CompileError."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command = [*builder, "-m", str(source.folder), "-o", str(folder), "-p", type_, "-e", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise CompileError(
            f"onnxruntime-genai can't build {source.name} in {type_}: {last}",
            hint="it wants the extra gammac[genai], and a folder in transformers' form",
        )
