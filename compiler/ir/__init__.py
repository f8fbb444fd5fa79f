"""The intermediate representation: types, the table of ops, text form, verifier, interpreter."""

from gammac.ir.build import Builder, drop_dead, rewrite
from gammac.ir.core import Attr, Attrs, Function, Module, Op, Operand, Value, Weight, WeightRef
from gammac.ir.ops import OPS, TypeRuleError
from gammac.ir.text import parse, to_text
from gammac.ir.types import Dim, Sym, TensorType
from gammac.ir.verify import verify

__all__ = [
    "OPS", "Attr", "Attrs", "Builder", "Dim", "Function", "Module", "Op", "Operand", "Sym",
    "TensorType", "TypeRuleError", "Value", "Weight", "WeightRef", "drop_dead", "parse", "rewrite",
    "to_text", "verify",
]  # fmt: skip
