"""Text in, pieces of text out: prompt, sampling, and tokens back to characters."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gammac.diagnostics import CompileError
from gammac.runtime.session import Logits, Session, Tokens

CONFIGS_WITH_END: Final = ("generation_config.json", "config.json")
REPLACEMENT: Final = "�"
"""What decoding makes of half a character."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, never from a network. Raises CompileError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CompileError(
            f"{folder} has no tokenizer that can be read: {error}",
            hint="an artifact has the tokenizer files of its model; compile it again",
        ) from error


def end_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's own, and those that the folder's configs name."""
    ends: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in CONFIGS_WITH_END:
        ends |= _ends_of(folder / name, ())
    return frozenset(ends | _ends_of(folder / "genai_config.json", ("model",)))


def _ends_of(path: Path, keys: Sequence[str]) -> set[int]:
    if not path.is_file():
        return set()
    config: Any = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        config = config.get(key, {})
    ends = config.get("eos_token_id")
    return set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest; top_k 0 and top_p 1 cut nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logits: Logits, random: np.random.Generator) -> int:
        """A token, given logits f32 [vocab]."""
        if self.temperature <= 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")[: self.top_k or None]
        scaled = logits[order].astype(np.float64) / self.temperature
        likely = np.exp(scaled - scaled[0])
        likely /= likely.sum()
        # the smallest set of top tokens that holds top_p of the mass: keep while the mass before is less
        kept = likely[: max(1, int(np.sum(np.cumsum(likely) - likely < self.top_p)))]
        return int(order[random.choice(len(kept), p=kept / kept.sum())])


def generate(
    session: Session, tokenizer: Any, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0,
    top_k: int = 0, top_p: float = 1.0, seed: int = 0, chat: bool | None = None, stop: Sequence[str] = (),
    ends: Collection[int] | None = None,
) -> Iterator[str]:  # fmt: skip
    """Continue a prompt; yields text as it comes, ends at a token of `ends` or before a text of `stop`.

    `chat` None applies the tokenizer's chat template if there is one. Generation stops where the
    context is full. Raises CompileError at once when the prompt is empty or doesn't fit, and when
    `chat` is True and there is no template.
    """
    if session.kind != "decoder":
        raise CompileError("an encoder has no next token to generate", hint="compile a decoder")
    tokens = encode_prompt(tokenizer, prompt, chat)
    if len(tokens) == 0:
        raise CompileError("the prompt is empty", hint="give at least one word")
    if len(tokens) >= session.context:
        raise CompileError(
            f"the prompt has {len(tokens)} tokens, the model's context is {session.context}",
            hint="shorten the prompt",
        )
    if ends is None:
        ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    room = min(session.context, len(tokens) + max_new_tokens)
    chosen = _tokens(session, tokens, room, Sampling(temperature, top_k, top_p), seed, ends)
    return until(stop, decoded(tokenizer, chosen))


def encode_prompt(tokenizer: Any, prompt: str, chat: bool | None = None) -> Tokens:
    """Token ids i64 [seq], with the chat template (`chat` None: if there is one)."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise CompileError("the model's tokenizer has no chat template", hint="leave chat out")
    if chat is False or not has_template:
        return np.array(tokenizer(prompt)["input_ids"], np.int64)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    # the template spells out special tokens itself
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


def _tokens(
    session: Session, tokens: Tokens, room: int, sampling: Sampling, seed: int, ends: Collection[int]
) -> Iterator[int]:
    random = np.random.default_rng(seed)
    session.reset(room)
    logits = session.prefill(tokens)
    for wanted in range(room - len(tokens), 0, -1):
        token = sampling.choose(logits, random)
        if token in ends:
            return
        yield token
        if wanted > 1:
            logits = session.decode(token)


def decoded(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Pieces of text that join to the text of all tokens; none ends within a character.

    A token's text depends on those before it (spaces, bytes of one character), so each piece is the
    difference between two decodings of the last few tokens.
    """
    ids: list[int] = []
    start = shown = 0
    before = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        if len(text) > len(before) and not text.endswith(REPLACEMENT):
            yield text[len(before) :]
            start, shown = shown, len(ids)
            before = tokenizer.decode(ids[start:shown], skip_special_tokens=True)
    rest = tokenizer.decode(ids[start:], skip_special_tokens=True)[len(before) :]
    if rest:
        yield rest


def until(stop: Sequence[str], pieces: Iterator[str]) -> Iterator[str]:
    """The pieces up to the first text of `stop`, which is left out."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [found for text in stop if (found := held.find(text)) >= 0]
        if ends:
            held = held[: min(ends)]
            break
        keep = max((_overlap(held, text) for text in stop), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may be the start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
