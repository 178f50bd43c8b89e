"""Making zeros, by name only: `prune` for weights, channels and heads, `slicegpt` for the residual stream."""

from .budget import Budget, flops, latency
from .groups import Coupled
from .prune import prune
from .report import PruneReport, PruneRow
from .slicegpt import slicegpt

__all__ = ["Budget", "Coupled", "PruneReport", "PruneRow", "flops", "latency", "prune", "slicegpt"]
