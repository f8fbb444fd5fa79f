"""What learns from a calibration text: passes that improve codes after formats were chosen."""

from gammac.passes.finetune.distill import Distill
from gammac.passes.finetune.latents import LEARNABLE
from gammac.passes.finetune.learn_rounding import LearnRounding

__all__ = ["LEARNABLE", "Distill", "LearnRounding"]
