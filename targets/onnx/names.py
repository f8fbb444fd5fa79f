"""Names that the emitter and the runtime share."""

from typing import Final

TRANSPOSED: Final = ".transposed"  # behind the names of float weights as MatMul reads them
