"""Build the runner: `python -m gammac.targets.tvm.runner FOLDER`."""

import sys
from pathlib import Path

from gammac.diagnostics import CompileError
from gammac.targets.tvm.runner import build_runner

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m gammac.targets.tvm.runner FOLDER")
    try:
        print(build_runner(Path(sys.argv[1])))
    except CompileError as error:
        sys.exit(f"error: {error}")
