"""What people read about dimension groups: axes that must be cut together, how many of their slices are dead, and why dead ones stay."""
from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, fx

from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import DimGroup, LinearView
from sparsecc.passes.fuse import joint_name
from sparsecc.passes.links import Masks, Place
from sparsecc.passes.rules.base import argument
from sparsecc.passes.rules.linear import Conv, Embedding, Linear

if TYPE_CHECKING:
    from sparsecc.passes.propagate import Analysis

MANY = 4
"""Names in a text; of more, the first few."""


def describe(a: Analysis, masks: Masks) -> list[DimGroup]:
    """The groups in which anything is dead, in program order."""
    found = []
    for group in a.groups:
        writers = [key for key, place in group if isinstance(a.flows.get(key), Linear | Conv | Embedding) and _features(a, key) == place]
        if writers:
            made = _described(a, masks, group, writers)
            if made is not None:
                found.append(made)
    return found


def _features(a: Analysis, node: fx.Node) -> int:
    flow = a.flows[node]
    places = flow.facts.at(flow.axis if isinstance(flow, Conv) else -1)
    return places[0] if len(places) == 1 else -1


def _described(a: Analysis, masks: Masks, group: list[Place], writers: list[fx.Node]) -> DimGroup | None:
    size = max(a.flows[w].facts.known.shape[_features(a, w)] for w in writers)
    dead = {w: _dead(a, w) for w in writers}
    kept = {w: masks.of[w, _features(a, w)] for w in writers}
    most = max(writers, key=lambda w: int(dead[w].sum()) if len(dead[w]) == size else -1)
    if not any(d.any() for d in dead.values()):
        return None
    stays = [w for w in writers if (dead[w] & kept[w]).any()]
    return DimGroup(
        name=_joined([weight_of(a, w) for w in writers]), size=size, dead=int(dead[most].sum()), dropped=int((~kept[most]).sum()),
        readers=tuple(dict.fromkeys(_readers(a, group))), why=tuple(_why(a, group, writers, stays, dead)) if stays else (),
    )


def _dead(a: Analysis, node: fx.Node) -> Tensor:
    """bool [features]: constant, or not needed."""
    facts, place = a.flows[node].facts, _features(a, node)
    alive = a.wanted(node) & ~facts.known
    others = [d for d in range(alive.ndim) if d != place]
    return ~(alive.any(dim=others) if others else alive)


def _why(a: Analysis, group: list[Place], writers: list[fx.Node], stays: list[fx.Node], dead: dict[fx.Node, Tensor]) -> list[str]:
    reasons = [why for key in dict.fromkeys(key for key, _ in group) if isinstance(key, fx.Node) for _, why in a.pins.get(key, ())]
    if reasons:
        return list(dict.fromkeys(reasons))[:MANY]
    outside = [key.name for key, place in group if isinstance(key, fx.Node) and key in a.flows
               and not a.flows[key].facts.factors[place].tracked and not a.flows[key].facts.factors[place].free]
    if outside:
        return [f"joined with {outside[0]}, whose entries are not told apart"]
    alive = [w for w in writers if any(len(dead[w]) == len(dead[s]) and bool((dead[s] & ~dead[w]).any()) for s in stays)]
    if alive:
        return [f"they are alive in {_joined([weight_of(a, w) for w in alive[:MANY]])}"]
    return ["heads, groups or blocks of which others are alive"]


def _readers(a: Analysis, group: list[Place]) -> list[str]:
    keys = {key for key, _ in group}
    return [weight_of(a, node) for node, flow in a.flows.items() if isinstance(flow, Linear) and flow.view.x in keys
            and any(flow.view.x is key and place in flow.span(key, -1).factors for key, place in group)]


def weight_of(a: Analysis, node: fx.Node) -> str:
    """The module whose weight a node has."""
    flow = a.flows[node]
    if node.target is LINEAR:
        weight = LinearView(node).params[0]
    else:
        weight = flow.weight if isinstance(flow, Embedding) else argument(node, 1, "weight")
    return a.program.weight_name(weight).removesuffix(".weight")


def _joined(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    text = joint_name(names[:MANY]) if len(names) > 1 else "".join(names)
    return text if len(names) <= MANY else f"{text} and {len(names) - MANY} more"

