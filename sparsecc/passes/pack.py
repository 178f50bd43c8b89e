"""pack: the storage that is fastest here, or dense where none pays.

    y = linear(x, [w], terms="f32[N, K] % block(4, 1)")
      -->  y = linear(x, [ptr, idx, val], terms="f32[N, K] % block(4, 1) @ bsr(4, 1)")

The tuner measures the formats that can hold the pattern against the dense code. What loses keeps its dense weight. A linear that is a
convolution on a sequence of pixels is packed in any case, dense if that is fastest: its neighbours want the layout.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sparsecc.codegen.kernel import FEW
from sparsecc.formats import ANY, NM, Bitmap, Block, Compressed, Dense, Format, Panels, Pattern, Sell, Shared
from sparsecc.formats.codec import Raw
from sparsecc.formats.level import NM as NMLevel
from sparsecc.ir.image_ops import PATCHES, WEIGHTED
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import LinearView, Program, Region
from sparsecc.passes.choices import choices
from sparsecc.passes.context import Choice, Context, Picture, Problem
from sparsecc.passes.fuse import ACTIVATION_TARGETS, ADDS

aten = torch.ops.aten

BITMAP_FROM = 0.25
"""Above this density one bit per entry costs less than an index per nonzero."""

SMALLER_FROM = 1 / 16
"""Above this density one bit per entry is no more than 16 bits per nonzero: what counts for a few tokens."""

SLICED = Format(Sell(4, 64), swizzle=Panels(192))
"""Nonzeros for many tokens. Every multiply-add loads a vector of x: 192 columns of 64 tokens are what a first-level cache holds, and
four rows at once keep enough of them under way."""


PLANES = (Format(Sell(2, 64), swizzle=Panels(128)), Format(Sell(2, 64)))
"""Nonzeros of convolutions, besides: a plane's tokens are far from the next plane's, and fewer of them at once stay in reach."""


@dataclass(frozen=True)
class Pack:
    """The pass; see the file's docstring."""

    name: str = "pack"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ("packed",)

    def run(self, program: Program, context: Any = None) -> None:
        if not isinstance(context, Context) or context.tuner is None:
            return
        problems: dict[fx.Node, Problem] = {}
        for view in program.linears():
            if view.plain and program.is_const(view.params[0]):
                picture = picture_of(view) if context.tuner.between is not None else None
                if view.terms[0].pattern != ANY or picture is not None:
                    problem = _problem(program, view, context, picture)
                    if problem is not None:
                        problems[view.node] = problem
        for node, choice in choices(program, problems, context).items():
            _store(program, LinearView(node), choice)


def _problem(program: Program, view: LinearView, context: Context, picture: Picture | None) -> Problem | None:
    """None where there is nothing to choose, which the region then says."""
    assert context.tuner is not None
    weight, pattern, region = program.const(view.params[0]), view.terms[0].zeros, program.region(view.node)
    name = region.weights[0].removesuffix(".weight") if region.weights else view.node.name
    rule = context.spec.rule_for(name)
    tokens = tokens_of(view.x)
    formats = context.tuner.formats(pattern, weight, rule.codec, tokens, rule.compute) if pattern != ANY else []
    if picture is not None:
        formats += [replace(fmt, codec=formats[0].codec) for fmt in PLANES if SLICED.level in {f.level for f in formats}]
        formats.append(Format(Dense(), (4, 1)))
    kept = [fmt for fmt in formats if fmt.refuses(weight) is None]
    region.more |= {"m": tokens, "shape": tuple(weight.shape), "zeros": 1 - int(weight.count_nonzero()) / max(1, weight.numel()),
                    "dense_bytes": weight.numel() * weight.element_size()}
    if not kept or tokens == 0:
        region.reason = "no tokens" if kept else f"no format holds it: {formats[0].refuses(weight)}"
        return None
    return Problem(name, weight, tuple(kept), tokens, view.epilogue, view.residual is not None, picture)


def _store(program: Program, view: LinearView, choice: Choice) -> None:
    weight, region = program.const(view.params[0]), program.region(view.node)
    _note(region, choice)
    if choice.format is None:
        return
    arrays = {part: array.to(weight.device) for part, array in choice.format.pack(weight).items()}
    hint = str(view.params[0].target)
    params = [program.add_const(f"{hint}_{part}", array, program.weight_name(view.params[0])) for part, array in arrays.items()]
    region.bytes = sum(array.numel() * array.element_size() for array in arrays.values())
    view.replace(params=params, terms=(view.terms[0].with_(format=choice.format),))


def picture_of(view: LinearView) -> Picture | None:
    """What the linear is a convolution of, None if it is none: then its input comes from no pictures."""
    x = view.x
    if not of_pictures(x):
        return None
    if x.target is PATCHES:
        source, size, window, pads = x.args[:4]
        B, _, C = value_of(source).shape  # type: ignore[arg-type]
        return Picture(_hint(B), int(C), tuple(size), tuple(window), tuple(pads))  # type: ignore[arg-type]
    B, S, C = value_of(x).shape
    side = math.isqrt(int(S))
    return Picture(_hint(B), int(C), (side, side) if side * side == S else (int(S), 1), (1, 1, 1, 1), (0, 0, 0, 0))


def of_pictures(node: fx.Node) -> bool:
    """Whether a value is a sequence of pixels, which its neighbours want token-minor."""
    if node.target in (*WEIGHTED, PATCHES):
        return True
    if is_entry(node):
        return True
    if node.target is LINEAR or node.target in ACTIVATION_TARGETS or node.target in ADDS:
        return any(of_pictures(i) for i in node.all_input_nodes if i.op != "get_attr")
    return False


def is_entry(node: fx.Node) -> bool:
    """Whether it is the sequence of a picture's pixels, as convolve makes it."""
    source = node.args[0] if node.target is aten.transpose.int else None
    return isinstance(source, fx.Node) and source.target is aten.flatten.using_ints and value_of(source.args[0]).ndim == 4  # type: ignore[arg-type]


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 1)


def formats_for(pattern: Pattern, weight: Tensor, codec: str | None, tokens: int, compute: str | None = None) -> list[Format]:
    """Formats that can hold the zeros of `pattern`, the natural one first; none approximates unless the codec was asked for by name.
    For many tokens and `compute` "bf16" there are those that instructions on pairs and tiles read, too."""
    density = int(weight.count_nonzero()) / max(1, weight.numel())
    natural: list[Format] = []
    if isinstance(pattern, Block):
        natural.append(Format(Compressed(), (pattern.rows, pattern.cols)))
    if isinstance(pattern, NM):
        natural.append(Format(NMLevel(pattern.n, pattern.m)))
    if not natural or natural[0].block == (1, 1):
        natural += [SLICED] * (tokens > 1)
        natural += [Format(Compressed())] * (Format(Compressed()) not in natural)
        if density >= (SMALLER_FROM if tokens <= FEW else BITMAP_FROM):
            natural.append(Format(Bitmap()))
    raw = Raw(codec) if codec else Raw()
    if codec is None:
        for smaller in (Raw("bf16"), Raw("f16")):
            if weight.dtype == smaller.torch_dtype:
                raw = smaller
    return [replace(fmt, codec=raw) for fmt in natural] + (_half(pattern, weight) if compute == "bf16" and tokens > FEW else [])


def _half(pattern: Pattern, weight: Tensor) -> list[Format]:
    """Formats for products in bf16: pairs of columns, and, from 16 rows on, tiles."""
    rows = pattern.rows if isinstance(pattern, Block) else 1
    tiles = [Format(Shared(16, 32)), Format(Dense(), swizzle=Panels(32))] * (len(weight) >= 16)
    return [replace(fmt, codec=Raw("bf16")) for fmt in (*tiles, Format(Shared(math.gcd(rows, 8), 2)))]


def tokens_of(x: fx.Node) -> int:
    """M of the example: the product of x's leading dimensions, symbols at their hints."""
    count = 1
    for size in value_of(x).shape[:-1]:
        count *= size if isinstance(size, int) else int(size.node.hint if size.node.hint is not None else 128)
    return count


def _note(region: Region, choice: Choice) -> None:
    region.format = "dense" if choice.format is None else str(choice.format)
    region.choice = "dense" if choice.format is None else f"{choice.format} {choice.config}"
    region.reason = choice.reason
    region.times = {name: 1e6 * seconds for name, seconds in choice.alternatives.items()}
    for key, value in (("predicted_us", choice.predicted), ("measured_us", choice.seconds), ("dense_us", choice.dense_seconds)):
        if value is not None:
            region.more[key] = 1e6 * value
    region.more["m"] = choice.tokens or region.more["m"]
    region.more["break_even"] = choice.break_even
    region.more["config"] = choice.config
