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
    Cols,
    Pattern,
    Rows,
    Unstructured,
    block,
    cols,
    nm,
    parse_pattern,
    rows,
    unstructured,
)
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
    "Codec",
    "Cols",
    "Compressed",
    "Dense",
    "Format",
    "Identity",
    "Level",
    "Measurement",
    "PackedNM",
    "Panels",
    "Pattern",
    "Raw",
    "Rows",
    "Sell",
    "Swizzle",
    "Unstructured",
    "block",
    "cols",
    "detect",
    "measure",
    "nm",
    "parse_format",
    "parse_pattern",
    "rows",
    "unstructured",
]
