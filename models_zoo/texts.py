"""The texts that are shipped with the package."""

from importlib import resources


def default_calibration_text() -> str:
    """The text that calibration uses when none is given: about 300 kB, many subjects, code and chat.

    It was sampled from a language model by `make_calibration.py`; documents are parted by empty lines.
    """
    return resources.files("gammac.models_zoo").joinpath("calibration.txt").read_text(encoding="utf-8")
