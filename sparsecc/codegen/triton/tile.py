"""What the families share: the writer, the tile of a kernel, and how a tile of weights meets the activations.

A program computes BN features x BM tokens of y^T: with features first, an expanded weight tile is the left operand of the matrix
instruction, whose other side may be as narrow as 16 tokens. With one token there is no matrix instruction: `acc` is a vector [BN].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.lines import Lines
from sparsecc.codegen.triton.config import GpuConfig

TL = {"f32": "tl.float32", "tf32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16"}
"""The spec's dtype -> Triton's."""


@dataclass(frozen=True)
class Tile:
    """A kernel being written: `bn` features by `config.bm` tokens a program."""

    w: Lines
    spec: KernelSpec
    config: GpuConfig
    bn: int

    @property
    def one(self) -> bool:
        """Whether there is a single token."""
        return self.spec.regime == "one"

    @property
    def shape(self) -> str:
        """Of the accumulator."""
        return f"({self.bn},)" if self.one else f"({self.bn}, {self.config.bm})"

    def share(self, t: int, first: str, last: str) -> tuple[str, str]:
        """first..last, or the part of it that this program takes where several split a row of tiles."""
        if self.config.split == 1:
            return first, last
        self.w(f"steps{t} = tl.cdiv({last} - {first}, {self.config.split})")
        self.w(f"from{t} = {first} + part * steps{t}")
        self.w(f"to{t} = tl.minimum(from{t} + steps{t}, {last})")
        return f"from{t}", f"to{t}"

    def loop(self, first: str, last: str, step: str = "") -> str:
        """The head of the pipelined loop over a term."""
        return f"for j in tl.range({first}, {last}{f', {step}' if step else ''}, num_stages={self.config.stages}):"

    def begin(self, t: int, bk: int) -> None:
        """Before a term's loop over tiles of `bk` columns: one token adds up in as many lanes, and sums them at the end."""
        if self.one:
            self.w(f"lanes{t} = tl.zeros(({self.bn}, {bk}), tl.float32)")

    def multiply(self, t: int, weights: str, columns: str) -> None:
        """acc += weights [BN, BK] times x at `columns` [BK], which are consecutive."""
        mask = f"{columns} < K" if self.spec.tail else ""
        if self.one:
            self.w(f"xs = tl.load(x + {columns}{f', mask={mask}, other=0.0' if mask else ''})")
            self.w(f"lanes{t} += {weights}.to(tl.float32) * xs.to(tl.float32)[None, :]")
            return
        masked = f", mask=({mask})[:, None], other=0.0" if mask else ""
        self.w(f"xs = tl.load(x_rows + {columns}[:, None]{masked})")
        precision = {"f32": ', input_precision="ieee"', "tf32": ', input_precision="tf32"'}.get(self.spec.dtype, "")
        self.w(f"acc = tl.dot({weights}.to({TL[self.spec.dtype]}), xs, acc{precision})")

    def end(self, t: int) -> None:
        """After the loop."""
        if self.one:
            self.w(f"acc += tl.sum(lanes{t}, 1)")


def interleave(values: Sequence[str]) -> str:
    """The tensors, a power of two of them, as one with new last dimensions that count them: reshaped, they alternate."""
    if len(values) == 1:
        return values[0]
    return f"tl.join({interleave(values[0::2])}, {interleave(values[1::2])})"
