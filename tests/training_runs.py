"""A training that is killed and started again, for every method of `gammac finetune`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gammac.passes.training.trainer import Trainer

Method = TypeVar("Method")
Rows = list[dict[str, Any]]


class _Killed(Exception):
    pass


def killed_and_resumed(
    trained: Callable[[Path | None], tuple[Method, Rows]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[Method, Rows], tuple[Method, Rows], list[int]]:
    """A run from start to end; one that died at step 8 and went on in `folder`; the steps it went on with."""
    whole, original, steps = trained(None), Trainer._step, list[int]()

    def dying(self: Trainer, step: int) -> None:
        if step == 8:
            raise _Killed
        original(self, step)

    def counted(self: Trainer, step: int) -> None:
        steps.append(step)
        original(self, step)

    monkeypatch.setattr(Trainer, "_step", dying)
    with pytest.raises(_Killed):
        trained(folder)
    monkeypatch.setattr(Trainer, "_step", counted)
    return whole, trained(folder), steps
