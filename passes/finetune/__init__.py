"""What learns from a calibration text: passes that improve codes after formats were chosen."""

from gammac.passes.finetune.distill import Distill
from gammac.passes.finetune.latents import GUMBEL, LEARNABLE, SIGN
from gammac.passes.finetune.learn_rounding import LearnRounding
from gammac.passes.finetune.scales import SCALED

__all__ = ["GUMBEL", "LEARNABLE", "SCALED", "SIGN", "Distill", "LearnRounding"]
