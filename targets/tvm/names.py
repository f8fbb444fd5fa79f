"""Names that the emitter and the runtime share; nothing of TVM is imported here."""

from typing import Final

LIBRARY_NAME: Final = "model.so"
PARAMS_NAME: Final = "model.params"
DESCRIPTION_NAME: Final = "model.json"
KERNELS_NAME: Final = "kernels.json"  # of an artifact for a GPU
MODEL_FILES: Final = (LIBRARY_NAME, PARAMS_NAME, DESCRIPTION_NAME)
PANELS: Final = ".floats"  # behind the names of float weights in the layout of `panels`
STATIC_NAME: Final = "libmodel.a"
HEADER_NAME: Final = "gammac_model.h"
EXAMPLE_NAME: Final = "example.c"
STATIC_FILES: Final = (STATIC_NAME, HEADER_NAME, EXAMPLE_NAME)
INT8: Final = "int8"
FLOAT: Final = "float"
ACTIVATIONS: Final = (INT8, FLOAT)
INSTALL: Final = "pip install 'gammac[tvm]'"
