"""reorder: rows and columns of constants change places, offline, so that zeros come in blocks or N:M groups.

    h = linear(x, [w1], b1);  y = linear(gelu(h), [w2])
    -->
    h = linear(x, [w1[order]], b1[order]);  y = linear(gelu(h), [w2[:, order]])         and w1[order] is block(4, 1), where w1 was not

A magnitude mask that is structured up to a permutation of neurons, channels or features of a head looks unstructured; the permutation is
absorbed by whatever reads and writes them (Pool and Yu, NeurIPS 2021, permute input channels for 2:4 so), and costs nothing at run time.
`wires` says what may change places, `formats.ordering` looks for the order, the cost model says whether the pattern found is better. A
weight that is neither sparse nor regular under any order is given up after a look at a part of it.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from sparsecc.formats import ANY, NM, Block, Pattern, measure
from sparsecc.formats.grid import kept_blocks
from sparsecc.formats.ordering import block_order, nm_order, nm_possible, siblings
from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import Program, Region
from sparsecc.passes.context import Context, Problem
from sparsecc.passes.convolution import CONVOLUTION, conv_region, convolutions
from sparsecc.passes.dims import Stop
from sparsecc.passes.pack import formats_for, tokens_of
from sparsecc.passes.rules.linear import touched
from sparsecc.passes.wires import Found, Use, Wires, matched
from sparsecc.spec import Rule as SpecRule
from sparsecc.spec import SparsitySpec

ZEROS = 0.3
"""Fewer zeros pay in no pattern."""
ALIKE = 0.5
"""Fraction of rows with a sibling from which on looking for blocks is worth while."""
PAYS = 0.97
"""Of the time before; a reordering that promises less is left."""
FEW = 4
"""Weights of which each is also looked at alone."""
SMALLEST = 8
"""Rows and columns of a weight that is worth it."""
FULL = 0.9
"""Of N:M groups, from which on that pattern explains the zeros."""
TARGETS = (NM(1, 4), NM(1, 2), NM(2, 4), NM(4, 8))


@dataclass(frozen=True)
class Reorder:
    """The pass; see the file's docstring."""

    name: str = "reorder"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        context = context if isinstance(context, Context) else Context()
        if context.spec.skips:  # thresholds and counts per neuron name them by number
            return
        sites = list(_sites(program, context.spec))
        if not any(site.wishes for site in sites):
            return
        search = Search(Wires(program), sites, context)
        search.run()
        search.apply()
        program.finish()


@dataclass(frozen=True)
class Wish:
    """What an order along an axis (0 rows, 1 columns) may bring: blocks, or an N:M pattern."""

    axis: int
    pattern: NM | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """A weight as a matrix, what is asked of it, and what it may gain. `taps`: columns per entry of its second axis."""

    user: fx.Node
    const: fx.Node
    matrix: Tensor
    rule: SpecRule
    region: Region
    tokens: int
    taps: int
    wishes: tuple[Wish, ...]


def _sites(program: Program, spec: SparsitySpec) -> Iterator[Site]:
    """Weights with zeros that may be stored by them."""
    for view in program.linears():
        if view.plain and program.is_const(view.params[0]):
            weight = program.const(view.params[0]).detach()
            if _sparse(weight):
                rule = _rule(program, view.params[0], spec)
                region, tokens = program.region(view.node), tokens_of(view.x)
                yield Site(view.node, view.params[0], weight, rule, region, tokens, 1, _wishes(weight, rule, 1))
    for conv in convolutions(program):
        const: Any = conv.node.args[1]
        if not conv.dense_because() and _sparse(conv.matrix()):
            rule, taps = _rule(program, const, spec), conv.weight[0, 0].numel()
            pixels = program.type(conv.node)
            tokens = 128 if pixels is None else max(1, int(torch.tensor([d for d in pixels.shape[2:] if isinstance(d, int)]).prod()))
            yield Site(conv.node, const, conv.matrix(), rule, conv_region(program, conv), tokens, taps, _wishes(conv.matrix(), rule, taps))


def _rule(program: Program, const: fx.Node, spec: SparsitySpec) -> SpecRule:
    return spec.rule_for(program.weight_name(const).removesuffix(".weight"))


def _sparse(weight: Tensor) -> bool:
    N, K = weight.shape
    if min(N, K) < SMALLEST or not weight.dtype.is_floating_point:
        return False
    return float((weight[:: max(1, N // 64)] == 0).double().mean()) >= ZEROS


def _wishes(weight: Tensor, rule: SpecRule, taps: int) -> tuple[Wish, ...]:
    """What to look for, after a look at a part of the weight."""
    if rule.mode == "dense" or (rule.pattern is not None and rule.pattern.mask_violation(weight) is None):
        return ()
    found: list[Wish] = []
    wanted = rule.pattern
    if not isinstance(wanted, NM):
        rows, columns = (wanted.rows, wanted.cols) if isinstance(wanted, Block) else (4, 4)
        if (rows > 1 and siblings(weight) >= ALIKE) or (columns > 1 and siblings(weight.t()) >= ALIKE):
            found += _blocks(weight)
    if taps == 1 and (wanted is None or isinstance(wanted, NM)):
        density = float((weight[:: max(1, len(weight) // 64)] != 0).double().mean())
        targets = (wanted,) if isinstance(wanted, NM) else tuple(t for t in TARGETS if FULL * t.density <= density <= t.density / FULL)
        found += [Wish(1, t) for t in targets if nm_possible(weight, t.n, t.m) and t.mask_violation(weight) is not None]
    return tuple(found)


def _blocks(weight: Tensor) -> list[Wish]:
    """Axes along which blocks that are there already are alike."""
    pattern = measure(weight).explain()
    height, width = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    grid = weight != 0
    if height * width > 1:
        N, K = (side - side % step for side, step in zip(grid.shape, (height, width), strict=True))
        grid = grid[:N, :K].reshape(N // height, height, K // width, width).any(3).any(1)
    return [Wish(axis) for axis in (0, 1) if siblings((grid if axis == 0 else grid.t()).float()) >= ALIKE]


@dataclass
class Search:
    """Orders for the cells of wires, one group of cells after another. `target` i64 [labels]: which label comes in a label's place;
    `hidden` bool [labels]: rows taken for zeros."""

    wires: Wires
    sites: list[Site]
    context: Context
    found: Found = field(init=False)
    target: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.found = self.wires.found()
        self.target = torch.arange(self.wires.count)
        self.hidden = torch.zeros(self.wires.count, dtype=torch.bool)
        self.uses: dict[tuple[fx.Node, fx.Node], Use] = {(use.user, use.const): use for use in self.wires.uses}
        self.prices: dict[tuple[fx.Node, Pattern], float] = {}
        self.before: dict[fx.Node, Pattern] = {}
        self.orders: list[tuple[list[Site], Tensor]] = []

    def run(self) -> None:
        """Take what pays. Where nothing was found, other groups' orders may help: blocks of 4 x 4 are found one side at a time. And rows
        that nobody reads may be why: they are looked at as zeros, which they will be, and come last."""
        self._say_stuck()
        groups = list(self._groups())
        gained = [self._improve(cells, sites) for cells, sites in groups]
        if any(gained):
            gained = [done or self._improve(cells, sites) for (cells, sites), done in zip(groups, gained, strict=True)]
        unread = self._unread()
        for (cells, sites), done in zip(groups, gained, strict=True):
            here = torch.cat(cells)
            if not done and bool(unread[here].any()):
                self.hidden[here] = unread[here]
                self.hidden[here] &= self._improve(cells, sites)

    def _unread(self) -> Tensor:
        """bool [labels]: columns of zeros wherever they are read. Their rows will leave."""
        read, alive = torch.zeros(2, self.wires.count, dtype=torch.bool)
        for use in self.wires.uses:
            weight = self.wires.program.const(use.const)
            if weight.ndim > 1 and len(use.ends[1]) > 1 and use.user.target in (LINEAR, CONVOLUTION):
                label = self.found.label[use.ends[1]]
                read[label] = True
                alive[label[touched(weight.flatten(2).abs().amax(2) if weight.ndim > 2 else weight, torch.ones(len(weight)).bool())]] = True
        return read & ~alive & (self.found.cell >= 0)

    # ---- groups

    def labels(self, site: Site, axis: int) -> Tensor:
        """i64 [entries of an axis of the matrix]: their labels, columns of a convolution by channel."""
        use = self.uses.get((site.user, site.const))
        size = site.matrix.shape[axis] // (site.taps if axis == 1 else 1)
        ends = torch.zeros(size, dtype=torch.int64) if use is None or axis >= len(use.ends) else use.ends[axis]
        return self.found.label[ends]

    def _groups(self) -> Iterator[tuple[list[Tensor], list[Site]]]:
        """Cells that lie along an axis of the same weight, as the labels of each, and all weights that they are in."""
        graph: nx.Graph = nx.Graph()
        members: dict[int, dict[int, None]] = {}
        for i, site in enumerate(self.sites):
            for axis in (0, 1):
                cells = [int(c) for c in self.found.cell[self.labels(site, axis)].unique() if c >= 0]
                graph.add_nodes_from(cells)
                graph.add_edges_from((cells[0], other) for other in cells[1:])
                for cell in cells:
                    members.setdefault(cell, {})[i] = None
        label = torch.unique(self.found.label)
        for component in nx.connected_components(graph):
            cells = [label[self.found.cell[label] == cell] for cell in sorted(component)]
            sites = sorted({i for cell in component for i in members[cell]})
            cells = [cell for cell in cells if len(cell) > 1]
            if cells and any(self.sites[i].wishes for i in sites):
                yield cells, [self.sites[i] for i in sites]

    def _say_stuck(self) -> None:
        for site in self.sites:
            for wish in site.wishes:
                labels = self.labels(site, wish.axis)
                if bool((self.found.cell[labels] < 0).all()):
                    why = next((self.found.cause[x] for x in labels.tolist() if x in self.found.cause), "nothing tells them apart")
                    what = "rows" if wish.axis == 0 else "columns"
                    site.region.notes.append(f"alike {what} stay where they are: {why}")

    # ---- one group

    def _improve(self, cells: list[Tensor], sites: list[Site]) -> bool:
        """Whether an order was taken."""
        best, taken = self._cost(sites, self.target), set[Wish]()
        for chosen, wish in self._tries(cells, sites):
            if wish in taken:
                continue
            target = self._ordered(cells, chosen, wish)
            if target is None or torch.equal(target, self.target):
                continue
            cost = self._cost(sites, target)
            if cost[0] < best[0] or (cost[0] == best[0] and cost[1] <= PAYS * best[1]):
                self.target, best = target, cost
                taken.add(wish)
        if taken:
            self.orders.append((sites, torch.cat(cells)))
        return bool(taken)

    def _tries(self, cells: list[Tensor], sites: list[Site]) -> Iterator[tuple[list[Site], Wish]]:
        """(weights to look at together, what for): all that want the same of the group, then, of a few, each alone."""
        inside = torch.cat(cells)
        for wish in dict.fromkeys(wish for site in sites for wish in site.wishes):
            want = [site for site in sites if wish in site.wishes and bool(torch.isin(self.labels(site, wish.axis), inside).any())
                    and self._would_pay(site, wish)]
            if want:
                yield want, wish
            if 1 < len(want) <= FEW:
                yield from (([site], wish) for site in want)

    def _would_pay(self, site: Site, wish: Wish) -> bool:
        """Whether N:M is asked for, or better than what is there now: looking for its order takes longer than for blocks."""
        if wish.pattern is None or site.rule.pattern is not None:
            return True
        weight = self._matrix(site, self.target)
        ideal = (torch.arange(weight.shape[1]) % wish.pattern.m < wish.pattern.n).to(weight).expand(weight.shape)
        return self._price(site, ideal, wish.pattern) <= PAYS * self._price(site, weight, measure(weight).explain())

    def _ordered(self, cells: list[Tensor], sites: list[Site], wish: Wish) -> Tensor | None:
        """The targets with each cell in the order that fits these weights best; None if there is none."""
        target = self.target.clone()
        for cell in cells:
            mask = self._mask(cell, sites, wish.axis)
            if mask is None:
                continue
            order = block_order(mask) if wish.pattern is None else nm_order(mask.t(), wish.pattern.n, wish.pattern.m)
            if order is None:
                return None
            target[cell] = self.target[cell][order]
        return target

    def _mask(self, cell: Tensor, sites: list[Site], axis: int) -> Tensor | None:
        """bool [labels of a cell, entries]: what the weights keep at each, as they are ordered now; None if the cell is not in them."""
        parts: list[Tensor] = []
        for site in sites:
            labels = self.labels(site, axis)
            here = torch.isin(labels, cell)
            if not here.any():
                continue
            kept = self._matrix(site, self.target).detach().cpu() != 0
            kept = kept if axis == 0 else kept.view(len(kept), -1, site.taps).permute(1, 0, 2).reshape(len(labels), -1)
            place = here.nonzero()[:, 0][labels[here].argsort(stable=True)]
            lanes = len(place) // len(cell)
            if lanes * len(cell) != len(place):
                return None
            parts.append(kept[place].reshape(len(cell), -1))
        return torch.cat(parts, 1) if parts else None

    def _matrix(self, site: Site, target: Tensor) -> Tensor:
        """A weight under an order."""
        weight = site.matrix
        if self.hidden.any() and bool((hidden := self.hidden[self.labels(site, 0)]).any()):
            weight = weight * ~hidden[:, None].to(weight.device)
        for axis in (0, 1):
            labels = self.labels(site, axis)
            wanted = torch.where(self.found.cell[labels] >= 0, target[labels], labels)
            if torch.equal(wanted, labels):
                continue
            index = matched(labels, wanted).to(weight.device)
            weight = weight.view(len(weight), -1, site.taps)[:, index].flatten(1) if axis == 1 else weight[index]
        return weight

    def _cost(self, sites: list[Site], target: Tensor) -> tuple[int, float]:
        """(requirements that do not hold, seconds or bytes) of all weights of a group."""
        broken, total = 0, 0.0
        for site in sites:
            if site.rule.mode == "dense":
                continue
            weight = self._matrix(site, target)
            pattern = site.rule.pattern or measure(weight).explain()
            broken += site.rule.pattern is not None and site.rule.pattern.mask_violation(weight) is not None
            if (site.user, pattern) not in self.prices:  # another order has as many entries
                self.prices[site.user, pattern] = self._price(site, weight, pattern)
            total += self.prices[site.user, pattern]
            self.before.setdefault(site.user, pattern)
        return broken, total

    def _price(self, site: Site, weight: Tensor, pattern: Pattern) -> float:
        """Seconds by the target's cost model; bytes where nothing runs."""
        size = weight.numel() * weight.element_size()
        tuner = self.context.tuner
        formats = [] if pattern == ANY else (
            formats_for(pattern, weight, None, site.tokens) if tuner is None
            else tuner.formats(pattern, weight, site.rule.codec, site.tokens, site.rule.compute))
        kept = tuple(fmt for fmt in formats if fmt.refuses(weight) is None)
        if tuner is not None:
            return tuner.predicted(Problem(site.region.name, weight, kept, site.tokens, "", False))
        return float(min([size, *(fmt.nbytes(weight.shape[0], weight.shape[1], kept_blocks(weight, fmt.block)) for fmt in kept)]))

    # ---- doing it

    def apply(self) -> None:
        """Put the constants in order, and say so."""
        if not self.orders:
            return
        program, made = self.wires.program, {}
        for use, orders in zip(self.wires.uses, self._proved(), strict=True):
            moves = {axis: order for axis, order in enumerate(orders) if not torch.equal(order, torch.arange(len(order)))}
            if not moves:
                continue
            key = (use.const.target, *((axis, order.numpy().tobytes()) for axis, order in moves.items()))
            if key not in made:
                tensor = program.const(use.const).detach()
                for axis, order in moves.items():
                    tensor = tensor.index_select(axis, order.to(tensor.device))
                made[key] = program.add_const(str(use.const.target), tensor, program.weight_name(use.const))
            use.user.replace_input_with(use.const, made[key])
        for site in dict.fromkeys(site for sites, _ in self.orders for site in sites):
            weight = self._matrix(site, self.target)
            pattern = site.rule.pattern or measure(weight).explain()
            if pattern != self.before.get(site.user) or (site.rule.pattern and site.rule.pattern.mask_violation(site.matrix)):
                count = len(torch.cat([labels for sites, labels in self.orders if site in sites]).unique())
                site.region.notes.append(f"{pattern} after reordering {count} neurons or channels, at no cost at run time")
                program.regions[site.user.name] = site.region

    def _proved(self) -> list[tuple[Tensor, ...]]:
        """What each constant's entries become, of all orders, or without those that the program does not allow."""
        try:
            return self.wires.moved(self.found, self.target)
        except Stop:
            wanted, self.target = self.target, torch.arange(self.wires.count)
        for sites, labels in list(self.orders):
            target = self.target.clone()
            target[labels] = wanted[labels]
            try:
                self.wires.moved(self.found, target)
                self.target = target
            except Stop as stop:
                self.orders = [order for order in self.orders if order[1] is not labels]
                for site in sites:
                    site.region.notes.append(f"a reordering was found and left: {stop}")
        return self.wires.moved(self.found, self.target)
