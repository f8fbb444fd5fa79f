"""Train `tiny`, the small Llama that is shipped with the package.

    python -m gammac.models_zoo.train_tiny TEXT... -o models_zoo/tiny

The last twentieth of each text is held out; the weights that do best on it are kept. A run is fixed by
its texts and its seed. An interrupted run goes on from `checkpoint.pt` in the output folder.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gammac.models_zoo.compatibility import add_rope_theta, use_plain_tokenizer_class
from gammac.models_zoo.measure import encode, perplexity, windows_of

SPECIAL_TOKENS: Final = ("<|pad|>", "<|bos|>", "<|eos|>")
HELD_OUT: Final = 0.05
HELD_OUT_WINDOWS: Final = 24


@dataclass(frozen=True)
class Options:
    """What a run depends on besides its texts. Sizes are multiples of 64, as kernels like them."""

    steps: int = 900
    batch: int = 2
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.05
    warmup: int = 40
    seed: int = 0
    check_every: int = 50
    vocabulary: int = 2048
    context: int = 1024
    hidden: int = 256
    intermediate: int = 512
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    bfloat16: bool = False
    """Compute in bfloat16 where autocast does; twice as fast on a processor that has it."""


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts for training, and their ends, which are held out."""
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    pairs = list(zip(texts, cuts, strict=True))
    return [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens; any text comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )


def build(options: Options) -> LlamaForCausalLM:
    """The untrained model, float32."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        # The usual 0.02 is made for wider models, and costs a short run its first hundred steps.
        initializer_range=0.04,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(
                lambda module, _, out: dropout(out, options.dropout, module.training)
            )
    return model


@dataclass
class Run:
    """The state of a training run: what a checkpoint holds."""

    model: LlamaForCausalLM
    optimizer: torch.optim.AdamW
    step: int = 0
    best: float = math.inf
    best_weights: dict[str, Tensor] | None = None

    def save(self, path: Path) -> None:
        """Write the checkpoint; a crash in the middle leaves the one before."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        counters = {"step": self.step, "best": self.best, "best_weights": self.best_weights}
        torch.save(state | counters, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.best_weights = state["step"], state["best"], state["best_weights"]


def optimizer_for(model: LlamaForCausalLM, options: Options) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))


def learning_rate(step: int, options: Options) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))


def batch_at(ids: Tensor, step: int, options: Options) -> Tensor:
    """The windows [batch, context] of a step, every other one opened by bos."""
    # NOTE: everything random is seeded by the step, so that a resumed run is the run without a pause.
    torch.manual_seed(options.seed * 1_000_003 + step)
    starts = torch.randint(0, len(ids) - options.context + 1, (options.batch,))
    windows = torch.stack([ids[start : start + options.context] for start in starts.tolist()])
    windows[::2, 0] = 1
    return windows


def train_step(run: Run, windows: Tensor, options: Options) -> float:
    """One step; the loss before it, in nats."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, options)
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
        logits = run.model(windows).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return loss.item()


def check(run: Run, held_out: Tensor) -> float:
    """Perplexity over the held-out windows; the run keeps the weights if they are the best so far."""
    run.model.train(False)
    found = perplexity(run.model, held_out)
    run.model.train()
    if found < run.best:
        run.best = found
        run.best_weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    return found


def train(run: Run, ids: Tensor, held_out: Tensor, options: Options, checkpoint: Path, until: int) -> None:
    """Train up to step `until`, with a check, a line and a checkpoint every `check_every` steps."""
    began, loss = time.monotonic(), math.nan
    run.model.train()
    while run.step < until:
        loss = train_step(run, batch_at(ids, run.step, options), options)
        if run.step % options.check_every == 0 or run.step == until:
            found, seconds = check(run, held_out), time.monotonic() - began
            print(f"step {run.step}: loss {loss:.3f}, held out {found:.2f}, {seconds:.0f} s", flush=True)
            run.save(checkpoint)


def ship(run: Run, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the best weights, rounded to float16 (half the size), as a transformers folder."""
    assert run.best_weights is not None
    # The head is the embedding; the clones of both would be stored as two.
    kept = {name: value for name, value in run.best_weights.items() if name != "lm_head.weight"}
    half: dict[str, Any] = {name: value.half() for name, value in kept.items()}
    # The configuration keeps dtype float32: readers widen the weights, nobody computes in float16.
    run.model.save_pretrained(folder, state_dict=half)
    add_rope_theta(folder)
    tokenizer.save_pretrained(folder)
    use_plain_tokenizer_class(folder)


def run_training(texts: Sequence[str], folder: Path, options: Options, pause_at: int | None = None) -> Run:
    """Train on `texts` and write the model to `folder`, or stop at step `pause_at` to go on later.

    Raises ValueError when the texts are shorter than one window.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    kept, ends = split(texts)
    tokenizer = train_tokenizer(kept, options.vocabulary)
    ids = torch.cat([encode(tokenizer, text) for text in kept])
    tails = torch.cat([encode(tokenizer, text) for text in ends])
    windows = windows_of(tails, len(tails), min(options.context, len(tails)))
    # Spread over all texts, not the first one's end alone.
    held_out = windows[:: math.ceil(len(windows) / HELD_OUT_WINDOWS)]
    model = build(options)
    run = Run(model, optimizer_for(model, options))
    if checkpoint.exists():
        run.load(checkpoint)
    print(f"{model.num_parameters()} parameters, {len(ids)} tokens, {held_out.numel()} held out", flush=True)
    train(run, ids, held_out, options, checkpoint, options.steps if pause_at is None else pause_at)
    if run.step >= options.steps:
        ship(run, tokenizer, folder)
        checkpoint.unlink()
    return run


def main(argv: list[str] | None = None) -> None:
    """Train from the command line."""
    defaults = Options()
    parser = argparse.ArgumentParser(description="Train the tiny model on texts.")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch, help="windows of a step")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--dropout", type=float, default=defaults.dropout)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--bfloat16", action="store_true", help="faster where the processor has it")
    args = vars(parser.parse_args(argv))
    texts = [path.read_text(encoding="utf-8") for path in args.pop("texts")]
    out = args.pop("out")
    run_training(texts, out, Options(**args))


if __name__ == "__main__":
    main()
