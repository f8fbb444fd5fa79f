"""Sample the package's own calibration text from a language model.

Everything works offline and without a dataset, because the default calibration text is shipped. It is
sampled from `smollm2-135m` (Apache-2.0), from the starts in `prompts.toml`:

    python -m gammac.models_zoo.make_calibration models_zoo/calibration.txt
"""

import argparse
import time
import tomllib
import zlib
from collections.abc import Iterator
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gammac.models_zoo.fetch import fetch

LEAST_BYTES: Final = 200
"""Shorter samples teach nothing about the use of a context."""

LEAST_ENTROPY: Final = 0.36
"""Compressed size / size (zlib). Text that repeats itself lies below; ours and code lie at 0.4 to 0.6."""


def starts(tokenizer: Any) -> list[tuple[str, str]]:
    """(what the model reads, what the text keeps of it) for each start in `prompts.toml`, in its order."""
    table = tomllib.loads(resources.files("gammac.models_zoo").joinpath("prompts.toml").read_text("utf-8"))
    # SmolLM2 was pretrained with this token between documents; its bos token only opens a chat turn.
    plain = [("<|endoftext|>" + start, start) for group in table["plain"].values() for start in group]
    chat = []
    for question in table["chat"]["questions"]:
        turn = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        chat.append((str(asked), f"{question}\n\n"))
    return plain + chat


def is_worth_keeping(text: str) -> bool:
    """Whether a sample is long enough and does not go round in circles."""
    data = text.encode()
    return len(data) >= LEAST_BYTES and len(zlib.compress(data, 9)) >= LEAST_ENTROPY * len(data)


def batches(jobs: list[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    """`jobs` in lists of at most `size`."""
    for first in range(0, len(jobs), size):
        yield jobs[first : first + size]


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, jobs: list[tuple[str, str]], tokens: int) -> list[str]:
    """One continuation of at most `tokens` tokens for each job, its kept start in front."""
    asked = [job[0] for job in jobs]
    inputs = tokenizer(
        asked, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    out = model.generate(
        **inputs,
        do_sample=True,
        temperature=1.0,
        top_k=200,
        top_p=0.95,
        max_new_tokens=tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    written = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [(kept + text).strip() for (_, kept), text in zip(jobs, written, strict=True)]


def main(argv: list[str] | None = None) -> None:
    """Write the calibration text (UTF-8, documents parted by an empty line) to the path given."""
    parser = argparse.ArgumentParser(description="Sample a calibration text from smollm2-135m.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=320, help="the starts are gone through in turn")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=352, help="most tokens of a sample")
    args = parser.parse_args(argv)
    folder = fetch("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # bfloat16 halves the time; a sample need not be exact.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    jobs = list(islice(cycle(starts(tokenizer)), args.samples))
    torch.manual_seed(args.seed)
    kept: list[str] = []
    began = time.monotonic()
    for batch in batches(jobs, args.batch):
        texts = sample(model, tokenizer, batch, args.tokens)
        kept += [text for text in texts if is_worth_keeping(text)]
        seconds = time.monotonic() - began
        print(f"{len(kept)} kept, {sum(map(len, kept))} characters, {seconds:.0f} s", flush=True)
        args.out.write_text("\n\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
