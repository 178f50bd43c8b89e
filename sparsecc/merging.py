"""What the user asks to be merged at run time: tokens of encoders. A value of a sparsity dict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsecc.errors import SpecError
from sparsecc.ir.merge_ops import VARIANTS
from sparsecc.ir.policy import kept_of


@dataclass(frozen=True)
class Merge:
    """Tokens that blocks of an encoder merge between attention and feed-forward part.

    ratio: the fraction that each block keeps, one number for all recognised blocks under the glob or one per block. margin: of the energy,
    likewise; () is 0.75 - 0.75 * block / blocks. variant: see `ir/merge_ops.py`; "released" is "bsm" in the first half of the blocks and
    "pitome" behind. leading: tokens that never merge. proportional: attention counts a token as often as its size says.
    """

    ratio: tuple[float, ...]
    margin: tuple[float, ...] = ()
    variant: str = "released"
    leading: int = 1
    proportional: bool = False

    def __str__(self) -> str:
        more = ", proportional attention" if self.proportional else ""
        return f"merge({list(self.ratio)}, {self.variant}{more})"

    def merged(self, tokens: int, block: int, blocks: int) -> int:
        """r, of so many tokens: those that may merge, less the kept fraction, rounded down."""
        may = max(0, tokens - self.leading)
        return may - kept_of(may, _of(self.ratio, block, blocks, "ratio"))

    def margin_of(self, block: int, blocks: int) -> float:
        """What a similarity must exceed to raise the energy."""
        return _of(self.margin, block, blocks, "margin") if self.margin else 0.75 - 0.75 * block / blocks

    def variant_of(self, block: int, blocks: int) -> str:
        """Which tokens are candidates."""
        return self.variant if self.variant != "released" else "bsm" if block < blocks / 2 else "pitome"


def merge(
    ratio: Sequence[float] | float, margin: Sequence[float] | float | None = None, variant: str = "released", leading: int = 1,
    proportional: bool = False,
) -> Merge:
    """PiToMe (Tran et al. 2024): encoder blocks keep this fraction of their tokens, the others join similar ones; see `Merge`.

    Raises SpecError for a ratio outside [0.5, 1] (a token takes part in one merge at most), an unknown variant, negative `leading`.
    """
    ratios = tuple(float(v) for v in ([ratio] if isinstance(ratio, int | float) else ratio))
    margins = () if margin is None else tuple(float(v) for v in ([margin] if isinstance(margin, int | float) else margin))
    if not ratios or not all(0.5 <= v <= 1 for v in ratios):
        raise SpecError(f"merge(ratio={ratio!r}): the fraction of tokens that a block keeps lies in [0.5, 1]")
    if margin is not None and (not margins or not all(-1 <= v < 1 for v in margins)):
        raise SpecError(f"merge(margin={margin!r}): it is compared with cosines, give numbers in [-1, 1)")
    if variant not in ("released", *VARIANTS):
        raise SpecError(f"merge(variant={variant!r}): use 'released', {', '.join(map(repr, VARIANTS))}")
    if isinstance(leading, bool) or not isinstance(leading, int) or leading < 0:
        raise SpecError(f"merge(leading={leading!r}): a number of tokens, such as 1 for CLS")
    return Merge(ratios, margins, variant, leading, bool(proportional))


def _of(values: tuple[float, ...], block: int, blocks: int, what: str) -> float:
    if len(values) == 1:
        return values[0]
    if len(values) != blocks:
        raise SpecError(f"merge({what}=...) has {len(values)} entries, but {blocks} blocks were recognised under its glob: give one each")
    return values[block]
