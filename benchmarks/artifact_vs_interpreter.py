"""Perplexity from the artifact beside the interpreter's on the module inside it, and their KL divergence.

python benchmarks/artifact_vs_interpreter.py ARTIFACT --text FILE [--windows 100] [--cache DIR]
"""

from pathlib import Path

import click

from gammac.driver import MODULE
from gammac.ir import parse
from gammac.models_zoo.fetch import default_cache
from gammac.runtime.evaluate import compare, window_length, windows_for
from gammac.runtime.generate import load_tokenizer
from gammac.runtime.reference import InterpreterSession
from gammac.runtime.session import open_session
from gammac.weights import WeightStore


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), required=True)
@click.option("--windows", default=100, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), help="The cache of the compile.")
def main(artifact: Path, text: Path, windows: int, cache: Path | None) -> None:
    """Print both perplexities and their ratio."""
    session = open_session(artifact)
    module = parse((artifact / MODULE).read_text(), str(artifact / MODULE))
    store = WeightStore((cache or default_cache()) / "weights")
    reference = InterpreterSession(module, store, context=session.context)
    tokens = windows_for(text, load_tokenizer(artifact), windows, window_length(session))
    found = compare(session, reference, tokens)
    print(f"artifact {found.ppl:.4f}, interpreter {found.ppl_reference:.4f}, N = {found.windows}")
    ratio, agreement = found.ppl / found.ppl_reference, found.top1_agreement
    print(f"ratio {ratio:.5f}, KL {found.kl:.2e} nats, top token agrees {agreement:.2%}")


if __name__ == "__main__":
    main()
