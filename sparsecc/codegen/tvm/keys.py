"""What an attention kernel asks about keys: where a block of them lies, and which of them a tile of queries may see.

Both are seams. A `Keys` gives scalars of the loaded block: keys and values that are stored otherwise (quantized, a ring, pages) are
another one, that decodes a block in `load`. A `Sight` walks the blocks that matter to a tile of queries: a list of blocks is another
one, with another loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from sparsecc.codegen.tvm.tiles import SPAN, place
from sparsecc.codegen.tvm.writer import Writer, splat, vec

KEYS = SPAN  # with 64 queries a block's p is 16 KiB, its k and v 8 KiB each at D = 32: together in L1
HIDDEN = 'T.float32("-inf")'


class Keys(Protocol):
    """Keys and values of one head, `KEYS` at a time, as float32 scalars."""

    @property
    def pointers(self) -> tuple[str, ...]:
        """The arguments that it adds to the kernel's."""
        ...

    @property
    def ints(self) -> tuple[str, ...]: ...

    def head(self, w: Writer) -> None:
        """Once per task: `batch` and `shared`, the head of k and v, are bound."""
        ...

    def load(self, w: Writer) -> None:
        """Once per block: `block` is bound."""
        ...

    def k(self, feature: str, key: str) -> str:
        """A key's feature; `key` counts within the block."""
        ...

    def v(self, feature: str, key: str) -> str:
        """A value's feature."""
        ...


@dataclass(frozen=True)
class TokenMinor:
    """float32 in spans of `KEYS` tokens, as kernels leave them."""

    pointers: tuple[str, ...] = ("k", "v")
    ints: tuple[str, ...] = tuple(f"{value}_{step}" for value in "kv" for step in ("stride", "span", "head", "batch"))

    def head(self, w: Writer) -> None:
        w.opaque("kt", "batch * k_batch + shared * k_head")
        w.opaque("vt", "batch * v_batch + shared * v_head")

    def load(self, w: Writer) -> None:
        w.opaque("kb", "kt + block * k_span")
        w.opaque("vb", "vt + block * v_span")

    def k(self, feature: str, key: str) -> str:
        return f"k[kb + {feature} * k_stride + {key}]"

    def v(self, feature: str, key: str) -> str:
        return f"v[vb + {feature} * v_stride + {key}]"


@dataclass(frozen=True)
class Sight:
    """Every query sees every key."""

    pointers: tuple[str, ...] = ()
    ints: tuple[str, ...] = ()

    def head(self, w: Writer) -> None:
        """Once per tile: `batch`, `head`, `start` and `offset` are bound."""

    @contextmanager
    def blocks(self, w: Writer, width: int) -> Iterator[None]:
        """The loop over blocks that a tile of `width` queries may see; binds `block`."""
        with w.block(f"for block in range({self.end(width)}):"):
            yield

    def end(self, width: int) -> str:
        return f"(Sk + {KEYS - 1}) // {KEYS}"

    def mixed(self, width: int) -> str:
        """Whether some of the tile's queries may not see some of the block's keys; "" if that cannot be."""
        return ""

    def seen(self, score: str, key: str, r: int, lanes: int) -> str:
        """The score of `key` of the block for the tile's r-th vector of queries, or -inf."""
        return score


@dataclass(frozen=True)
class Causal(Sight):
    """Query i sees keys 0 to i."""

    def end(self, width: int) -> str:
        return f"(T.min(Sk, start + offset + {width}) + {KEYS - 1}) // {KEYS}"

    def mixed(self, width: int) -> str:
        return f"key + {KEYS - 1} > start + offset"

    def seen(self, score: str, key: str, r: int, lanes: int) -> str:
        query = f"T.Cast('int32', start + offset) + {r * lanes}"
        queries = query if lanes == 1 else f"T.ramp({query}, 1, {lanes})"
        return f"T.Select({splat(f'T.Cast({chr(39)}int32{chr(39)}, key + {key})', lanes)} <= {queries}, {score}, {splat(HIDDEN, lanes)})"


@dataclass(frozen=True)
class Masked(Sight):
    """A mask is added to the scores, where its tiles say that it must be. `rows`: every query has its own, token-minor."""

    rows: bool = True
    pointers: tuple[str, ...] = ("mask", "tiles")
    ints: tuple[str, ...] = ("m_stride", "m_span", "m_head", "m_batch", "t_row", "t_head", "t_batch")

    def head(self, w: Writer) -> None:
        w.opaque("mt", f"{place('m')} + head * m_head + offset" if self.rows else "batch * m_batch + head * m_head")
        w.opaque("tt", f"batch * t_batch + head * t_head + start // {SPAN} * t_row")

    @contextmanager
    def blocks(self, w: Writer, width: int) -> Iterator[None]:
        with super().blocks(w, width):
            w.opaque("kind", "T.Cast('int64', tiles[tt + block])")
            with w.block("if kind != 0:"):
                yield

    def mixed(self, width: int) -> str:
        return "kind == 2"

    def seen(self, score: str, key: str, r: int, lanes: int) -> str:
        at = f"mt + (key + {key}) * m_stride"
        return f"{score} + {vec('mask', f'{at} + {r * lanes}', lanes) if self.rows else splat(f'mask[{at}]', lanes)}"


SIGHTS: dict[str, Sight] = {"": Sight(), "causal": Causal(), "rows": Masked(), "keys": Masked(rows=False)}
"""By what `AttentionSpec.hides` calls them."""
