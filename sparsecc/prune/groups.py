"""Groups of coupled channels: which entries of which parameters are removed together.

A channel is what one row of the named weight computes, with everything that is coupled to it: the rows that it is multiplied with (gate and
up of a gated FFN), the columns that read it, its bias and its numbers in norms. A head is q and k rows, v rows and o columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparsecc.errors import SpecError
from sparsecc.formats import Channels, Heads
from sparsecc.prune.flow import Attention, Flow, Role, Use


@dataclass(frozen=True)
class Member:
    """A parameter of a group: the unit that each of its entries belongs to, int64 that broadcasts to its shape, -1 for none.

    `shared`: the units are key/value heads, each cleared once all of its query heads are.
    """

    name: str
    role: Role
    units: Tensor
    shared: bool = False


@dataclass(frozen=True)
class Group:
    """`units` channels or heads of `size` rows of the weights `named`, each with its members; `owner`: the key/value head of each unit."""

    named: tuple[str, ...]
    pattern: Channels | Heads
    units: int
    size: int
    members: tuple[Member, ...]
    owner: Tensor | None = None

    @property
    def name(self) -> str:
        return self.named[0]

    def dead(self, member: Member, removed: Tensor) -> Tensor:
        """bool, broadcastable to the member's parameter: its entries that belong to a removed unit. removed: bool[units]."""
        if member.shared and self.owner is not None:
            alive = torch.zeros(int(self.owner.max()) + 1, dtype=torch.bool).index_put_((self.owner[~removed],), torch.tensor(True))
            removed = ~alive
        return (member.units >= 0) & removed[member.units.clamp(min=0)]


@dataclass(frozen=True)
class Coupled:
    """Layers coupled by hand, for models that cannot be followed: globs over module names.

    rows:   their output channel i is channel i (for heads: query projections)
    cols:   their input channel i is channel i (for heads: the output projection)
    shared: rows of key and value projections, whose heads may each serve several query heads
    Write one for each layer, or one with {} in its globs, which stands for 0, 1, 2, ... as long as modules match.
    """

    rows: tuple[str, ...]
    cols: tuple[str, ...]
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Flowed:
    """What looking up a group needs: classes of channels, and for each class what is known of it."""

    flow: Flow
    classes: Tensor
    products: Tensor
    blocked: Mapping[int, str]
    uses: list[tuple[Use, Tensor, int, int]]  # the classes of its entries, -1 for none, the lowest and the highest of them

    @staticmethod
    def of(flow: Flow) -> _Flowed:
        classes = flow.channels.classes()
        blocked = {int(classes[channel]): why for channel, why in reversed(flow.blocked.items())}
        uses = []
        for use in flow.uses:
            found = torch.where(use.ids >= 0, classes[use.ids.clamp(min=0)], -1)
            if bool((found >= 0).any()):
                uses.append((use, found, int(found[found >= 0].min()), int(found.max())))
        return _Flowed(flow, classes, flow.channels.classes(product=True), blocked, uses)

    def made(self, parameter: str) -> Tensor:
        """The channels that a parameter computes, in order: int64[rows]. Raises SpecError if the trace did not see it."""
        for use in self.flow.uses:
            if use.name == parameter and use.role == "writes":
                return use.ids.reshape(-1)
        raise SpecError(f"{parameter} was not seen computing anything on the example inputs: exclude it or give inputs that reach it")

    def members(self, unit_of: Tensor, shared: bool = False) -> list[Member]:
        """unit_of: class -> unit, -1 for none."""
        found: dict[tuple[str, Role, bytes], Member] = {}
        inside = (unit_of >= 0).nonzero()[:, 0]
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (1, 0)
        for use, classes, low, high in self.uses:
            if high < first or low > last:
                continue
            units = torch.where(classes >= 0, unit_of[classes.clamp(min=0)], -1)
            if bool((units >= 0).any()):
                found.setdefault((use.name, use.role, units.numpy().tobytes()), Member(use.name, use.role, units, shared))
        return list(found.values())


def groups_of(flow: Flow, named: Mapping[str, Channels | Heads], insist: Iterable[str]) -> tuple[list[Group], dict[str, str]]:
    """The groups of the named parameters, and the parameters left alone with the reason.

    Raises SpecError for those of `insist` that cannot be pruned so, and where two names of one group have different patterns.
    """
    insist, flowed = set(insist), _Flowed.of(flow)
    groups: dict[tuple[int, ...], Group] = {}
    skipped: dict[str, str] = {}
    for name, pattern in named.items():
        try:
            find = _channels if isinstance(pattern, Channels) else _heads
            group, key = find(flowed, name, pattern, named)  # type: ignore[arg-type]  # each gets its own kind
        except SpecError as error:
            if name in insist:
                raise
            skipped[name] = str(error).partition(": ")[2] or str(error)
            continue
        other = groups.get(key)
        if other is not None and other.pattern != pattern:
            raise SpecError(f"{other.name} and {name} are one group of channels but are to be {other.pattern} and {pattern}")
        groups[key] = group if other is None else other
    return list(groups.values()), skipped


def _channels(flowed: _Flowed, name: str, pattern: Channels, named: Mapping[str, object]) -> tuple[Group, tuple[int, ...]]:
    made = flowed.made(name)
    classes = torch.unique(flowed.classes[made])
    heads = torch.cat([x.reshape(-1) for a in flowed.flow.attentions for x in (a.q, a.k, a.v, a.out)] or [made[:0]])
    if bool(torch.isin(classes, flowed.classes[heads]).any()):
        raise SpecError(f"{name}: its channels are those of attention heads, which go together: name it as heads(sparsity, rows of a head)")
    _refuse_blocked(flowed, name, classes)
    unit_of = torch.full((len(flowed.classes),), -1)
    unit_of[classes] = torch.arange(len(classes))
    members = flowed.members(unit_of)
    writers = {m.name: torch.unique(flowed.products[flowed.made(m.name)]) for m in members if m.role == "writes"}
    _refuse_unnamed(flowed, name, writers, classes, named)
    sizes = unit_of[flowed.classes[made]].bincount(minlength=len(classes))
    if not bool((sizes == sizes[0]).all()):
        few, many = int(sizes.min()), int(sizes.max())
        raise SpecError(f"{name}: groups that do not divide: some of its channels stand for {few} rows, others for {many}")
    names = tuple(n for n in named if n in writers)
    return Group(names, pattern, len(classes), int(sizes[0]), tuple(members)), tuple(classes.tolist())


def _refuse_blocked(flowed: _Flowed, name: str, classes: Tensor) -> None:
    for one in classes.tolist():
        if one in flowed.blocked:
            raise SpecError(f"{name}: its channels stay, because {flowed.blocked[one]}")


def _refuse_unnamed(flowed: _Flowed, name: str, writers: Mapping[str, Tensor], classes: Tensor, named: Mapping[str, object]) -> None:
    """A sum is zero where all of its terms are, so all of them must be named; of a product, one."""
    covered = torch.cat([parts for writer, parts in writers.items() if writer in named])
    inside = {writer: parts[torch.isin(flowed.classes[parts], classes)] for writer, parts in writers.items()}
    missing = [writer for writer, parts in inside.items() if not bool(torch.isin(parts, covered).all())]
    if missing:
        listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise SpecError(f"{name}: {listed} write the same channels: name all of them, or none")


def _heads(flowed: _Flowed, name: str, pattern: Heads, named: Mapping[str, object]) -> tuple[Group, tuple[int, ...]]:
    """By query heads where the weight computes queries, else by key/value heads with all of their query heads."""
    classes = torch.unique(flowed.classes[flowed.made(name)])
    for one in flowed.flow.attentions:
        q, k, v, out = (flowed.classes[x] for x in (one.q, one.k, one.v, one.out))
        if any(bool(torch.isin(classes, x).any()) for x in (q, k, v)):
            break
    else:
        raise SpecError(f"{name}: it computes no attention heads that can be seen: use channels(...), or groups= to name its layers")
    _refuse_blocked(flowed, name, torch.cat((q, k, v, out)).unique())
    if pattern.dim not in (q.shape[1], v.shape[1]):
        raise SpecError(f"{name}: its heads have {q.shape[1]} rows, not {pattern.dim}: name it as heads(sparsity, {q.shape[1]})")
    owner = _owners(one, k)
    heads, by_query = len(q), bool(torch.isin(classes, q).any())
    unit = torch.arange(heads) if by_query else owner
    unit_of, shared_of = (torch.full((len(flowed.classes),), -1) for _ in range(2))
    for head in range(heads):
        unit_of[q[head]] = unit_of[out[head]] = unit[head]
        (shared_of if by_query else unit_of)[torch.cat((k[head], v[head]))] = owner[head]
    members = [*flowed.members(unit_of), *flowed.members(shared_of, shared=True)]
    names = tuple(n for n in named if any(m.name == n and m.role == "writes" for m in members))
    units = int(unit.max()) + 1
    group = Group(names, pattern, units, pattern.dim, tuple(members), owner if by_query else None)
    return group, tuple(torch.cat((q, k, v)).unique().tolist())


def _owners(one: Attention, k: Tensor) -> Tensor:
    """The key/value head of each query head, in order of appearance."""
    seen: dict[tuple[int, ...], int] = {}
    return torch.tensor([seen.setdefault(tuple(row), len(seen)) for row in k.tolist()])


def coupled_groups(couplings: Sequence[Coupled], named: Mapping[str, Channels | Heads], modules: Mapping[str, nn.Module]) -> list[Group]:
    """The groups that were given by hand and that hold a named weight. Raises SpecError where sizes do not divide."""
    found = []
    for coupling in couplings:
        i = 0
        while True:
            rows, cols, shared = (
                [n for n in modules if any(fnmatchcase(n, g.replace("{}", str(i))) for g in globs)]
                for globs in (coupling.rows, coupling.cols, coupling.shared)
            )
            if not rows:
                break
            names = tuple(f"{n}.weight" for n in (*rows, *shared) if f"{n}.weight" in named)
            if names:
                found.append(_by_hand(names, named[names[0]], rows, cols, shared, modules))
            i += 1
            if not any("{}" in glob for glob in coupling.rows):
                break
        if i == 0:
            raise SpecError(f"groups=: {', '.join(coupling.rows)} match no module")
    left = set(named) - {name for group in found for name in group.named}
    if left:
        raise SpecError(f"groups= couples no rows of {', '.join(sorted(left))}: add them, or leave them out of the spec")
    return found


def _by_hand(
    names: tuple[str, ...], pattern: Channels | Heads, rows: list[str], cols: list[str], shared: list[str], modules: Mapping[str, nn.Module]
) -> Group:
    size = pattern.dim if isinstance(pattern, Heads) else 1
    width = _side(modules[rows[0]], 0)
    units = width // size
    members: list[Member] = []
    owner = None
    for module, axis, role in [*((m, 0, "writes") for m in (*rows, *shared)), *((m, 1, "reads") for m in cols)]:
        side, is_shared = _side(modules[module], axis), module in shared
        if side % size or (side != width and not is_shared) or units % (side // size):
            raise SpecError(f"groups=: {module} has {side} channels, which do not divide as the {width} of {rows[0]} do in units of {size}")
        index = torch.arange(side) // size
        heads = side // size
        if is_shared:
            owner = torch.arange(units) // (units // heads)
        weight = modules[module].weight
        assert isinstance(weight, Tensor)
        shape = [side if d == axis else 1 for d in range(weight.ndim)]
        members.append(Member(f"{module}.weight", role, index.view(shape), is_shared))  # type: ignore[arg-type]
        if axis == 0 and isinstance(getattr(modules[module], "bias", None), Tensor):
            members.append(Member(f"{module}.bias", "scales", index, is_shared))
    return Group(names, pattern, units, size, tuple(members), owner)


def _side(module: nn.Module, axis: int) -> int:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise SpecError(f"groups=: {type(module).__name__} has no weight with rows and columns")
    return weight.shape[axis]


