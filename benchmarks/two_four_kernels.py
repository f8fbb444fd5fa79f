"""Times 2:4 weights against dense ones of the same width in the TVM backend's decode kernel.

Both run from their packed form. Every call reads another copy of the weight, 192 MB of them, so that none
comes from a cache; all are taken in turn and medians are reported. What is printed is dense over 2:4 seconds
of one token, above 1 where 2:4 is faster, beside the ratio of bytes, which is what it could be at best.

Run: python benchmarks/two_four_kernels.py [--threads 1] [--bits 2 3 4 8] [--float] [--cpu-time]
"""

import argparse
import os
import time

from tvm_kernels import Memory, decode, medians


def main() -> None:
    """A row for each width and each way to store positions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--isa", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--float", action="store_true", help="inputs in f32 instead of int8")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use; one thread")
    args = parser.parse_args()
    os.environ.update(TVM_NUM_THREADS=str(args.threads), TVM_BIND_THREADS="0")
    from gammac.formats import parse_format
    from gammac.targets.tvm.kernels import isa_of, packed_bytes

    clock, isa = time.process_time if args.cpu_time else time.perf_counter, isa_of(args.isa)
    shape, memory = (args.rows, args.columns), Memory(huge=False)
    for bits in args.bits:
        names = [f"w{bits}g{args.group}", f"s24w{bits}g{args.group}", f"s24w{bits}g{args.group}-hw"]
        sizes = {n: packed_bytes(parse_format(n), *shape, isa) for n in names}  # type: ignore[arg-type]
        runs = {n: decode(n, shape, isa, not args.float, memory, clock) for n in names}
        found = {n: seconds * sizes[n] for n, seconds in medians(runs, args.repeats).items()}
        for name in names[1:]:
            speed, least = found[names[0]] / found[name], sizes[names[0]] / sizes[name]
            print(
                f"decode {shape[0]}x{shape[1]} {name:12} threads {args.threads}: {speed:.2f}x {names[0]}, "
                f"bytes {least:.2f}x fewer, {1e-9 * shape[0] * shape[1] / found[name]:.1f} Gweights/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
