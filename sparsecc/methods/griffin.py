"""Neurons chosen by the prompt, once per request: GRIFFIN and CoreInfer.

GRIFFIN (Dong et al. 2024) keeps the neurons with the largest norm over the prompt of their share in each token's activations; CoreInfer
(Wang et al. 2024) those that most tokens count among their largest fifth of positive ones. The prompt itself is computed in full. One
request at a time: a new prompt replaces the set.
"""

from __future__ import annotations

from sparsecc.skipping import Neurons
from sparsecc.skipping import neurons as _neurons


def griffin(keep: float | int = 0.5) -> Neurons:
    """This fraction of the neurons (a float), or so many (an int), by GRIFFIN's statistic."""
    return _neurons(top=keep, per_request="griffin")


def core_infer(keep: float | int = 0.4) -> Neurons:
    """The sentence's core neurons; beta = `keep`, rho = 0.2, one number for all tokens."""
    return _neurons(top=keep, per_request="core")
