"""The last step of a compile: run the artifact once, against its own module and against the original."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

import numpy as np
import torch

from gammac.diagnostics import CompileError
from gammac.ir import Module
from gammac.runtime.artifact import MODEL
from gammac.runtime.evaluate import Comparison, OutputComparison, compare, compare_outputs
from gammac.runtime.manifest import Manifest
from gammac.runtime.reference import InterpreterSession
from gammac.runtime.session import TVM, OnnxModel, OnnxSession, Session, open_tvm
from gammac.texts import Calibration
from gammac.weights import WeightStore

TOKENS: Final = 256
# Activations rounded to 8 bits move logits a little: KL was 6e-3 on smollm2 at 3 bits.
# A model that quantizing has broken amplifies every rounding, so it is allowed a share of its own damage.
MOST_KL: Final = 0.1
SHARE_OF_KL: Final = 0.1
BROKEN_KL: Final = 2.0  # nats from the original: little is left of it
LEAST_COSINE: Final = 0.98
SHORT: Final = 32  # tokens of a window for a classifier


Compared = TypeVar("Compared", Comparison, OutputComparison)


@dataclass(frozen=True)
class Check(Generic[Compared]):
    """The artifact against the interpreter on the same module, and against the original model."""

    against_module: Compared
    against_original: Compared


def check_artifact(
    original: Module, module: Module, store: WeightStore, calibration: Calibration | None, folder: Path,
    manifest: Manifest, *, session: Session | None = None, tokens: int = TOKENS,
) -> Check[Comparison] | Check[OutputComparison]:  # fmt: skip
    """Run `folder`'s model on one window of text (or counting tokens where there is none).

    `session` runs it where this machine alone can't.
    Raises CompileError when it does not compute what the module says.
    """
    artifact = session or _session(folder, manifest)
    window = _window(calibration, artifact.vocab_size, manifest.context, tokens)
    ours = InterpreterSession(module, store, context=manifest.context, keep_weights=False)
    theirs = InterpreterSession(original, store, context=manifest.context, keep_weights=False)
    if manifest.labels and window.shape[1] >= SHORT:  # a window gives one row of logits: eight say more
        window = window[:, : window.shape[1] // SHORT * SHORT].reshape(-1, SHORT)
    if manifest.kind == "encoder":
        outputs = compare_outputs(artifact, ours, window)
        _demand(outputs.cosine > LEAST_COSINE, f"cosine {outputs.cosine:.4f}")
        return Check(outputs, compare_outputs(artifact, theirs, window))
    check = Check(compare(artifact, ours, window), compare(artifact, theirs, window))
    near, far = check.against_module.kl, check.against_original.kl
    holds = bool(np.isfinite(near)) and near < MOST_KL + SHARE_OF_KL * far
    _demand(holds, f"KL {near:.4f} nats", _way_out(manifest) if far > BROKEN_KL else "")
    return check


def _session(folder: Path, manifest: Manifest) -> Session:
    if manifest.emitter == TVM:
        return open_tvm(folder)
    library = folder / manifest.library if manifest.library else None
    return OnnxSession(OnnxModel(folder / MODEL, manifest.kind, manifest.context, False, library))


def _window(calibration: Calibration | None, vocabulary: int, context: int, tokens: int) -> torch.Tensor:
    if calibration is not None:
        return calibration.tokens[:1, : min(tokens, context)]
    return torch.arange(min(tokens, context))[None] % vocabulary


def _way_out(manifest: Manifest) -> str:
    """What may help where quantizing has left nothing of a model."""
    inputs = " or --product-inputs float" if manifest.emitter == TVM else ""
    return (
        "these formats leave little of the model, which turns the rounding of products' inputs into that "
        f"much: a larger budget{inputs} helps; if not, "
    )


def _demand(holds: bool, found: str, way_out: str = "") -> None:
    if not holds:
        raise CompileError(
            f"the artifact does not compute what its module says: {found} between the two",
            hint=f"{way_out}this is a fault of gammac or of the runtime; keep the dumps of --dump-ir and "
            "report it",
        )
