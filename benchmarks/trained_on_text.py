"""What benchmarks that train on one text and judge on another have in common: options, and test windows."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from gammac.classification import tokenized
from gammac.passes.training.labelled import LabelledData
from gammac.passes.training.trainer import Data
from gammac.runtime.classify import read_rows
from gammac.texts import read_text, token_windows
from gammac.training import Training


def parser_of(description: str | None, bits: Sequence[float]) -> argparse.ArgumentParser:
    """A parser with the options that all of them take; `bits` is that option's default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="trained on (default: the text that gammac ships)")
    parser.add_argument("--test", type=Path, help="judged on (default: a sixteenth of that text)")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--bits", type=type(bits[0]), nargs="+", default=list(bits))
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=128, help="of the test text")
    return parser


def judged(args: argparse.Namespace, training: Training) -> Tensor | LabelledData:
    """Token windows, or the rows of `--test` where rows were trained on."""
    if training.split is None:
        return judged_windows(args, training)
    if args.test is None:
        assert isinstance(training.held_out, LabelledData)
        return training.held_out
    longest = int(str(training.module.attrs["max_positions"]))
    return tokenized(read_rows(args.test), training.split.labels, training.source.tokenizer, longest)


def judged_windows(args: argparse.Namespace, training: Training) -> Tensor:
    """Token windows i64 [n, length] of `--test`, or of what was held out."""
    if args.test is None:
        assert isinstance(training.held_out, Data)
        return training.held_out.tokens[: args.windows]
    tokenizer = training.source.tokenizer
    return token_windows(read_text(args.test), tokenizer, args.length, args.windows, spread=True)
