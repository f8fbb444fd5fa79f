"""Importing what would bring torch along, where nothing of torch is wanted."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_torch() -> Iterator[None]:
    """Within it torch can't be found, unless it is there already: importing it takes seconds.

    What is imported within stays without it, so that this is for processes that only run an artifact.
    """
    if "torch" in sys.modules:
        yield
        return
    # transformers would say on import what it can't do now
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
