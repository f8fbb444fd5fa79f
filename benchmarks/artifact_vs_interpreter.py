"""An artifact beside the interpreter on the module inside it: perplexity and KL divergence on a text, or the
likeliest tokens after a prompt.

python benchmarks/artifact_vs_interpreter.py ARTIFACT --text FILE [--windows 100] [--cache DIR]
python benchmarks/artifact_vs_interpreter.py ARTIFACT --prompt "The history of" [--new 64] [--cache DIR]
"""

from pathlib import Path

import click

from gammac.driver import MODULE
from gammac.ir import parse
from gammac.models_zoo.fetch import default_cache
from gammac.runtime.evaluate import compare, window_length, windows_for
from gammac.runtime.generate import encode_prompt, load_tokenizer
from gammac.runtime.reference import InterpreterSession
from gammac.runtime.session import Session, Tokens, open_session
from gammac.weights import WeightStore


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path))
@click.option("--windows", default=100, show_default=True)
@click.option("--prompt")
@click.option("--new", default=64, show_default=True, help="Tokens after the prompt.")
@click.option("--cache", type=click.Path(path_type=Path), help="The cache of the compile.")
def main(
    artifact: Path, text: Path | None, windows: int, prompt: str | None, new: int, cache: Path | None
) -> None:
    """Print what was asked for."""
    session = open_session(artifact)
    module = parse((artifact / MODULE).read_text(), str(artifact / MODULE))
    store = WeightStore((cache or default_cache()) / "weights")
    reference = InterpreterSession(module, store, context=session.context)
    tokenizer = load_tokenizer(artifact)
    if text is not None:
        found = compare(session, reference, windows_for(text, tokenizer, windows, window_length(session)))
        print(f"artifact {found.ppl:.4f}, interpreter {found.ppl_reference:.4f}, N = {found.windows}")
        ratio, agreement = found.ppl / found.ppl_reference, found.top1_agreement
        print(f"ratio {ratio:.5f}, KL {found.kl:.2e} nats, top token agrees {agreement:.2%}")
    if prompt is not None:
        tokens = encode_prompt(tokenizer, prompt, chat=False)
        ours, theirs = (greedy(one, tokens, new) for one in (session, reference))
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), new)
        print(f"the first {same} of {new} tokens are equal")


def greedy(session: Session, tokens: Tokens, new: int) -> list[int]:
    """The likeliest token, `new` times."""
    session.reset(len(tokens) + new)
    logits, found = session.prefill(tokens), list[int]()
    while True:
        found.append(int(logits.argmax()))
        if len(found) == new:
            return found
        logits = session.decode(found[-1])


if __name__ == "__main__":
    main()
