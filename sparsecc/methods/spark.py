"""Statistical top-k (Spark Transformer, You et al. 2025; Gemma 3n): a soft threshold at mean + q * deviation of the row.

out = act(max(x - theta, 0)): about `fraction` of a Gaussian row survives, in two passes and without a sort. The threshold is subtracted, so
the function is continuous; models are trained with it.
"""

from __future__ import annotations

from sparsecc.skipping import Neurons
from sparsecc.skipping import neurons as _neurons


def statistical_top_k(fraction: float) -> Neurons:
    """About this fraction of the neurons. Raises SpecError unless it lies between 0 and 1."""
    return _neurons(stat=fraction)
