"""What the processor of this machine has."""

from pathlib import Path
from typing import Final

# what runs ONNX Runtime's operators, as targets and artifacts spell it
CPU: Final = "cpu"
CUDA: Final = "cuda"
PROVIDERS: Final = (CPU, CUDA)


def host_flags() -> frozenset[str]:
    """What /proc/cpuinfo says that this processor has; nothing where there is no such file."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
