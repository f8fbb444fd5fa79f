"""`gammac run`, `eval` and `bench`: what is done with an artifact."""

import json
import sys
from pathlib import Path
from typing import Any, Final

import click

from gammac.cli.console import OUT, show_progress
from gammac.diagnostics import CompileError

ARTIFACT: Final = click.argument("artifact", type=click.Path(path_type=Path))
THREADS: Final = click.option("--threads", type=click.IntRange(1), help="Default: the physical cores.")


@click.command()
@ARTIFACT
@click.option("--prompt", required=True)
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0: always the likeliest token.")
@click.option("--top-k", default=0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--chat/--no-chat", default=None, help="Use the chat template (default: if there is one).")
@THREADS
def run(artifact: Path, prompt: str, chat: bool | None, threads: int | None, **sampling: Any) -> None:
    """Generate text from an artifact."""
    from gammac.runtime.generate import end_tokens, generate, load_tokenizer
    from gammac.runtime.session import open_session

    session = open_session(artifact, threads)
    tokenizer = load_tokenizer(artifact)
    ends = end_tokens(artifact, tokenizer)
    for piece in generate(session, tokenizer, prompt, chat=chat, ends=ends, **sampling):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


@click.command("eval")
@ARTIFACT
@click.option("--text", type=click.Path(path_type=Path), help="A text for perplexity.")
@click.option("--windows", default=100, show_default=True, help="Windows of 1024 tokens; the first N.")
@click.option("--reference", help="A model to compare with: KL divergence and agreement of the top token.")
@click.option(
    "--task", "tasks", multiple=True, type=click.Path(path_type=Path), help="A zero-shot task (.jsonl)."
)
@click.option("--limit", type=int, help="Only the first examples of each task.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@THREADS
def eval_command(
    artifact: Path, text: Path | None, windows: int, reference: str | None, tasks: tuple[Path, ...],
    limit: int | None, as_json: bool, threads: int | None,
) -> None:  # fmt: skip
    """Perplexity, KL divergence and zero-shot accuracy, all from the artifact itself."""
    from gammac.evaluation import evaluate_artifact

    if text is None and not tasks:
        raise CompileError("nothing to evaluate on", hint="give --text FILE or --task FILE")
    found = evaluate_artifact(artifact, text, windows, reference, tasks, limit, threads, show_progress)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from gammac import tables

    OUT.print(tables.figures(str(artifact), found))


@click.command("bench")
@ARTIFACT
@click.option(
    "--vs",
    "peer",
    type=click.Path(path_type=Path),
    help="A folder for onnxruntime-genai to be compared with.",
)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@THREADS
def bench_command(artifact: Path, peer: Path | None, rounds: int, as_json: bool, threads: int | None) -> None:
    """Decode and prefill tokens per second, load time, memory and size; ratios to a peer."""
    from gammac import tables
    from gammac.runtime.bench import Work, bench, bench_pair
    from gammac.summary import bench_figures, pair_figures

    work = Work(rounds=rounds)
    if peer is None:
        found = bench_figures(bench(artifact, threads=threads, work=work))
    else:
        found = pair_figures(bench_pair(artifact, peer, threads=threads, work=work))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        OUT.print(tables.figures(str(artifact), found))
