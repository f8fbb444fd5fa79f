"""Options and fixtures that every test may use."""

import os
from pathlib import Path

import pytest

# tests never ask a hub, and never touch the user's cache
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# small tensors gain nothing from threads, and lose much where threads outnumber cores
for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# and threads that wait busily take the other tests' cores
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the second half of tests/ir/*.gir")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason=f"the evaluation texts are not at {DATA}")
    for item in items:
        if "data" in item.keywords and not DATA.exists():
            item.add_marker(missing)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of evaluation texts, for tests marked `data`."""
    return DATA
