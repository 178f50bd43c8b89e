"""compiled.graph("svg"): the compiled program as a picture, with what is known of the zeros on its edges.

A box is an operation, from top to bottom in the order of the data. Blue boxes skip zeros, grey ones are dense, plain ones move or
combine values. A weight's box says how much of it is stored; an edge that has lost slices is drawn orange and says how many are left.
"""
from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsecc.errors import SpecError, TargetError
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import LinearView, Program, Region
from sparsecc.passes.rules.base import name_of

FORMATS = ("png", "svg")
SPARSE, DENSE, OTHER, ENDS, CUT = "#9ecae1", "#d9d9d9", "#ffffff", "#c7e9c0", "#e6550d"
QUIET = frozenset((
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "getitem", "contiguous", "clone", "to",
    "split", "chunk", "split_with_sizes", "unbind", "flatten", "unflatten", "tokens", "detach", "alias", "_assert_scalar", "t",
))
"""Drawn as part of the edges: they move values."""


@dataclass(frozen=True)
class Box:
    """A node of the picture."""

    node: fx.Node
    text: str
    color: str


def picture(program: Program, regions: dict[str, Region], kind: str, before: Program | None = None) -> bytes:
    """The program drawn as "png" or "svg". `before`: the program as it came in, which says which widths were cut.

    Raises SpecError for another kind, TargetError where matplotlib is not installed.
    """
    if kind not in FORMATS:
        raise SpecError(f"graph({kind!r}): use 'png' or 'svg'")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TargetError("graph() draws with matplotlib: pip install matplotlib") from error
    boxes = {box.node: box for node in program.graph.nodes if (box := _box(program, regions, node)) is not None}
    boxes, edges, last = _clusters(program, boxes)
    place = _layout(boxes, edges)
    columns, rows = (1 + max((xy[i] for xy in place.values()), default=0) for i in (0, 1))
    figure = Figure(figsize=(min(60.0, 2 + 2.6 * columns), min(600.0, 1 + 0.62 * rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.6, columns - 0.4)
    axes.set_ylim(rows - 0.3, -0.8)
    axes.axis("off")
    widths = {} if before is None else _widths(before)
    for source, target in edges:
        _arrow(axes, place[source], place[target], _edge_text(last[source], widths))
    for node, box in boxes.items():
        x, y = place[node]
        axes.text(x, y, box.text, ha="center", va="center", fontsize=8, zorder=3,
                  bbox={"boxstyle": "round,pad=0.35", "facecolor": box.color, "edgecolor": "#636363", "linewidth": 0.8})
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


# ---- what is drawn


def _box(program: Program, regions: dict[str, Region], node: fx.Node) -> Box | None:
    if node.op == "placeholder":
        return Box(node, f"{node.name}\n{_shape(node)}", ENDS) if _depends(node) else None
    if node.op not in ("call_function", "call_method") or value_of(node) is None or not _varies(program, node):
        return None
    name = name_of(node)
    if node.target is LINEAR:
        view = LinearView(node)
        region = regions.get(node.name)
        rows, cols = view.shape
        sparse = any(term.format is not None for term in view.terms)
        kept = "" if region is None or region.more.get("zeros") is None else f", {1 - region.more['zeros']:.0%} kept"
        text = f"{'' if region is None else region.name}\n{rows} x {cols}{f' {view.terms[0].format}{kept}' if sparse else ''}"
        return Box(node, text.strip(), SPARSE if sparse else DENSE)
    if name in ("linear", "conv1d", "conv2d", "conv3d", "convolution"):
        weight: Any = node.args[1]
        label = program.weight_name(weight).removesuffix(".weight") if weight.op == "get_attr" else name
        return Box(node, f"{label}\n{' x '.join(map(str, _sizes(weight)))}", DENSE)
    if name in QUIET or name.startswith("sym_"):
        return None
    return Box(node, name.replace("scaled_dot_product_attention", "attention"), OTHER)


def _varies(program: Program, node: fx.Node) -> bool:
    """Whether it is a value of floats: masks and positions would bury the rest."""
    found = program.type(node)
    return found is None or found.dtype.is_floating_point


def _depends(node: fx.Node) -> bool:
    return bool(node.users) and value_of(node) is not None and hasattr(value_of(node), "shape")


def _sources(program: Program, node: fx.Node, boxes: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """The boxes that a node's operands come from, through what only moves values; sizes and masks are left out."""
    found: dict[fx.Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        one = waiting.pop(0)
        if one in boxes:
            found[boxes[one]] = None
        elif one.op != "get_attr" and value_of(one) is not None and name_of(one) in QUIET and _varies(program, one):
            waiting += one.all_input_nodes
    return list(found)


Edges = list[tuple[fx.Node, fx.Node]]


def _clusters(program: Program, boxes: dict[fx.Node, Box]) -> tuple[dict[fx.Node, Box], Edges, dict[fx.Node, fx.Node]]:
    """Operations that follow each other and read nothing else, such as those of a norm, as one box; the edges between boxes; and the
    operation that each box ends with."""
    member: dict[fx.Node, fx.Node] = {}
    reads: dict[fx.Node, dict[fx.Node, None]] = {}
    names: dict[fx.Node, list[str]] = {}
    for node, box in boxes.items():
        sources = _sources(program, node, member)
        joins = (s for s in sources if box.color == boxes[s].color == OTHER and all(o is s or o in reads[s] for o in sources))
        home = next(joins, node)
        member[node] = home
        reads.setdefault(home, {}).update((s, None) for s in sources if s is not home)
        names.setdefault(home, []).append(box.text)
    made = {home: boxes[home] if boxes[home].color != OTHER else Box(home, " ".join(dict.fromkeys(texts)), OTHER)
            for home, texts in names.items()}
    last = {home: node for node, home in member.items()}
    return made, [(source, home) for home, sources in reads.items() for source in sources], last


def _layout(boxes: dict[fx.Node, Box], edges: Edges) -> dict[fx.Node, tuple[float, float]]:
    """Rows by the longest way from an input; in a row, side by side, near what they read."""
    sources: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for source, target in edges:
        sources[target].append(source)
    row: dict[fx.Node, int] = {}
    for node in boxes:
        row[node] = 1 + max((row[s] for s in sources[node]), default=-1)
    place: dict[fx.Node, tuple[float, float]] = {}
    taken: dict[int, list[float]] = defaultdict(list)
    for node in boxes:
        near = [place[s][0] for s in sources[node]]
        wish = round(sum(near) / len(near)) if near else 0
        free = (c for step in range(len(boxes) + 1) for c in (wish + step, wish - step) if c >= 0 and c not in taken[row[node]])
        column = float(next(free))
        taken[row[node]].append(column)
        place[node] = column, float(row[node])
    return place


def _widths(before: Program) -> dict[str, Any]:
    return {node.name: _sizes(node) for node in before.graph.nodes}


def _edge_text(source: fx.Node, widths: dict[str, Any]) -> tuple[str, bool]:
    """(the shape that flows, and what it was; whether slices left it)."""
    now, was = _sizes(source), widths.get(source.name)
    if not was or len(was) != len(now) or [str(a) for a in was] == [str(b) for b in now]:
        return _shape(source), False
    cut = [isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(was, now, strict=True)]
    return " x ".join(f"{b} of {a}" if lost else str(b) for a, b, lost in zip(was, now, cut, strict=True)), any(cut)


def _sizes(node: fx.Node) -> list[Any]:
    value = value_of(node)
    return [int(s) if isinstance(s, int) else str(s) for s in getattr(value, "shape", ())]


def _shape(node: fx.Node) -> str:
    return " x ".join(str(s) for s in _sizes(node))


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], said: tuple[str, bool]) -> None:
    text, cut = said
    color = CUT if cut else "#969696"
    axes.annotate("", xy=(end[0], end[1] - 0.25), xytext=(start[0], start[1] + 0.25), zorder=1,
                  arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2.0 if cut else 0.9, "shrinkA": 0, "shrinkB": 0,
                              "connectionstyle": "arc3,rad=0.12" if end[1] - start[1] > 1.5 else "arc3,rad=0"})
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, text, fontsize=6, color=color, ha="center", va="center", zorder=2,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
