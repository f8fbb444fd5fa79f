"""Float weights: rows in panels of 16, column by column, so that a vector holds 16 rows of one column.

weight [rows, columns] → panels [ceil(rows / 16), columns, 16]
"""

from typing import Final

import numpy as np
import numpy.typing as npt

PANEL: Final = 16

Floats = npt.NDArray[np.float32]


def pack_panels(weight: Floats) -> Floats:
    """The layout above; the last panel is filled up with zeros."""
    rows, columns = weight.shape
    padded = np.zeros((-(-rows // PANEL) * PANEL, columns), np.float32)
    padded[:rows] = weight
    return np.ascontiguousarray(padded.reshape(-1, PANEL, columns).transpose(0, 2, 1))
