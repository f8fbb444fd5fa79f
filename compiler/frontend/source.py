"""Where a model comes from: a transformers folder, a .gguf file or a name on the Hugging Face hub."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from gammac.diagnostics import CompileError
from gammac.frontend.facts import eos_of_config, token_ids

HUB_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt")
LONGEST: Final = 300
"""Characters of another library's message that are passed on."""

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")

NONSENSE: Final = (
    ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a config that makes no sense."""


@dataclass(frozen=True)
class Source:
    """A model that is known but not loaded: its config and tokenizer, and where its weights are."""

    name: str
    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    eos: tuple[int, ...]
    gguf: str | None = None
    """The name of the .gguf file in `folder`, where that is what the model is."""
    trust_remote_code: bool = False


def load_source(model: str, *, trust_remote_code: bool = False) -> Source:
    """The source that `model` names: a folder, a .gguf file, or a name on the Hugging Face hub.

    Reads configs and tokenizers, never weights and never a pickle. Code that comes with the model is
    run only when `trust_remote_code` says so. Raises CompileError that names the file and the remedy.
    """
    path = Path(model).expanduser()
    with quiet():
        if path.suffix == ".gguf":
            return _load_gguf(model, path)
        if path.is_dir():
            return _load_folder(model, path, trust_remote_code)
        if path.exists():
            raise CompileError(
                f"{path} is a file", hint="give the folder that holds config.json, or a .gguf file"
            )
        return _load_folder(model, _download(model), trust_remote_code)


def model_class(source: Source) -> type[PreTrainedModel]:
    """The class that the config's `architectures` names. Raises CompileError for an unknown one."""
    config = source.config
    names = getattr(config, "architectures", None) or []
    if source.trust_remote_code and getattr(config, "auto_map", None):
        return _remote_class(source)
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if names:
        raise CompileError(
            f"{source.folder}: transformers {transformers.__version__} has no class {', '.join(names)}",
            hint="upgrade transformers, or --trust-remote-code if the model brings its own code",
        )
    mappings: tuple[Any, ...] = (AutoModelForCausalLM._model_mapping, AutoModel._model_mapping)
    return _one_of(next(m[type(config)] for m in mappings if type(config) in m))


def _one_of(found: Any) -> type[PreTrainedModel]:
    # some configs go with several classes; the first is the usual one
    chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple | list) else found
    return chosen


def _remote_class(source: Source) -> type[PreTrainedModel]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map: dict[str, str] = source.config.auto_map
    reference = auto_map.get("AutoModelForCausalLM") or auto_map.get("AutoModel")
    if reference is None:
        raise CompileError(f"{source.folder / 'config.json'}: its auto_map names no model class")
    with nonsense_is_an_error(source.folder):
        return _one_of(get_class_from_dynamic_module(reference, str(source.folder)))


# ---- the three kinds ----------------------------------------------------------------------------


def _load_folder(name: str, folder: Path, trust_remote_code: bool) -> Source:
    if not (folder / "config.json").is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        raise CompileError(
            f"{folder} is no model: it has no config.json",
            hint=f"give the file {folder / ggufs[0]}" if ggufs else "save_pretrained() writes such a folder",
        )
    if not any(folder.glob("*.safetensors")):
        pickled = any(p for pattern in PICKLES for p in folder.glob(pattern))
        instead = ", only pickled weights, which can run code" if pickled else ""
        raise CompileError(
            f"{folder} has no .safetensors file{instead}",
            hint="load the model where you trust it and call save_pretrained(folder)",
        )
    with nonsense_is_an_error(folder / "config.json"):
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    if getattr(config, "quantization_config", None):
        raise CompileError(
            f"{folder} is quantized already", hint="give the original model; gammac chooses the bits itself"
        )
    tokenizer = _load_tokenizer(folder, trust_remote_code)
    eos = _generation_eos(folder) or eos_of_config(config)
    return Source(name, folder, config, tokenizer, eos, trust_remote_code=trust_remote_code)


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    with nonsense_is_an_error(folder, "the tokenizer of "):
        # a torn file would otherwise end in an exception without a class of its own
        for path in folder.glob("tokenizer*.json"):
            json.loads(path.read_text(encoding="utf-8"))
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return found


def _generation_eos(folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    try:
        return token_ids(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, AttributeError) as error:
        raise CompileError(f"{path} can't be read: {error}", hint="it may be left out") from error


def _load_gguf(name: str, path: Path) -> Source:
    if not path.is_file():
        raise CompileError(f"there is no file {path}", hint="check the path")
    with nonsense_is_an_error(path):
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it doesn't begin with GGUF")
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    return Source(name, path.parent, config, tokenizer, eos_of_config(config), gguf=path.name)


def _download(name: str) -> Path:
    hint = f"there is no folder {name}; give a folder, a .gguf file, or a hub name such as Qwen/Qwen3-0.6B"
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except HFValidationError as error:
        raise CompileError(f"{name!r} is neither a folder nor a hub name", hint=hint) from error
    except LocalEntryNotFoundError as error:
        raise CompileError(
            f"{name} is not in the Hugging Face cache, and the hub can't be reached",
            hint=hint + "; with a network (and HF_HUB_OFFLINE unset) it is downloaded once",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CompileError(f"{name} can't be had from the hub: {_in_one_line(error)}", hint=hint) from error


# ---- other people's messages --------------------------------------------------------------------


@contextmanager
def nonsense_is_an_error(place: Path | str, what: str = "") -> Iterator[None]:
    """Turn what transformers raises about damaged or senseless files into a CompileError."""
    try:
        yield
    except (*NONSENSE, OSError, ImportError) as error:
        raise CompileError(
            f"transformers can't read {what}{place}: {type(error).__name__}: {_in_one_line(error)}",
            hint="it is damaged, contradicts itself, or is newer than this version of transformers",
        ) from error


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers and torch log, print and warn about: what matters is raised."""
    level, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
