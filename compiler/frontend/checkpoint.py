"""Weights by parameter name: streamed from safetensors files, or out of a model in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from gammac.diagnostics import CompileError
from gammac.files import write_atomically
from gammac.frontend.gguf import read_gguf
from gammac.frontend.lower import Lowered
from gammac.frontend.source import Source, model_class, nonsense_is_an_error
from gammac.ir import Weight
from gammac.weights import WeightStore


class Tensors(Protocol):
    """The parameters of a model, one at a time."""

    def register(self, name: str, shape: torch.Size, is_transposed: bool, store: WeightStore) -> str:
        """The digest in `store` of a parameter as float32. Raises CompileError."""
        ...

    def read(self, name: str) -> Tensor:
        """A parameter as it lies there. Raises CompileError."""
        ...


@dataclass(frozen=True)
class TensorsInMemory:
    """The parameters of a model that is loaded already."""

    parameters: Mapping[str, Tensor]

    def register(self, name: str, shape: torch.Size, is_transposed: bool, store: WeightStore) -> str:
        """The digest of a parameter, put into the store."""
        tensor = demand_numbers(name, self.parameters[name].detach().float())
        return store.put({"data": tensor.t() if is_transposed else tensor})

    def read(self, name: str) -> Tensor:
        """The parameter in memory."""
        return self.parameters[name].detach()


@dataclass(frozen=True)
class TensorsInFiles:
    """Parameters that lie under the same names in safetensors files."""

    places: Mapping[str, tuple[Path, str]]

    def register(self, name: str, shape: torch.Size, is_transposed: bool, store: WeightStore) -> str:
        """The digest of a parameter; the store points at the file unless the layout differs."""
        path, key = self.places[name]
        tensor = _read(path, key)
        if tensor.shape != shape:
            raise CompileError(
                f"{path}: {key} is {list(tensor.shape)}, the config wants {list(shape)}",
                hint="config.json and the weights don't belong together",
            )
        demand_numbers(name, tensor)
        if is_transposed:
            return store.put({"data": tensor.float().t()})
        return store.point_at(path, key, tensor)

    def read(self, name: str) -> Tensor:
        """The parameter out of its file."""
        return _read(*self.places[name])


def demand_numbers(name: str, tensor: Tensor) -> Tensor:
    """The tensor. Raises CompileError naming the parameter where it holds NaN or infinity."""
    if bool(torch.isfinite(tensor).all()):
        return tensor
    raise CompileError("holds NaN or infinity", loc=name, hint="download the model again, or mend it")


def declare(lowered: Lowered, tensors: Tensors, store: WeightStore) -> Iterator[Weight]:
    """The weights that a lowered function mentions, in order of use, registered in the store."""
    for name, use in lowered.uses.items():
        if use.value is not None:
            digest = store.put({"data": use.value})
        else:
            digest = tensors.register(use.parameter, use.shape, use.is_transposed, store)
        yield Weight(name, use.type, digest)


def open_checkpoint(source: Source, model: PreTrainedModel) -> Tensors:
    """The parameters of `model` (built without weights) from the files of `source`."""
    if source.gguf is not None:
        with nonsense_is_an_error(source.folder / source.gguf):
            return TensorsInMemory(read_gguf(source.folder / source.gguf, model))
    places = find_places(_keys(source.folder), model)
    return _load(source) if places is None else TensorsInFiles(places)


def find_places(keys: Mapping[str, Path], model: PreTrainedModel) -> dict[str, tuple[Path, str]] | None:
    """Where each parameter lies, or None when transformers has to convert names or layouts.

    Names may lack or add the base model's prefix (GPT-2's `transformer.`), and a tied parameter may
    lie under either of its names.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    places: dict[str, tuple[Path, str]] = {}
    prefix = f"{model.base_model_prefix}."
    for names in groups.values():
        spellings = [s for n in names for s in (n, n.removeprefix(prefix), prefix + n)]
        key = next((s for s in spellings if s in keys), None)
        if key is None:
            return None
        places.update(dict.fromkeys(names, (keys[key], key)))
    return places


def _keys(folder: Path) -> dict[str, Path]:
    """Every tensor in the folder's safetensors files, so that a damaged file is found at once."""
    keys: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                keys.update(dict.fromkeys(file.keys(), path))
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    return keys


def _read(path: Path, key: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return tensor


def _damaged(path: Path, error: Exception) -> CompileError:
    return CompileError(f"{path} is damaged or not whole: {error}", hint="download it again")


def _load(source: Source) -> Tensors:
    """Let transformers load and convert the whole model in float32."""
    load: Any = model_class(source).from_pretrained
    with nonsense_is_an_error(source.folder):
        model, report = load(
            source.folder,
            config=source.config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=source.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CompileError(
            f"{source.folder} lacks {len(missing)} of its weights, first {missing[0]}",
            hint="a file of the checkpoint is missing, or the config is another model's",
        )
    return TensorsInMemory(dict(model.named_parameters(remove_duplicate=False)))


# ---- writing ------------------------------------------------------------------------------------


def write_checkpoint(
    source: Source, model: PreTrainedModel, changed: Mapping[str, tuple[Tensor, Tensor]], path: Path
) -> None:
    """The parameters of `model` (built without weights) from the files of `source`, as one safetensors file
    in float32; `changed`: by parameter name, the tensor that a module had and the one that takes its place,
    both in the module's layout. Raises CompileError for a name that is no parameter."""
    tensors = open_checkpoint(source, model)
    names = [name for name, _ in model.named_parameters()]
    foreign = sorted(changed.keys() - set(names))
    if foreign:
        raise CompileError("is no parameter of the model", loc=foreign[0], hint="it was made by a pass")
    found = {name: tensors.read(name).float() for name in names}
    for name, (before, after) in changed.items():
        # a module keeps the matrices of GPT-2's Conv1D turned
        found[name] = after if torch.equal(before, found[name]) else after.t()
    write_atomically(path, save({n: t.contiguous() for n, t in found.items()}, {"format": "pt"}))
