"""The order of the passes stands here and nowhere else."""
from __future__ import annotations

from sparsecc.passes.manager import Pass

PIPELINE: tuple[Pass, ...] = ()
