"""compile(): the recipe from a model's name to an artifact on disk.

capture → passes → emit → check against the original → seal
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from gammac.backends import Backend, backend_of
from gammac.budget import SIZE, Budget, parse_budgets
from gammac.cache import PassCache, key_of
from gammac.closing_check import closing_check
from gammac.diagnostics import CompileError
from gammac.files import write_atomically
from gammac.formats import TWO_FOUR, parse_format, parse_formats
from gammac.frontend.export import Source, capture, load_source
from gammac.ir import Module, to_text
from gammac.models_zoo.fetch import default_cache, fetch
from gammac.models_zoo.registry import MODELS
from gammac.models_zoo.texts import default_calibration_text
from gammac.notes import fallbacks, not_quantized, notes_on
from gammac.passes import Choices, default_pipeline, refine_of, strategy_of
from gammac.passes.add_adapters import keys_of
from gammac.passes.allocate import check_objective
from gammac.passes.finetune import Distill
from gammac.passes.legalize_onnx import within_context
from gammac.passes.refine import Refine
from gammac.passes.sensitivity import NEED_NEXT_TOKEN
from gammac.pipeline import Context, Observer, Pipeline, Step
from gammac.progress import Progress, no_progress
from gammac.room import demand_room
from gammac.runtime.artifact import seal
from gammac.runtime.check import Check
from gammac.runtime.evaluate import Comparison, OutputComparison
from gammac.runtime.manifest import TOOLS, Manifest, tool_versions
from gammac.runtime.staging import check_writable, staging
from gammac.targets.cost import Cost, module_cost
from gammac.targets.onnx.emit import emitted_function
from gammac.targets.target import ANY, BLOCK, NO_EMITTER, REFERENCE, TABLE, Target, load_target
from gammac.texts import Calibration, read_text, token_windows
from gammac.trained_model import demand_trained, trained_choices, with_bypass, with_own_adapters
from gammac.weights import WeightStore

TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "generation_config.json",
)  # fmt: skip
# of the graph without its weights and the manifest; the size is checked again when they are written
GRAPH_BYTES_PER_OP: Final = 500
LIBRARY_BYTES: Final = 350_000
SIZE_TRIES: Final = 3
# of a check that runs a GPU's kernels as loops
LIBRARY_SUFFIXES: Final = (".so", ".dylib", ".dll")
MODULE: Final = "module.gir"


@dataclass(frozen=True)
class Request:
    """Everything that decides an artifact. Equal requests on one machine give equal bytes."""

    model: str
    target: str = "cpu"
    budget: str = "3"
    choices: Choices = field(default_factory=Choices)
    calibration: Path | None = None
    calibration_windows: int = 128
    calibration_length: int = 512
    seed: int = 0
    trust_remote_code: bool = False
    # without the native library of wide and narrow widths, even where a compiler is at hand
    portable: bool = False
    # the emitter, where the target has several; the longest sequence; what products take: "" and 0 leave
    # it to the target and the emitter
    backend: str = ""
    context: int = 0
    product_inputs: str = ""  # int8 or float; the backend's choice if neither
    static_library: bool = False  # beside model.so, for programs in C


@dataclass(frozen=True)
class Plan:
    """A request whose parts have been found and checked, before any long work."""

    request: Request
    target: Target
    budgets: tuple[Budget, ...]
    source: Source
    module: Module
    store: WeightStore
    cache: PassCache
    folder: Path
    backend: Backend
    capture_seconds: float

    @property
    def compiler(self) -> bool:
        """Whether each width has a kernel of its own: for ONNX, a C++ compiler makes them."""
        return self.backend.every_width


@dataclass(frozen=True)
class Compiled:
    """What a compile leaves: the folder, the module as emitted, and what was found on the way."""

    folder: Path
    module: Module
    manifest: Manifest
    cost: Cost
    check: Check[Comparison] | Check[OutputComparison] | None  # None: nothing could be run
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    seconds: float
    elsewhere: str = ""  # why this machine can't run it


def resolve(model: str, trust_remote_code: bool = False) -> Source:
    """A zoo name, a transformers folder, a .gguf file or a hub name. Raises CompileError."""
    if model in MODELS and not Path(model).exists():
        return replace(load_source(str(fetch(model))), name=model)
    source = load_source(model, trust_remote_code=trust_remote_code)
    # artifacts name their model, not the place where it lay
    return replace(source, name=Path(model).resolve().name) if Path(model).exists() else source


def make_plan(request: Request, cache: Path | None = None, *, artifact: bool = True) -> Plan:
    """Find the model, capture it, and check target, budgets and formats. Raises CompileError.

    `artifact`: whether one is to be written, which some targets can't.
    """
    started = time.perf_counter()
    target = load_target(request.target, request.backend or None)
    budgets = parse_budgets(request.budget)
    folder = cache or default_cache()
    backend = backend_of(
        target, folder, portable=request.portable, product_inputs=request.product_inputs,
        static_library=request.static_library,
    )  # fmt: skip
    check_target(target, request.choices, compiler=backend.every_width, artifact=artifact)
    default_pipeline(request.choices, target.emitter, compiler=backend.every_width)
    check_objective(request.choices.objective, budgets)
    if request.calibration is not None:
        read_text(request.calibration)
    source = resolve(request.model, request.trust_remote_code)
    if demand_trained(request.choices, source):
        request = replace(request, choices=trained_choices(request.choices, source))
        default_pipeline(request.choices, target.emitter, compiler=backend.every_width)
    store = WeightStore(folder / "weights")
    module = with_bypass(capture(source, store), source, store)
    wanted = (strategy_of(request.choices), *refine_of(request.choices))
    needy = [p.name for p in wanted if p.name in NEED_NEXT_TOKEN or isinstance(p, Refine)]
    needy += [Distill.name] if request.choices.distill else []
    if module.attrs.get("kind") == "encoder" and needy and not request.choices.trained:
        raise CompileError(
            f"{source.name} is an encoder: {needy[0]} needs a next token", hint="use --strategy weight_mse"
        )
    within_context(module, request.context)
    if artifact:
        demand_room(module, target, (request.choices.block, request.choices.table), request.context)
    backend.demand(module, Context(target, store))
    seconds = time.perf_counter() - started
    passes = PassCache(folder / "passes")
    return Plan(request, target, budgets, source, module, store, passes, folder, backend, seconds)


def check_target(target: Target, choices: Choices, *, compiler: bool, artifact: bool) -> None:
    """Raises CompileError for kinds of formats that a target doesn't run, and for one that writes nothing."""
    if artifact and target.emitter == NO_EMITTER and not target.refusal:
        raise CompileError(
            f"nothing can be compiled for {target.name}: it has no emitter",
            hint="gammac sweep measures allocations on it; compile for another target, such as cpu",
        )
    for role, wished in ((BLOCK, choices.block), (TABLE, choices.table)):
        kinds = target.kinds(role, compiler=compiler)
        foreign = [f.name for f in parse_formats(wished) if not {f.kind, ANY} & kinds]
        _refuse_two_four(target, foreign)
        sparse = [name for name in foreign if parse_format(name).density < 1]
        if foreign:
            raise CompileError(
                f"{target.name} ({target.emitter}) does not run {', '.join(foreign)} as {role} weights"
                + ("" if compiler else " without a C++ compiler"),
                hint=("--backend tvm runs other kinds; " if target.emitter == "onnx" and not sparse else "")
                + f"it runs {' and '.join(sorted(kinds))} codes, such as w4g64: gammac targets show "
                f"{target.name}; gammac sweep --target {REFERENCE} measures any format without an artifact",
            )


def _refuse_two_four(target: Target, names: Sequence[str]) -> None:
    sparse = [name for name in names if parse_format(name).kind == TWO_FOUR]
    if sparse and target.emitter == "onnx":
        raise CompileError(
            f"ONNX Runtime has no operator for 2:4 weights, such as {', '.join(sparse)}; expanded, they "
            "would gain nothing",
            hint="--backend tvm runs the packed form, gammac sweep --target reference measures it; or leave "
            "out --sparsity",
        )


def demand_predictions(plan: Plan, who: str) -> None:
    """Raises CompileError for a model whose predictions on a text `who`, such as a sweep, can't compare."""
    if plan.module.attrs.get("kind") == "encoder":
        raise CompileError(
            f"{plan.source.name} is an encoder: {who} compares predictions of the next token",
            hint="compile it in each way, and compare outputs with gammac eval --reference",
        )
    if plan.source.tokenizer is None:
        raise CompileError(f"{plan.source.name} has no tokenizer, so that no text can be read")


def calibration_of(plan: Plan) -> Calibration | None:
    """The calibration windows of a plan; None for a model without a tokenizer. Raises CompileError."""
    request, tokenizer = plan.request, plan.source.tokenizer
    if tokenizer is None:
        return None
    text = read_text(request.calibration) if request.calibration else default_calibration_text()
    length = min(request.calibration_length, int(str(plan.module.attrs.get("max_positions", 512))))
    return Calibration(token_windows(text, tokenizer, length, request.calibration_windows, spread=True))


def context_of(plan: Plan, progress: Progress = no_progress) -> Context:
    """What the passes of a plan may look at."""
    return Context(
        plan.target, plan.store, plan.budgets, calibration_of(plan), plan.request.seed, progress, plan.cache
    )


def tokenizer_files(source: Source) -> list[Path]:
    """The tokenizer's files as they came, which every reader of them knows."""
    return [source.folder / name for name in TOKENIZER_FILES if (source.folder / name).is_file()]


def extra_bytes(plan: Plan, module: Module) -> int:
    """What an artifact holds besides weights, before it is written: tokenizer, graph, library."""
    graph = GRAPH_BYTES_PER_OP * max(len(f.ops) for f in module.functions.values())
    return sum(p.stat().st_size for p in tokenizer_files(plan.source)) + graph + LIBRARY_BYTES


def compile_model(
    plan: Plan, out: Path, *, overwrite: bool = True, progress: Progress = no_progress,
    observers: Sequence[Observer] = (),
) -> Compiled:  # fmt: skip
    """Run a plan and leave an artifact at `out`. Raises CompileError; then nothing is left there."""
    started = time.perf_counter()
    check_writable(out, overwrite)
    ctx = context_of(plan, progress)
    steps: list[Step] = []
    with staging(out, overwrite) as folder:
        written = _lower_within_size(plan, ctx, folder, (*observers, steps.append))
        manifest = manifest_of(plan, written)
        original = with_own_adapters(plan.module, plan.request.choices, plan.store)
        checked = closing_check(plan.backend, original, written.module, ctx, folder, manifest, plan.folder)
        manifest = seal(folder, manifest)
    cost = module_cost(written.module, plan.target)
    seconds = time.perf_counter() - started + plan.capture_seconds
    notes = (
        *notes_on(plan.request.choices, plan.target, written.module, compiler=plan.compiler),
        *filter(None, [checked.note]),
    )
    found = (checked.check, tuple(steps), notes, seconds, plan.backend.elsewhere)
    return Compiled(out, written.module, manifest, cost, *found)


@dataclass(frozen=True)
class Written:
    """A module as its emitter wrote it, the bytes of the folder, and its native library's name."""

    module: Module
    size_bytes: int
    library: str


def _lower_within_size(plan: Plan, ctx: Context, folder: Path, observers: tuple[Observer, ...]) -> Written:
    """Passes and emission; once more with less room where the files came out larger than a budget."""
    limit = min((int(b.exact) for b in plan.budgets if b.kind == SIZE), default=None)
    extra = extra_bytes(plan, plan.module)
    for _ in range(SIZE_TRIES):
        passes = default_pipeline(
            plan.request.choices,
            plan.target.emitter,
            compiler=plan.compiler,
            extra_bytes=extra if limit else 0,
            context=plan.request.context,
        )
        module = Pipeline(passes, observers).run(plan.module, ctx)
        written = _write(plan, module, ctx, folder)
        if limit is None or written.size_bytes <= limit:
            return written
        extra += written.size_bytes - limit
    raise CompileError(f"the artifact is larger than the {limit} bytes granted", hint="grant a little more")


def _write(plan: Plan, module: Module, ctx: Context, folder: Path) -> Written:
    shutil.rmtree(folder)
    folder.mkdir()
    files = plan.backend.emit(module, ctx.store, folder)
    library = next((p.name for p in files if p.suffix in LIBRARY_SUFFIXES), "")
    for path in tokenizer_files(plan.source):
        shutil.copyfile(path, folder / path.name)
    write_atomically(folder / MODULE, to_text(emitted_part(module)).encode())
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    # the manifest comes last, with a line of less than 150 bytes for each file
    size += len(manifest_of(plan, Written(module, 0, library)).to_json()) + 150 * len(list(folder.iterdir()))
    return Written(module, size, library)


def emitted_part(module: Module) -> Module:
    """The module with the one function that artifacts hold, and the weights that it reads."""
    function = emitted_function(module)
    return replace(module, functions={function.name: function}).without_unused_weights()


def manifest_of(plan: Plan, written: Written) -> Manifest:
    """What the artifact says of itself."""
    module = written.module
    cost = module_cost(module, plan.target)
    parameters = sum(w.type.numel() for w in plan.module.weights.values())
    weights = {n: w for n, w in module.weights.items() if "stored" in w.attrs}
    return Manifest(
        model=plan.source.name,
        model_digest=model_digest(plan.module),
        target=plan.target.name,
        kind=str(module.attrs["kind"]),
        emitter=plan.target.emitter,
        context=int(str(module.attrs["max_positions"])),
        payload_bits=round(cost.payload_bits, 6),
        true_bits=round(cost.true_bits, 6),
        whole_model_bits=round(8 * written.size_bytes / parameters, 6),
        budgets=tuple(str(b) for b in plan.budgets),
        allocation={n: str(w.attrs["stored"]) for n, w in weights.items()},
        predicted={"seconds_per_token": round(cost.decode_seconds, 9), "peak_bytes": cost.peak_bytes},
        not_quantized=dict(not_quantized(module)),
        fallbacks=dict(fallbacks(plan.request.choices, module)),
        library=written.library,
        provider=plan.target.provider,
        labels=labels_of(module),
        activations=plan.backend.activations,
        code=plan.backend.code,
        adapters={n: keys_of(w) for n, w in module.weights.items() if "adapter" in w.attrs},
        adapter_base=str(module.attrs.get("adapter_base", "")),
        tools=tool_versions((*TOOLS, *plan.backend.tools)),
    )


def labels_of(module: Module) -> tuple[str, ...]:
    """The classes of a classifier; none for other modules."""
    labels = module.attrs.get("labels", ())
    assert isinstance(labels, tuple)
    return tuple(map(str, labels))


def model_digest(module: Module) -> str:
    """One digest of all source weights."""
    return "sha256:" + key_of(*sorted(f"{n}={w.digest}" for n, w in module.weights.items()))
