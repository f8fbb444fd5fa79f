"""What adapters beside the codes cost in TVM: decode and prefill with several ranks on one base, in turns.

The base is rounded to nearest and the adapters are random: the speed does not depend on them. A row says
tokens a second, the median of the rounds, their share of those of the base alone (rank 0), and how many bytes
a token reads for each that it reads there: where memory is the limit, decode can reach one over that. `plain`
is the same model with adapters as products of floats of their own, as any other weight in f32.

Run: python benchmarks/adapter_cost.py smollm2-135m [--ranks 8 64] [--format w4g64] [--threads 1] [--plain]
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from gammac.driver import Plan, Request, context_of, make_plan
from gammac.ir import Module
from gammac.passes import Choices, default_pipeline
from gammac.passes.add_adapters import with_adapters
from gammac.passes.legalize_tvm import LegalizeTvm
from gammac.pipeline import Pipeline
from gammac.runtime.bench import Work
from gammac.runtime.runners import SessionRunner
from gammac.runtime.session import ArtifactSession, open_tvm

HEAD: Final = ("rank", "decode tok/s", "of the base's", "bytes, base = 1", "prefill tok/s", "of the base's")


def base_of(plan: Plan) -> Module:
    """The model in codes, as the passes leave it before they turn to the emitter."""
    passes = default_pipeline(plan.request.choices, "tvm", compiler=True)
    return Pipeline([p for p in passes if not isinstance(p, LegalizeTvm)]).run(plan.module, context_of(plan))


def adapted(module: Module, rank: int, plan: Plan) -> Module:
    """Random adapters beside all the blocks' linears."""
    random, factors = torch.Generator().manual_seed(0), {}
    for name, weight in module.weights.items():
        if weight.attrs.get("role") == "block":
            rows, columns = (int(str(size)) for size in weight.type.shape)
            a = torch.randn(rank, columns, generator=random) / columns**0.5
            factors[name] = (a, torch.randn(rows, rank, generator=random) * 0.01)
    return with_adapters(module, factors, plan.store)


def plainly(module: Module) -> Module:
    """Adapters that the emitter does not know from other weights."""
    known = [w for w in module.weights.values() if "adapter" in w.attrs]
    attrs = ({k: v for k, v in w.attrs.items() if k != "adapter"} for w in known)
    return module.with_weights(*(replace(w, attrs=a) for w, a in zip(known, attrs, strict=True)))


def emitted(module: Module, plan: Plan, folder: Path, threads: int) -> ArtifactSession:
    """A session on the module's artifact."""
    folder.mkdir()
    plan.backend.emit(LegalizeTvm(1024).run(module, context_of(plan)), plan.store, folder)
    return open_tvm(folder, threads)


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--format", default="w4g64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="adapters as plain products, too")
    args = parser.parse_args()
    choices = Choices(args.format, quantizer="rtn", strategy="uniform")
    plan = make_plan(Request(args.model, "cpu", args.format[1], choices, backend="tvm"))
    base = base_of(plan)
    modules = {"0": base}
    for rank in args.ranks:
        modules[str(rank)] = adapted(base, rank, plan)
        if args.plain:
            modules[f"{rank}, plain"] = plainly(modules[str(rank)])
    with tempfile.TemporaryDirectory() as place:
        sessions = {
            name: emitted(module, plan, Path(place, name), args.threads) for name, module in modules.items()
        }
        report(args, sessions)


def report(args: argparse.Namespace, sessions: dict[str, ArtifactSession]) -> None:
    """Time all in turns, after a round that warms up; print the table."""
    work, runners = Work(rounds=args.rounds), {n: SessionRunner(s) for n, s in sessions.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for _ in range(work.rounds + 1):
        for name, runner in runners.items():
            decode = work.new / runner.decode_seconds(work.prompt, work.new)
            found[name].append((decode, work.prefill / runner.prefill_seconds(work.prefill)))
    print(f"{args.model}, {args.format}, {args.threads} threads\n\n| {' | '.join(HEAD)} |")
    print("|---" * len(HEAD) + "|")
    rates = {n: [statistics.median(column) for column in zip(*r[1:], strict=True)] for n, r in found.items()}
    read = {name: session.weight_bytes_per_token for name, session in sessions.items()}
    for name, (decode, prefill) in rates.items():
        shares = decode / rates["0"][0], read[name] / read["0"], prefill / rates["0"][1]
        print(
            f"| {name} | {decode:.1f} | {shares[0]:.3f} | {shares[1]:.3f} | {prefill:.0f} | {shares[2]:.3f} |"
        )


if __name__ == "__main__":
    main()
