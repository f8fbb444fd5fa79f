"""The graph that trains: a module's own ops under autograd, what block linears read and weigh changed.

It is the module that is compiled, run by the interpreter's kernels: nothing is rewritten for training, so
that what was trained and what is emitted can't come apart. Softmax, norms and residual sums are f32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gammac.calibration import inputs_of
from gammac.ir import Module, Op, Value, WeightRef
from gammac.ir.interpret import Weights, bind, run_op
from gammac.targets.target import BLOCK

# a block linear's weight name and what it reads, to what it reads instead
ChangeInput = Callable[[str, Tensor], Tensor]
# an op with its operands and results, as they were computed
Watch = Callable[[Op, list[Tensor], tuple[Tensor, ...]], None]
# an op with its operands, to what it gets in their place
Adjust = Callable[[Op, list[Tensor]], list[Tensor]]


def block_weight(op: Op, module: Module) -> str:
    """The name of the block weight that a linear multiplies by; empty for any other op."""
    ref = op.weight() if op.name == "linear" else None
    return ref.name if ref and module.weights[ref.name].attrs.get("role") == BLOCK else ""


@dataclass
class TrainingGraph:
    """`forward` of a module; its first result is what a loss looks at."""

    module: Module
    last_use: dict[Value, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.function = self.module.functions["forward"]
        for index, op in enumerate(self.function.ops):
            self.last_use.update({o: index for o in op.operands if isinstance(o, Value)})

    def run(
        self, tokens: Tensor, weights: Weights, change: ChangeInput | None = None, watch: Watch | None = None,
        inputs: Mapping[str, Tensor] | None = None, adjust: Adjust | None = None,
    ) -> Tensor:  # fmt: skip
        """The first result for tokens i64 [batch, seq]. Linears that read one value share what it became."""
        env, sizes = bind(self.function, inputs or inputs_of(self.function, tokens))
        changed: dict[Value, Tensor] = {}
        for index, op in enumerate(self.function.ops):
            operands = [weights(o.name) if isinstance(o, WeightRef) else env[o] for o in op.operands]
            name, source = block_weight(op, self.module), op.operands[0] if op.operands else None
            if change and name and isinstance(source, Value):
                if source not in changed:
                    changed[source] = change(name, operands[0])
                operands[0] = changed[source]
            operands = adjust(op, operands) if adjust else operands
            results = run_op(op, operands, sizes)
            if watch:
                watch(op, operands, results)
            env.update(zip(op.results, results, strict=True))
            self._forget(index, op, env, changed)
        result = self.function.returns[0]
        assert isinstance(result, Value)
        return env[result]

    def _forget(self, index: int, op: Op, env: dict[Value, Tensor], changed: dict[Value, Tensor]) -> None:
        for operand in set(op.operands):
            last = isinstance(operand, Value) and self.last_use[operand] == index
            if last and operand not in self.function.returns:
                env.pop(operand)  # type: ignore[arg-type]
                changed.pop(operand, None)  # type: ignore[arg-type]
