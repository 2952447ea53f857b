"""A system prompt compressed into the weights: the teacher answers with it, the student learns
the same answers without it. All but that is off-policy distillation.
"""

from __future__ import annotations

from tinker_mcp.runs.methods import sft
from tinker_mcp.runs.methods.distill import load, off_policy

__all__ = ["LOSS", "load", "train"]

LOSS = sft.LOSS
train = off_policy
