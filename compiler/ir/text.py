"""The text form: printer and parser, exact inverses of each other.

    module   = "module" "@" name ["attributes" attrs] "{" {weight} {func} "}"
    weight   = "weight" "@" name ":" type "=" digest [attrs]
    func     = "func" "@" name "(" [param {"," param}] ")" "{" {op} return "}"
    param    = "%" name ":" type
    op       = [values "="] opname [operand {"," operand}] [attrs] ":" type {"," type} ["loc" "(" string ")"]
    return   = "return" [name "=" operand {"," name "=" operand}]
    operand  = "%" name | "@" name
    attrs    = "{" [name "=" attr {"," name "=" attr}] "}"
    attr     = int | float | "true" | "false" | string | dim | "[" [attr {"," attr}] "]" | attrs
    type     = dtype "[" [dim {"," dim}] "]"          dim = 12 | seq | past+seq | 2*batch*seq
    name     = letters, digits, "_", ".", "-"         digest = "sha256:" hex

`//` starts a comment. Values are numbered when they are printed; parameters keep their names.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from gammac.diagnostics import CompileError
from gammac.ir.core import Attr, Attrs, Function, Module, Op, Operand, Value, Weight, WeightRef
from gammac.ir.types import Sym, TensorType, parse_dim, parse_type

# ---- printer ------------------------------------------------------------------------------------


def to_text(module: Module) -> str:
    """The module as text; `parse(to_text(m))` prints the same again."""
    head = f"module @{module.name}"
    if module.attrs:
        head += f" attributes {attrs_text(module.attrs)}"
    lines = [head + " {"]
    lines += [f"  {weight_text(w)}" for w in module.weights.values()]
    for function in module.functions.values():
        lines += [f"  {line}" for line in _function_lines(function)]
    return "\n".join([*lines, "}"]) + "\n"


def weight_text(weight: Weight) -> str:
    """One weight declaration."""
    attrs = f" {attrs_text(weight.attrs)}" if weight.attrs else ""
    return f"weight @{weight.name} : {weight.type} = {weight.digest}{attrs}"


def attrs_text(attrs: Attrs) -> str:
    """`{name = attr, …}` in the order of the mapping."""
    return "{" + ", ".join(f"{name} = {_attr_text(value)}" for name, value in attrs.items()) + "}"


def _attr_text(value: Attr) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Sym):
        return str(value)
    if isinstance(value, Mapping):
        return attrs_text(value)
    return "[" + ", ".join(map(_attr_text, value)) + "]"


def _function_lines(function: Function) -> Iterator[str]:
    names: dict[Value, str] = {p: f"%{p.name}" for p in function.params}
    params = ", ".join(f"%{p.name}: {p.type}" for p in function.params)
    yield f"func @{function.name}({params}) {{"
    for op in function.ops:
        for value in op.results:
            names[value] = f"%{len(names) - len(function.params)}"
        yield f"  {op_text(op, names)}"
    returns = zip(function.return_names, function.returns, strict=True)
    yield "  return " + ", ".join(f"{name} = {_operand_text(o, names)}" for name, o in returns)
    yield "}"


def op_text(op: Op, names: Mapping[Value, str]) -> str:
    """One op; `names` gives its operands and results."""
    results = ", ".join(_operand_text(v, names) for v in op.results)
    operands = " " + ", ".join(_operand_text(o, names) for o in op.operands) if op.operands else ""
    attrs = f" {attrs_text(op.attrs)}" if op.attrs else ""
    types = ", ".join(str(v.type) for v in op.results)
    loc = f" loc({json.dumps(op.loc)})" if op.loc else ""
    return f"{results} = {op.name}{operands}{attrs} : {types}{loc}"


def _operand_text(operand: Operand, names: Mapping[Value, str]) -> str:
    return f"@{operand.name}" if isinstance(operand, WeightRef) else names.get(operand, "%undefined")


# ---- parser -------------------------------------------------------------------------------------

_TOKEN: Final = re.compile(
    r"""(?P<space>\s+|//[^\n]*)
      | (?P<type>(?:f32|f16|bf16|i64|i32|i8|u8|bool)\[[^\]\n]*\])
      | (?P<digest>sha256:\w+)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<ref>[%@][\w.\-]+)
      | (?P<word>-?[\w.]+(?:[+\-*][\w.]+)*)
      | (?P<mark>[{}()\[\]=:,])""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int


class _Parser:
    """Recursive descent over the tokens; every error points at its place."""

    def __init__(self, source: str, path: str) -> None:
        self.source, self.path = source, path
        self.tokens = list(self._tokenize())
        self.at = 0
        self.weights: dict[str, Weight] = {}

    def _tokenize(self) -> Iterator[_Token]:
        position = 0
        while position < len(self.source):
            match = _TOKEN.match(self.source, position)
            if not match:
                self.fail(f"unexpected character {self.source[position]!r}", position)
            position = match.end()
            if match.lastgroup != "space":
                yield _Token(match.lastgroup or "", match[0], match.start())
        yield _Token("end", "end of file", len(self.source))

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Raise a CompileError that shows the line and a caret."""
        position = self.tokens[self.at].start if position is None else position
        before = self.source[:position]
        line, column = before.count("\n") + 1, position - (before.rfind("\n") + 1)
        text = self.source.split("\n")[line - 1]
        raise CompileError(
            f"{self.path}:{line}:{column + 1}: {message}\n    {text.strip()}\n"
            f"    {' ' * (column - (len(text) - len(text.lstrip())))}^"
        )

    def peek(self, *texts: str) -> bool:
        return self.tokens[self.at].text in texts and self.tokens[self.at].kind != "string"

    def take(self, text: str) -> None:
        if not self.peek(text):
            self.fail(f"expected {text!r}, found {self.tokens[self.at].text!r}")
        self.at += 1

    def take_kind(self, kind: str, what: str) -> str:
        token = self.tokens[self.at]
        if token.kind != kind:
            self.fail(f"expected {what}, found {token.text!r}")
        self.at += 1
        return token.text

    def accept(self, text: str) -> bool:
        if self.peek(text):
            self.at += 1
            return True
        return False

    def name(self, sigil: str, what: str) -> str:
        text = self.take_kind("ref", what)
        if not text.startswith(sigil):
            self.at -= 1
            self.fail(f"expected {what}, found {text!r}")
        return text[1:]

    def type(self) -> TensorType:
        text = self.take_kind("type", "a type such as f32[batch,seq,64]")
        try:
            return parse_type(text)
        except ValueError as error:
            self.at -= 1
            self.fail(str(error))

    def attrs(self) -> dict[str, Attr]:
        found: dict[str, Attr] = {}
        self.take("{")
        while not self.accept("}"):
            key = self.take_kind("word", "an attribute name")
            self.take("=")
            found[key] = self.attr()
            if not self.peek("}"):
                self.take(",")
        return found

    def attr(self) -> Attr:
        if self.peek("{"):
            return self.attrs()
        if self.accept("["):
            items: list[Attr] = []
            while not self.accept("]"):
                items.append(self.attr())
                if not self.peek("]"):
                    self.take(",")
            return tuple(items)
        token = self.tokens[self.at]
        if token.kind not in ("string", "word"):
            self.fail(f"expected an attribute value, found {token.text!r}")
        try:
            value = _scalar(token)
        except ValueError:
            self.fail(f"{token.text!r} is no attribute value")
        self.at += 1
        return value

    def module(self) -> Module:
        self.take("module")
        name = self.name("@", "the module's name")
        attrs = self.attrs() if self.accept("attributes") else {}
        self.take("{")
        while self.peek("weight"):
            self.weight()
        functions: dict[str, Function] = {}
        while self.peek("func"):
            function = self.function()
            if function.name in functions:
                self.fail(f"the function @{function.name} is defined twice")
            functions[function.name] = function
        self.take("}")
        if self.tokens[self.at].kind != "end":
            self.fail("there is something behind the module")
        return Module(name, functions, dict(self.weights), attrs)

    def weight(self) -> None:
        self.take("weight")
        name = self.name("@", "the weight's name")
        if name in self.weights:
            self.at -= 1
            self.fail(f"the weight @{name} is declared twice")
        self.take(":")
        type_ = self.type()
        self.take("=")
        digest = self.take_kind("digest", "a digest such as sha256:1a2b")
        self.weights[name] = Weight(name, type_, digest, self.attrs() if self.peek("{") else {})

    def function(self) -> Function:
        self.take("func")
        name = self.name("@", "the function's name")
        values: dict[str, Value] = {}
        self.take("(")
        while not self.accept(")"):
            param = self.name("%", "a parameter")
            self.take(":")
            self.define(values, param, Value(self.type(), param))
            if not self.peek(")"):
                self.take(",")
        params = tuple(values.values())
        self.take("{")
        ops = []
        while not self.peek("return"):
            ops.append(self.op(values))
        returns = self.returns(values)
        self.take("}")
        return Function(name, params, tuple(ops), tuple(o for _, o in returns), tuple(n for n, _ in returns))

    def define(self, values: dict[str, Value], name: str, value: Value) -> None:
        if name in values:
            self.at -= 1
            self.fail(f"%{name} is defined twice")
        values[name] = value

    def op(self, values: dict[str, Value]) -> Op:
        first = self.at
        names = [self.name("%", "a result such as %0")]
        while self.accept(","):
            names.append(self.name("%", "a result"))
        self.take("=")
        op_name = self.take_kind("word", "the name of an op")
        operands: list[Operand] = []
        while self.tokens[self.at].kind == "ref":
            operands.append(self.operand(values))
            if not self.accept(","):
                break
        attrs = self.attrs() if self.peek("{") else {}
        self.take(":")
        types = [self.type()]
        while self.accept(","):
            types.append(self.type())
        if len(types) != len(names):
            self.at = first
            self.fail(f"{len(names)} results but {len(types)} types")
        results = tuple(map(Value, types))
        for name, value in zip(names, results, strict=True):
            self.define(values, name, value)
        return Op(op_name, tuple(operands), results, attrs, self.loc())

    def loc(self) -> str:
        if not self.accept("loc"):
            return ""
        self.take("(")
        text = json.loads(self.take_kind("string", "a quoted module path"))
        self.take(")")
        return str(text)

    def operand(self, values: dict[str, Value]) -> Operand:
        text = self.take_kind("ref", "an operand")
        if text[0] == "%" and text[1:] in values:
            return values[text[1:]]
        if text[0] == "@" and text[1:] in self.weights:
            return self.weights[text[1:]].ref
        self.at -= 1
        self.fail(f"{text} is not defined here")

    def returns(self, values: dict[str, Value]) -> list[tuple[str, Operand]]:
        self.take("return")
        found: list[tuple[str, Operand]] = []
        while not self.peek("}"):
            name = self.take_kind("word", "the name of a result")
            self.take("=")
            found.append((name, self.operand(values)))
            if not self.peek("}"):
                self.take(",")
        return found


def _scalar(token: _Token) -> Attr:
    """A string, a truth value, a number or a dimension. Raises ValueError."""
    text = token.text
    if token.kind == "string":
        return str(json.loads(text))
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return parse_dim(text)


def parse(source: str, path: str = "<text>") -> Module:
    """Read a module. Raises CompileError with `path:line:column`, the line and a caret."""
    return _Parser(source, path).module()
