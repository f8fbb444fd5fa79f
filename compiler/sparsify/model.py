"""A transformers model as something to train: its block linears are sparse, and it is its own teacher."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gammac.adapter_file import demand_no_bypass
from gammac.diagnostics import CompileError
from gammac.formats.two_four import FOUR
from gammac.frontend.export import table_names
from gammac.frontend.source import Source, model_class, nonsense_is_an_error, quiet
from gammac.passes.masks.bypass import joined, started

TEMPERATURE: Final = 2.0  # of the distillation, whose loss is scaled by its square
APART: Final = 16  # every so manieth window is not trained on
ERROR_WINDOWS: Final = 16


def load_model(source: Source) -> nn.Module:
    """The model in f32 with attention that can be differentiated twice. Raises CompileError."""
    if source.gguf is not None or source.tokenizer is None:
        raise CompileError(
            f"{source.name} can't be trained: it is {'a .gguf file' if source.gguf else 'without tokenizer'}",
            hint="give a transformers folder with safetensors and a tokenizer",
        )
    demand_no_bypass(source.folder)
    load: Any = model_class(source).from_pretrained
    with quiet(), nonsense_is_an_error(source.folder):
        model: Any = load(
            source.folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True,
            local_files_only=True, trust_remote_code=source.trust_remote_code,
        )  # fmt: skip
    if not model.can_generate():
        raise CompileError(f"{source.name} predicts no next token, so that nothing can be trained")
    trained: nn.Module = model.eval()
    return trained


def block_linears(model: nn.Module) -> tuple[str, ...]:
    """Weights of linears inside a numbered block, their inputs whole fours. Raises CompileError for none."""
    tables = table_names(model)  # type: ignore[arg-type]
    found = tuple(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.in_features % FOUR == 0
        and any(part.isdigit() for part in name.split("."))
        and f"{name}.weight" not in tables
    )
    if not found:
        raise CompileError("the model has no linears in numbered blocks that could be sparse")
    return found


class LanguageModel:
    """Cross-entropy plus KL(dense ‖ trained) on windows of text: SparseForge's two losses, weighed alike.
    `bypass`: inputs that a low-rank way around each mask sums up at first; 0 for none."""

    def __init__(
        self, model: nn.Module, windows: Tensor, batch: int, seed: int, distill: bool = True, bypass: int = 0
    ) -> None:
        self.model, self.batch, self.seed, self.distill = model, batch, seed, distill
        self.sparse = block_linears(model)
        self.parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
        if bypass:
            self.parameters |= started({n: self.parameters[n] for n in self.sparse}, bypass)
        for parameter in model.parameters():  # the model itself stays as it came: the teacher
            parameter.requires_grad_(False)
        apart = torch.arange(len(windows)) % APART == 0
        self.used, self.apart = windows[~apart], windows[apart][:ERROR_WINDOWS]
        if not len(self.used):
            raise CompileError(
                "there is too little text to train on", hint="give --text, or shorter --length"
            )

    def loss(self, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See Problem."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + step)
        tokens = self.used[torch.randint(len(self.used), (self.batch,), generator=generator)]
        logits = self.logits(parameters, tokens)[:, :-1]
        task = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if not self.distill:
            return task
        with torch.no_grad():
            log_p = (self.model(input_ids=tokens).logits[:, :-1] / TEMPERATURE).log_softmax(-1)
        log_q = (logits / TEMPERATURE).log_softmax(-1)
        total: Tensor = task + TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return total

    def error(self, parameters: Mapping[str, Tensor]) -> float:
        """Cross-entropy in nats a token on windows that are set apart."""
        with torch.no_grad():
            losses = [
                nn.functional.cross_entropy(
                    self.logits(parameters, part)[:, :-1].flatten(0, 1), part[:, 1:].flatten()
                )
                for part in torch.split(self.apart, self.batch)
            ]
        return float(torch.stack(losses).mean())

    def logits(self, parameters: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Of windows i64 [n, length] with these parameters, f32 [n, length, vocab]."""
        found: Tensor = functional_call(
            self.model, joined(parameters), kwargs={"input_ids": tokens, "use_cache": False}
        ).logits
        return found

    def adopt(self) -> nn.Module:
        """The model with what was learnt."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.parameters[name])
        return self.model
