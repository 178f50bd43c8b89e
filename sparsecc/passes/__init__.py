"""The order of the passes stands here and nowhere else."""
from __future__ import annotations

from sparsecc.passes.bundle import Bundle
from sparsecc.passes.canonicalize import Canonicalize
from sparsecc.passes.convolve import Convolve
from sparsecc.passes.core import Core
from sparsecc.passes.fuse import Fuse
from sparsecc.passes.layout import Layout
from sparsecc.passes.lower import Lower
from sparsecc.passes.manager import Pass
from sparsecc.passes.masks import Masks
from sparsecc.passes.pack import Pack
from sparsecc.passes.propagate import Propagate
from sparsecc.passes.reorder import Reorder
from sparsecc.passes.rows import Rows
from sparsecc.passes.select import Select
from sparsecc.passes.skip import Skip

PIPELINE: tuple[Pass, ...] = (
    Canonicalize(),  # one op for every linear
    Masks(),         # attention is told what its mask's arithmetic says
    Reorder(),       # rows and columns, where their zeros then come in blocks or groups
    Select(),        # which zeros each weight has, or must have
    Skip(),          # neurons and tokens that are skipped at run time
    Core(),          # those that a prompt chooses for all that follows
    Propagate(),     # what they make useless elsewhere leaves
    Convolve(),      # pictures with sparse convolutions into sequences of pixels
    Fuse(),          # neighbours into the op
    Pack(),          # the fastest storage, or dense where none pays
    Bundle(),        # the same for neurons that are skipped
    Layout(),        # which values stay token-minor
    Rows(),          # what stands between linears of a few tokens
    Lower(),         # kernels by name; dense regions back to ATen
)
