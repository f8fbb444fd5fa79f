"""Products with packed weights for GPUs, as far as they are known without one.

    python benchmarks/cuda_static.py [--archs sm_80,sm_90] [--formats w2g64,w4g64] [--size 4096]

Registers are a thread's, shared memory a block's of 128 threads, both as the assembler says; loads are those
of a thread from the GPU's memory in PTX, as bytes×instructions: as many of 16 bytes as a code has bits are
the weight's, the others read x. Nothing is timed.
"""

import argparse

import tvm
from tvm.target import Target

from gammac.formats import parse_format
from gammac.targets.tvm.build import demand_linker
from gammac.targets.tvm.cuda import emit
from gammac.targets.tvm.cuda.kernels import CudaDevice
from gammac.targets.tvm.cuda.loader import load_cuda
from gammac.targets.tvm.cuda.report import KernelReport
from gammac.targets.tvm.kernels.lowering import lowering

FORMATS = ",".join(
    [
        *(f"w{bits}g64" for bits in range(1, 9)), "w4g16", "w4g128-sym", "w3channel",
        *(f"nf{bits}g64" for bits in (2, 3, 4)), "nf4g64-offset", *(f"tcq{bits}" for bits in (1, 2, 3, 4)),
        *(f"s24w{bits}g64-hw" for bits in (2, 4, 6, 8)),
    ]
)  # fmt: skip


def kernels(formats: list[str], size: int) -> dict[str, object]:
    """A decode and a prefill kernel for each format."""
    device, made = CudaDevice(gpu=True), {}
    for name in formats:
        format_ = parse_format(name)
        assert device.takes(format_), f"{format_.name} has no CUDA kernel"
        for what, rows in (("decode", 1), ("prefill", None)):
            func = device.linear(rows, format_, size, size, False, False)
            key = f"{what}_{name.replace('-', '_')}"
            made[key] = func.with_attr("global_symbol", key)
    return made


def reports(formats: list[str], size: int, archs: list[str]) -> list[KernelReport]:
    """All of them compiled, on every architecture."""
    host = emit.launcher_isa()
    load_cuda(demand_linker(host.machine))
    target = Target(emit.target_for(archs, host))
    with emit.device_compiler(archs) as found, lowering(), target:
        tvm.compile(tvm.IRModule(kernels(formats, size)), target=target)
    return found


def row(r: KernelReport) -> str:
    """One line of the table."""
    what, _, name = r.kernel.partition("_")
    loads = " ".join(f"{size}×{r.loads[size]}" for size in sorted(r.loads, key=int))
    return (
        f"| {name.replace('_sym', '-sym')} | {what} | {r.arch} | {r.registers} | {r.shared_bytes} "
        f"| {r.spill_bytes} | {loads} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--archs", default="sm_80,sm_90")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--size", type=int, default=4096, help="rows and inputs of the weight")
    asked = parser.parse_args()
    print("| format | kernel | arch | registers | shared bytes | spill bytes | loads |")
    print("|---|---|---|---|---|---|---|")
    for r in reports(asked.formats.split(","), asked.size, asked.archs.split(",")):
        print(row(r))


if __name__ == "__main__":
    main()
