"""Skipping the zeros of ReLU: exact, per token.

ProSparse (Song et al. 2024) and its like retrain gated models with ReLU, or FATReLU: act(x) = x if x >= t else 0. The kernel computes the
gate and reads rows of up and columns of down only where it is not zero. Plain ReLU blocks (OPT, T5) skip columns of fc2.
"""

from __future__ import annotations

from sparsecc.skipping import Neurons
from sparsecc.skipping import neurons as _neurons


def relu_skipping(threshold: float = 0.0) -> Neurons:
    """Neurons whose activation is not zero; with a threshold (FATReLU) those of at least that. Raises SpecError for a negative one."""
    return _neurons(at_least=threshold) if threshold else _neurons()
