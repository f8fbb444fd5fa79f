"""What lowering asks of a device: kernels by their sizes, and weights as those kernels read them.

Tensors are [rows, width] in f32; `rows` is a number, or None for as many as the kernel is called with. What a
kernel takes and writes is told where the CPU's stands, in `tir/` and `kernels/`.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

from gammac.formats import Format, Quantized
from gammac.targets.tvm.kernels import Branch, Packable
from gammac.targets.tvm.params import Array
from gammac.targets.tvm.tir.attention import Heads, Rows
from gammac.targets.tvm.tir.elementwise import Tree


class Device(Protocol):
    """Kernels are TIR functions."""

    @property
    def integer(self) -> bool:
        """Whether products with packed weights take int8."""
        ...

    def takes(self, format_: Format) -> TypeGuard[Packable]:
        """Whether products with weights in a format have a kernel."""
        ...

    # ---- rows of floats ----

    def elementwise(self, rows: int | None, width: int, tree: Tree, dtype: str) -> Any:
        """A tree of elementwise operations."""
        ...

    def rms_norm(self, rows: int | None, width: int, inner: int, eps: float) -> Any:
        """Each `inner` elements over their root mean square."""
        ...

    def layer_norm(self, rows: int | None, width: int, inner: int, eps: float) -> Any:
        """Each `inner` elements less their mean, over their deviation."""
        ...

    # ---- tables ----

    def positions(self, rows: int | None) -> Any:
        """The position of each id."""
        ...

    def last_row(self, width: int) -> Any:
        """The last of the rows."""
        ...

    def rotary_table(self, rows: int | None, half: int, scaling: float) -> Any:
        """cos and sin of each row's position."""
        ...

    def embedding(self, rows: int | None, entries: int, width: int) -> Any:
        """Rows of a float table."""
        ...

    def packed_rows(self, rows: int | None, format_: Packable, entries: int, width: int) -> Any:
        """Rows of a packed table, dequantized."""
        ...

    # ---- attention ----

    def append(self, rows: int | None, heads: Heads, source: Rows) -> Any:
        """Turn q and k, write k and v into the cache."""
        ...

    def attention(self, rows: int | None, heads: Heads) -> Any:
        """Softmax over the cache."""
        ...

    # ---- products ----

    def linear(
        self,
        rows: int | None,
        format_: Packable,
        outputs: int,
        inputs: int,
        bias: bool,
        residual: bool,
        branch: Branch | None,
    ) -> Any:
        """x @ weight.T + bias + residual, and a low-rank branch"""
        ...

    def gated(
        self,
        rows: int | None,
        formats: tuple[Packable, Packable],
        outputs: int,
        inputs: int,
        activation: str,
        branches: tuple[Branch | None, ...],
    ) -> Any:
        """activation(x @ gate.T) * (x @ up.T), with their branches"""
        ...

    @property
    def stacked(self) -> Callable[..., Any] | None:
        """x by several weights, one below the other (rows, formats, outputs of each, inputs, branches, which
        have a bias); None where there is no such kernel."""
        ...

    @property
    def low_rank(self) -> Callable[[int | None, int, int, float | None], Any] | None:
        """The first factor of branches (rows, rank, inputs, eps of a norm of x); None where the products
        above take no branches."""
        ...

    def float_linear(self, rows: int | None, outputs: int, inputs: int, bias: bool) -> Any:
        """x @ weight.T + bias for a weight in f32."""
        ...

    # ---- weights ----

    def packed(self, quantized: Quantized) -> dict[str, Array]:
        """Codes, scales and, for asymmetric formats, zeros.

        Raises CompileError for group sizes without a kernel.
        """
        ...

    def floats(self, weight: Array) -> Array:
        """A float weight [outputs, inputs], as `float_linear` and `embedding` read it."""
        ...
