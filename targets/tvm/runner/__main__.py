"""Build the runner: `python -m gammac.targets.tvm.runner FOLDER [--machine aarch64 --wheels DIR]`."""

import argparse
import platform
import sys
from pathlib import Path

from gammac.diagnostics import CompileError
from gammac.targets.tvm.runner import WHEELS, build_runner

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m gammac.targets.tvm.runner", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--machine", default=platform.machine(), choices=[*WHEELS], help="what it is to run on"
    )
    parser.add_argument("--wheels", type=Path, help="folder of TVM's wheels for another machine")
    wish = parser.parse_args()
    try:
        print(build_runner(wish.folder, wish.machine, wish.wheels))
    except CompileError as error:
        sys.exit(f"error: {error}")
