"""Tables and lines for the command line: data in, something to print out. Prints nothing itself."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from gammac.driver import Compiled, Plan
from gammac.dryrun import Estimate
from gammac.explain import Explanation
from gammac.ir import Module
from gammac.models_zoo.registry import ZooModel
from gammac.pipeline import Pass, Step
from gammac.runtime.evaluate import Comparison
from gammac.runtime.probe import peak_rss_bytes
from gammac.summary import Row, timing_rows
from gammac.sweep_report import Grid
from gammac.targets.cost import Cost
from gammac.targets.energy import decode_joules
from gammac.targets.target import Target
from gammac.targets.tvm.cuda.report import KernelReport
from gammac.targets.tvm.names import EXAMPLE_NAME, STATIC_NAME


def weights(title: str, rows: Sequence[Row]) -> Table:
    """Formats, bits, bytes and predicted time of weights."""
    table = Table(title=title)
    for name in ("weights", "formats"):
        table.add_column(name, overflow="fold")
    for name in ("n", "parameters", "payload", "true", "KB", "µs/token"):
        table.add_column(name, justify="right")
    for row in rows:
        bits = (f"{row.payload_bits:.2f}", f"{row.true_bits:.2f}")
        sizes = (f"{row.bytes / 1e3:,.0f}", f"{row.seconds * 1e6:,.0f}")
        table.add_row(row.name, row.formats, str(row.weights), f"{row.parameters:,}", *bits, *sizes)
    return table


def device_kernels(reports: Sequence[KernelReport]) -> Table:
    """What is known of kernels for GPUs before they run."""
    table = Table(title="device code, as the assembler reports it; nothing was run")
    for name in ("kernel", "arch"):
        table.add_column(name, overflow="fold")
    for name in ("registers", "shared bytes", "stack", "spilled", "loads: bytes×instructions"):
        table.add_column(name, justify="right")
    for r in reports:
        figures = (r.registers, r.shared_bytes, r.stack_bytes, r.spill_bytes)
        loads = " ".join(f"{size}×{r.loads[size]}" for size in sorted(r.loads, key=int))
        table.add_row(r.kernel, r.arch, *map(str, figures), loads)
    return table


def cost_line(cost: Cost) -> str:
    """The whole module in a line."""
    return (
        f"weights {cost.bytes / 1e6:.1f} MB, payload {cost.payload_bits:.3f} bits, "
        f"true {cost.true_bits:.3f} bits, predicted {cost.decode_seconds * 1e3:.2f} ms/token, "
        f"prefill of 512 tokens {cost.prefill_seconds:.2f} s"
    )


def closing_lines(compiled: Compiled) -> Iterator[str]:
    """What a compile reached, what was not quantized and why, and what to do next."""
    manifest = compiled.manifest
    check = compiled.check.against_original if compiled.check is not None else None
    size = sum(entry.size_bytes for entry in manifest.files.values())
    yield (
        f"{size / 1e6:.1f} MB, payload {manifest.payload_bits:.3f} bits, true {manifest.true_bits:.3f} bits, "
        f"whole model {manifest.whole_model_bits:.3f} bits; "
        f"predicted {compiled.cost.decode_seconds * 1e3:.2f} ms/token{_predicted_loss(compiled.module)}"
    )
    if isinstance(check, Comparison):
        yield (
            f"checked on {check.tokens} tokens: KL {check.kl:.4f} nats to the original, "
            f"top token agrees {check.top1_agreement:.1%}"
        )
        yield from _rounding_line(compiled)
    elif check is not None:
        yield f"checked on {check.tokens} tokens: cosine {check.cosine:.4f} to the original"
    yield from (f"note: {note}" for note in compiled.notes)
    yield f"took {compiled.seconds:.0f} s, at most {peak_rss_bytes() / 1e9:.2f} GB of memory"
    yield _next_line(compiled)


def _next_line(compiled: Compiled) -> str:
    if compiled.elsewhere and STATIC_NAME in compiled.manifest.files:
        build = f"cc {EXAMPLE_NAME} {STATIC_NAME} -lm -pthread"
        return f"next, in {compiled.folder}, with a compiler for the device: {build}"
    verb = "run" if compiled.manifest.kind == "decoder" else "inspect"
    where = ", on the device" if compiled.elsewhere else ""
    return f"next{where}: gammac {verb} {compiled.folder}" + (" --prompt …" if verb == "run" else "")


def _predicted_loss(module: Module) -> str:
    """The sum of the scores, which --max-loss limits."""
    allocation = module.attrs.get("allocation")
    return f", loss {allocation['objective']:.4g}" if isinstance(allocation, Mapping) else ""


def _rounding_line(compiled: Compiled) -> Iterator[str]:
    """What rounding activations costs: the artifact against the same weights in the interpreter's floats."""
    if compiled.check is None or compiled.manifest.activations != "int8":
        return
    near = compiled.check.against_module
    if isinstance(near, Comparison):
        yield f"activations in int8: KL {near.kl:.4f} nats to the same weights in floats"


def estimate(plan: Plan, found: Estimate) -> Table:
    """What a dry run tells."""
    cost = found.cost
    rows = {
        "size": f"{cost.bytes / 1e6:.1f} MB",
        "payload bits": f"{cost.payload_bits:.3f}",
        "true bits": f"{cost.true_bits:.3f}",
        "whole-model bits": f"{cost.whole_model_bits:.3f}",
        "predicted decode": f"{cost.decode_seconds * 1e3:.2f} ms/token",
        "memory at run time": f"{cost.peak_bytes / 1e6:.0f} MB",
        **_energy(plan, found),
        "compile time": expected_time(found),
        "compile memory": f"about {found.peak_bytes / 1e9:.1f} GB",
        "calibration": f"{found.calibration_tokens} tokens",
    }
    return figures(f"{plan.source.name} → {plan.target.name} (dry run)", rows)


def _energy(plan: Plan, found: Estimate) -> dict[str, str]:
    joules = decode_joules(found.module, plan.target)
    return {} if joules is None else {"predicted energy": f"{1e3 * joules:.3f} mJ/token"}


def expected_time(found: Estimate) -> str:
    """Of a compile."""
    return f"about {found.seconds:.0f} s" if found.seconds < 90 else f"about {found.seconds / 60:.0f} min"


def figures(title: str, found: Mapping[str, Any]) -> Table:
    """Names and values."""
    table = Table(title=title, show_header=False)
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    return table


def side_by_side(title: str, found: Mapping[str, Mapping[str, float]]) -> Table:
    """A column for each contestant, a row for each figure."""
    table = Table(title=title)
    table.add_column("")
    for label in found:
        table.add_column(label, justify="right", overflow="fold")
    for figure in next(iter(found.values())):
        table.add_row(figure, *(f"{column[figure]:.4g}" for column in found.values()))
    return table


def options(found: Explanation) -> Table:
    """What one weight would be in each format; the chosen one is bold."""
    table = Table(title=found.weight.name)
    for name in ("format", "score", "output error", "payload", "true", "KB", "µs/token"):
        table.add_column(name, justify="left" if name == "format" else "right")
    for o in found.options:
        numbers = ("–" if n is None else f"{n:.3g}" for n in (o.score, o.error))
        bits = (f"{b / o.parameters:.2f}" for b in (o.payload_bits, o.true_bits))
        sizes = (f"{o.bytes / 1e3:,.1f}", f"{o.seconds * 1e6:,.1f}")
        table.add_row(o.format, *numbers, *bits, *sizes, style="bold" if o.format == found.chosen else "")
    return table


def steps(found: Explanation) -> Table:
    """A step wider and narrower, and what bits bring elsewhere."""
    table = Table(title=f"one step from {found.chosen}")
    for name in ("", "step", "score", "KB", "µs/token", "score for a Mbit"):
        table.add_column(name, justify="right" if name not in ("", "step") else "left", overflow="fold")
    rows = {
        "wider": found.wider, "narrower": found.narrower,
        "best not taken elsewhere": found.best_left, "worst taken elsewhere": found.worst_taken,
    }  # fmt: skip
    for name, step in rows.items():
        if step is not None:
            where = "" if step.weights == found.together else f"{step.weights[0]}: "
            sizes = (f"{step.score:+.3g}", f"{step.bytes / 1e3:+,.1f}", f"{step.seconds * 1e6:+,.1f}")
            table.add_row(name, f"{where}{step.before} → {step.after}", *sizes, f"{step.price:.3g}")
    return table


def grid(found: Grid) -> Table:
    """A table of a sweep."""
    table = Table(title=found.title)
    for index, name in enumerate(found.head):
        table.add_column(name, justify="right" if index else "left")
    for r, row in enumerate(found.rows):
        table.add_row(*(f"[bold]{c}[/]" if (r, i) in found.best else c for i, c in enumerate(row)))
    return table


def timings(steps: Sequence[Step]) -> Table:
    """What each pass took."""
    table = Table("pass", "seconds", "", title="passes")
    for name, seconds, cached in timing_rows(steps):
        table.add_row(name, f"{seconds:.1f}", "from the cache" if cached else "")
    return table


def op_counts(module: Module) -> Iterator[str]:
    """How often each function uses each op."""
    for function in module.functions.values():
        counts: dict[str, int] = {}
        for op in function.ops:
            counts[op.name] = counts.get(op.name, 0) + 1
        parts = ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda c: (-c[1], c[0])))
        yield f"@{function.name}: {len(function.ops)} ops: {parts}"


def passes(table_of_passes: Mapping[str, type[Pass]]) -> Table:
    """Names, options with their defaults, and invariants."""
    table = Table("pass", "options", "requires", "ensures")
    for name, kind in table_of_passes.items():
        options = ", ".join(f"{f.name}={f.default}" for f in dataclasses.fields(kind))  # type: ignore[arg-type]
        table.add_row(
            name, options, *(", ".join(i.__name__ for i in g) for g in (kind.requires, kind.ensures))
        )
    return table


def targets(found: Sequence[Target]) -> Table:
    """One row a target."""
    table = Table("target", "emitter", "threads", "GB/s", "description")
    for target in found:
        table.add_row(
            target.name, target.emitter, str(target.threads), f"{target.dram_gbps:g}", target.description
        )
    return table


def kernels(target: Target) -> Table:
    """What a target runs fast."""
    title = f"{target.name}: {target.description} ({target.emitter}, {target.arch})"
    table = Table("kernel", "for", "codes", "bits", "group sizes", "needs", title=title)
    for kernel in target.kernels:
        groups = " ".join(str(g) if g else "channel" for g in kernel.groups)
        needs = "a C++ compiler" if kernel.needs_compiler else ""
        bits = " ".join(f"{b:g}" for b in kernel.bits)
        table.add_row(kernel.op, kernel.role, kernel.kind, bits, groups, needs)
    return table


def analysed(target: Target) -> Table:
    """Rates of kernels that were counted, not timed."""
    table = Table("bits", "group", "10⁹ weights/s", "10⁹ op/s", "source", title="analysed, one thread")
    for row in target.analysed:
        table.add_row(str(row.bits), str(row.group), f"{row.gweights:g}", f"{row.gflops:g}", row.source)
    return table


def models(found: Mapping[str, ZooModel]) -> Table:
    """The zoo."""
    table = Table("model", "parameters", "licence", "description")
    for name, model in found.items():
        table.add_row(name, f"{model.parameters:,}", model.licence, model.description)
    return table
