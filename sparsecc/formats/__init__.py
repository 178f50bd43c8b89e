"""Patterns (what is zero) and formats (how it is stored). Imports nothing of the compiler."""

from .codec import Codec, Raw
from .format import Format, parse_format
from .level import Arrays, Bitmap, Compressed, Dense, Level, Sell
from .measure import CANDIDATE_BLOCKS, BlockMeasure, Measurement, detect, measure
from .packed import PackedNM
from .pattern import (
    ANY,
    NM,
    Anything,
    Block,
    Channels,
    Cols,
    Heads,
    Pattern,
    Rows,
    Unstructured,
    block,
    channels,
    cols,
    heads,
    nm,
    parse_pattern,
    rows,
    unstructured,
)
from .shared import Shared
from .swizzle import Identity, Panels, Swizzle

__all__ = [
    "ANY",
    "CANDIDATE_BLOCKS",
    "NM",
    "Anything",
    "Arrays",
    "Bitmap",
    "Block",
    "BlockMeasure",
    "Channels",
    "Codec",
    "Cols",
    "Compressed",
    "Dense",
    "Format",
    "Heads",
    "Identity",
    "Level",
    "Measurement",
    "PackedNM",
    "Panels",
    "Pattern",
    "Raw",
    "Rows",
    "Sell",
    "Shared",
    "Swizzle",
    "Unstructured",
    "block",
    "channels",
    "cols",
    "detect",
    "heads",
    "measure",
    "nm",
    "parse_format",
    "parse_pattern",
    "rows",
    "unstructured",
]
