"""Choosing the fastest code: configurations, predicted cost, the contest on this machine, and the cache of its results."""

from sparsecc.codegen.config import from_text, space_of, to_text, tunable

from .cache import TuneCache
from .cost import OVERHEAD, Costs, M, Machine, Work, break_even, costs, dense_work, predict, work
from .measure import Timing, interleaved
from .progress import progress
from .search import Candidate, Effort, Result, contest, mismatch

__all__ = [
    "OVERHEAD",
    "Candidate",
    "Costs",
    "Effort",
    "M",
    "Machine",
    "Result",
    "Timing",
    "TuneCache",
    "Work",
    "break_even",
    "contest",
    "costs",
    "dense_work",
    "from_text",
    "interleaved",
    "mismatch",
    "predict",
    "progress",
    "space_of",
    "to_text",
    "tunable",
    "work",
]
