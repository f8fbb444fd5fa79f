"""Give the first and the last blocks wide formats first, the rest as `uniform`: the usual rule of thumb.

    weight @layers.0.up : f32[64,64] = sha256:… {role = "block", candidates = {…}}
    weight @layers.1.up : f32[64,64] = sha256:… {role = "block", candidates = {…}}
    weight @layers.2.up : f32[64,64] = sha256:… {role = "block", candidates = {…}}
-> of which a budget of 3.4 makes w4g64, w2g64 and w4g64
    … scores = {w2g64 = 4096.0, w4g64 = 1.0}
    … scores = {w2g64 = 0.75, w4g64 = 0.000183105}
    … scores = {w2g64 = 2048.0, w4g64 = 0.5}

The rule of llama.cpp's mixes (`use_more_bits` in src/llama-quant.cpp: the first and the last eighth of the
blocks) and of the comparison in SignRoundV2 (arXiv 2512.04746: the layers at one end in four bits).
"""

from dataclasses import dataclass
from typing import ClassVar

from gammac.calibration import block_index
from gammac.ir import Module
from gammac.passes.candidates import weights_have_candidates
from gammac.passes.sensitivity.scores import check_range, weights_have_scores
from gammac.passes.sensitivity.uniform import with_even_scores
from gammac.pipeline import Context, Invariant


@dataclass(frozen=True)
class FirstLastHigh:
    """The scores of `uniform`, with the ends scored as if `ahead` bits narrower than they are.

    `blocks` at each end; an eighth of all, at least one, if None. Embedding and head are as in `uniform`.
    """

    name: ClassVar[str] = "first_last_high"
    reads: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[Invariant, ...]] = (weights_have_candidates,)
    ensures: ClassVar[tuple[Invariant, ...]] = (weights_have_scores,)
    blocks: int | None = None
    ahead: float = 2.0

    def __post_init__(self) -> None:
        """Raises CompileError for options out of range."""
        check_range(self.name, "blocks", 0 if self.blocks is None else self.blocks, 0)
        check_range(self.name, "ahead", self.ahead, 0, 8)

    def run(self, module: Module, ctx: Context) -> Module:
        """From shapes, formats and places alone."""
        block_of = blocks_of_weights(module)
        blocks = sorted(set(block_of.values()))
        count = max(1, len(blocks) // 8) if self.blocks is None else self.blocks
        ends = {*blocks[:count], *blocks[max(0, len(blocks) - count) :]}
        return with_even_scores(module, {name: self.ahead for name, b in block_of.items() if b in ends})


def blocks_of_weights(module: Module) -> dict[str, int]:
    """Weight name → number of the block whose op reads it; weights outside the blocks are left out."""
    found: dict[str, int] = {}
    for op in module.functions["forward"].ops:
        ref, block = op.weight(), block_index(op.loc)
        if ref is not None and block is not None:
            found[ref.name] = block
    return found
