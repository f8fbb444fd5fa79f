"""`gammac run`, `eval` and `bench`: what is done with an artifact."""

import json
import sys
from pathlib import Path
from typing import Any, Final

import click

from gammac.cli.console import ERR, OUT, show_progress
from gammac.diagnostics import CompileError

ARTIFACT: Final = click.argument("artifact", type=click.Path(path_type=Path))
THREADS: Final = click.option("--threads", type=click.IntRange(1), help="Default: the physical cores.")
ADAPTERS: Final = click.option(
    "--adapters", type=click.Path(path_type=Path),
    help="An adapters.safetensors in place of the artifact's, trained on the same base with the same rank.",
)  # fmt: skip


@click.command()
@ARTIFACT
@click.option("--prompt", required=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0: always the likeliest token.",
)
@click.option(
    "--top-k", type=click.IntRange(0), default=0, show_default=True, help="Of so many tokens; 0: of all."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the likeliest that have this share.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--chat/--no-chat", default=None, help="Use the chat template (default: if there is one).")
@ADAPTERS
@THREADS
def run(
    artifact: Path, prompt: str, chat: bool | None, adapters: Path | None, threads: int | None,
    **sampling: Any,
) -> None:  # fmt: skip
    """Generate text from an artifact."""
    from gammac.runtime.generate import end_tokens, generate, load_tokenizer
    from gammac.runtime.imports import without_torch
    from gammac.runtime.session import open_session

    session = open_session(artifact, threads, adapters=adapters)
    _say_where(artifact)
    with without_torch():
        tokenizer = load_tokenizer(artifact)
    ends = end_tokens(artifact, tokenizer)
    for piece in generate(session, tokenizer, prompt, chat=chat, ends=ends, **sampling):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


@click.command("eval")
@ARTIFACT
@click.option("--text", type=click.Path(path_type=Path), help="A text for perplexity.")
@click.option(
    "--windows",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Windows of 1024 tokens; the first N.",
)
@click.option("--reference", help="A model to compare with: KL divergence and agreement of the top token.")
@click.option(
    "--task", "tasks", multiple=True, type=click.Path(path_type=Path), help="A zero-shot task (.jsonl)."
)
@click.option("--limit", type=click.IntRange(1), help="Only the first examples of each task.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@ADAPTERS
@THREADS
def eval_command(
    artifact: Path, text: Path | None, windows: int, reference: str | None, tasks: tuple[Path, ...],
    limit: int | None, as_json: bool, adapters: Path | None, threads: int | None,
) -> None:  # fmt: skip
    """Perplexity, KL divergence and zero-shot accuracy, all from the artifact itself."""
    from gammac.evaluation import evaluate_artifact

    if text is None and not tasks:
        raise CompileError("nothing to evaluate on", hint="give --text FILE or --task FILE")
    _say_where(artifact)
    found = evaluate_artifact(
        artifact, text, windows, reference, tasks, limit, threads, show_progress, adapters
    )
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from gammac import tables

    OUT.print(tables.figures(str(artifact), found))


@click.command("bench")
@ARTIFACT
@click.option(
    "--vs", "peers", help="Runtimes or paths to compare with: llama.cpp:Q4_0,openvino,onnxruntime,…"
)
@click.option("--model", help="What a peer's model is built from.  [default: the artifact's, if in the zoo]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@THREADS
def bench_command(
    artifact: Path, peers: str | None, model: str | None, rounds: int, as_json: bool, threads: int | None
) -> None:
    """Decode and prefill tokens per second, load time, memory and size; side by side with peers."""
    from gammac import tables
    from gammac.runtime.bench import Work, bench
    from gammac.summary import bench_figures

    if lacking := _lacking(artifact):
        raise CompileError(lacking, hint="pip install onnxruntime-gpu in place of onnxruntime, on a GPU")
    work = Work(rounds=rounds)
    found: Any
    if peers is None:
        found = bench_figures(bench(artifact, threads=threads, work=work))
        table = tables.figures(str(artifact), found)
    else:
        found = _against(artifact, peers, model, threads, work)
        table = tables.side_by_side(f"{artifact}, ratios over each peer", found)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        OUT.print(table)


def _lacking(artifact: Path) -> str:
    """What an artifact was made for and this machine has not, though it can run it."""
    from gammac.runtime.artifact import is_artifact, open_artifact
    from gammac.runtime.session import lacking_provider

    if not is_artifact(artifact):
        return ""
    return lacking_provider(open_artifact(artifact, verify=False).manifest.provider)


def _say_where(artifact: Path) -> None:
    if lacking := _lacking(artifact):
        ERR.print(f"note: {lacking}: the processor runs it, in the same types", highlight=False)


def _against(artifact: Path, names: str, model: str | None, threads: int | None, work: Any) -> Any:
    from gammac.models_zoo.fetch import default_cache
    from gammac.models_zoo.registry import MODELS
    from gammac.peers import peers_of
    from gammac.runtime.artifact import open_artifact
    from gammac.runtime.bench import bench_together
    from gammac.runtime.peers import Contestant
    from gammac.summary import side_by_side

    source = open_artifact(artifact, verify=False).manifest.model
    known = model or (source if source in MODELS else None)
    peers = peers_of(names, known, default_cache(), lambda line: click.echo(line, err=True))
    ours = Contestant(artifact.name, "gammac", artifact)
    return side_by_side(bench_together([ours, *peers], threads=threads, work=work))
