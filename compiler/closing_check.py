"""The last step of a compile: the artifact is run, here or emulated, or else its module is."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gammac.backends import Backend
from gammac.ir import Module
from gammac.pipeline import Context
from gammac.runtime.check import Check, check_artifact
from gammac.runtime.emulated import EmulatedSession
from gammac.runtime.evaluate import Comparison, OutputComparison
from gammac.runtime.manifest import Manifest
from gammac.runtime.program_session import NotEmulated, ProgramSession
from gammac.runtime.static_session import StaticSession
from gammac.targets.tvm.names import EXAMPLE_NAME, STATIC_NAME

EMULATED_TOKENS: Final = 32  # an emulator is slow
LOOP_TOKENS: Final = 64  # and so are kernels for a GPU as loops


@dataclass(frozen=True)
class Checked:
    """What was found, None if nothing could be run; and what was run, unless it is the artifact, here."""

    check: Check[Comparison] | Check[OutputComparison] | None
    note: str = ""


def closing_check(
    backend: Backend, original: Module, module: Module, ctx: Context, folder: Path, manifest: Manifest,
    cache: Path,
) -> Checked:  # fmt: skip
    """Compare the artifact in `folder` with its module and with the original.

    Raises CompileError when it does not compute what the module says.
    """
    text, static = ctx.calibration, (folder / STATIC_NAME).exists()

    def run(session: ProgramSession) -> Check[Comparison] | Check[OutputComparison]:
        return check_artifact(
            original, module, ctx.store, text, folder, manifest, session=session, tokens=EMULATED_TOKENS
        )

    if not backend.elsewhere:
        found = check_artifact(original, module, ctx.store, text, folder, manifest)
        return Checked(found, _library_note(folder, run) if static else "")
    with tempfile.TemporaryDirectory() as scratch:
        twin = backend.emulate(module, ctx.store, folder, Path(scratch))
        if twin is not None:
            return Checked(
                check_artifact(original, module, ctx.store, text, twin, manifest, tokens=LOOP_TOKENS),
                f"the device code was not run: {backend.elsewhere}; "
                "checked were the same kernels as loops on the CPU",
            )
        session: ProgramSession
        try:
            session = StaticSession(folder, Path(scratch)) if static else EmulatedSession(folder, cache)
            found = run(session)
        except NotEmulated as error:
            return _stand_in(backend, original, module, ctx, manifest, str(error))
    what = f"checked was {STATIC_NAME}, " if static else ""
    return Checked(found, f"{what}not run on this machine but {session.place}")


def _library_note(folder: Path, run: Callable[[ProgramSession], Any]) -> str:
    """What became of the static library on this machine, where model.so was checked before."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run(StaticSession(folder, Path(scratch)))
    except NotEmulated as error:
        return f"{STATIC_NAME} was not run: {str(error).splitlines()[0]}"
    return f"{STATIC_NAME} was run by {EXAMPLE_NAME} and checked as well"


def _stand_in(
    backend: Backend, original: Module, module: Module, ctx: Context, manifest: Manifest, why: str
) -> Checked:
    """The same module, emitted for this machine."""
    here = backend.stand_in()
    reason = f"{backend.elsewhere}; {why.splitlines()[0]}"
    if here is None:
        return Checked(None, f"not checked: {reason}")
    with tempfile.TemporaryDirectory() as name:
        here.emit(module, ctx.store, Path(name))
        found = check_artifact(original, module, ctx.store, ctx.calibration, Path(name), manifest)
    return Checked(
        found, f"the artifact was not run: {reason}. Checked is its module, compiled for this machine"
    )
