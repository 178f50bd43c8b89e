"""Top-k feed-forward blocks: the k largest activations of every token (Li et al., The Lazy Neuron Phenomenon, 2023)."""

from __future__ import annotations

from sparsecc.skipping import Neurons
from sparsecc.skipping import neurons as _neurons


def top_k(k: int | float) -> Neurons:
    """k neurons, or this fraction of them; of equal ones the first. Where fewer are positive, ReLU's zeros fill the rest."""
    return _neurons(top=k)
