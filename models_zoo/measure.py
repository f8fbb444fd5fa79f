"""Perplexity of a model folder over a text, and of a unigram model beside it.

python -m gammac.models_zoo.measure FOLDER TEXT --windows 100 --unigram TRAINING_TEXT...
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW: Final = 1024
"""Tokens of a window, where the model's context allows it."""


def encode(tokenizer: Any, text: str) -> Tensor:
    """The text as int64 token ids [tokens], no special tokens added."""
    # verbose=False: a whole file is longer than any context, and no reason for a warning.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def windows_of(ids: Tensor, count: int, length: int) -> Tensor:
    """The first `count` non-overlapping windows of `ids` [windows, length]; fewer where it is shorter.

    Raises ValueError when there is not even one.
    """
    whole = min(count, len(ids) // length)
    if whole == 0:
        raise ValueError(f"{len(ids)} tokens are fewer than one window of {length}")
    return ids[: whole * length].view(whole, length)


@torch.inference_mode()
def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood (nats) of all tokens but the first of each window."""
    losses = []
    for window in windows:
        logits = model(window[None]).logits[0, :-1].float()
        losses.append(cross_entropy(logits, window[1:]).item())
    return math.exp(sum(losses) / len(losses))


def unigram_perplexity(training: Tensor, windows: Tensor, vocabulary: int) -> float:
    """The same figure for token frequencies counted on `training` [tokens], add-one smoothed."""
    counts = torch.bincount(training, minlength=vocabulary).double() + 1
    log_frequency = (counts / counts.sum()).log()
    return math.exp(-log_frequency[windows[:, 1:]].mean().item())


def read(paths: Sequence[Path]) -> str:
    """The texts (UTF-8), one after the other."""
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def main(argv: list[str] | None = None) -> None:
    """Print the perplexities."""
    parser = argparse.ArgumentParser(description="Perplexity of a model folder over a text.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--unigram", type=Path, nargs="*", default=[], help="texts of a unigram model")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    length = min(WINDOW, model.config.max_position_embeddings)
    windows = windows_of(encode(tokenizer, read([args.text])), args.windows, length)
    print(f"{len(windows)} windows of {length} tokens")
    print(f"model   {perplexity(model, windows):.3f}")
    if args.unigram:
        training = encode(tokenizer, read(args.unigram))
        print(f"unigram {unigram_perplexity(training, windows, model.config.vocab_size):.3f}")


if __name__ == "__main__":
    main()
