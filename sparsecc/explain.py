"""The table of decisions: per layer its zeros, format, bytes, kernel, predicted and measured time, and why."""
from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparsecc.errors import SpecError
from sparsecc.ir.program import DimGroup, Region

WIDTH = 140
_HEADINGS = ("layer", "N x K", "pattern", "zeros", "format", "bytes / dense", "kernel",
             "predicted us", "measured us", "dense us", "speed-up")
_FOLDING = (0, 2, 4, 6)
"""Columns of text, which fold where the table gets too wide; those of numbers never do."""
_NARROWEST = 12
_INDENT = 2
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_REGION_FIELDS = tuple(f.name for f in fields(Region))
_DERIVED = ("alternatives", "sparse", "speed_up")


@dataclass(frozen=True)
class Explanation:
    """What was decided for each linear, in program order, and `header`: facts on the whole compile, with general "notes" if any.
    `dims`: the groups of axes that are cut together, where slices are dead.

    Of `Region.more` the table reads shape (N, K), m (tokens it was tuned for), zeros (fraction), dense_bytes, predicted_us,
    measured_us, dense_us (microseconds per call), break_even (fraction of zeros); `to_dict` keeps whatever is there.
    """

    regions: Sequence[Region]
    header: Mapping[str, Any] = field(default_factory=dict)
    dims: Sequence[DimGroup] = ()

    def __str__(self) -> str:
        file = io.StringIO()
        Console(file=file, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __rich__(self) -> Group:
        shared = _shared_m(self.regions)
        facts = {**{k: v for k, v in self.header.items() if k != "notes"}, **({} if shared is None else {"tokens": shared})}
        parts: list[RenderableType] = [Text("sparsecc  " + "  ".join(f"{k}: {v}" for k, v in facts.items()), "bold")]
        if self.regions:
            parts += _table([_Row(name, members) for name, members in collapse(self.regions)], shared is None)
        if self.dims:
            parts += [Text(line) for line in ("", "slices", *merge_texts([_dims_line(group) for group in self.dims]))]
        parts += [Text(line) for line in ("", *self._footer())]
        return Group(*parts)

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def totals(self) -> dict[str, Any]:
        """Counts, bytes of the weights as compiled and dense, and, over the timed regions, microseconds as compiled and dense."""
        timed = [(took, dense) for r in self.regions if (took := _took(r)) is not None and (dense := r.more.get("dense_us")) is not None]
        dense = [(r, r.more.get("whole_bytes", r.more.get("dense_bytes"))) for r in self.regions]
        sized = [(_bytes_of(r), whole) for r, whole in dense if whole is not None]
        return {
            "sparse": sum(map(is_sparse, self.regions)),
            "dense": sum(_is_linear(r) and not is_sparse(r) for r in self.regions),
            "bytes": sum(packed for packed, _ in sized),
            "dense_bytes": sum(dense for _, dense in sized),
            "timed": len(timed),
            "us": sum(took for took, _ in timed),
            "dense_us": sum(dense for _, dense in timed),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: header, totals, and per region its fields, everything in `more`, and `alternatives` (name -> us)."""
        found = {"header": self.header, "totals": self.totals(), "regions": [_region_dict(r) for r in self.regions]}
        return _plain(found | ({"dims": [vars(group) for group in self.dims]} if self.dims else {}))

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, which `python -m sparsecc explain` and `load` read."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @staticmethod
    def from_dict(found: Any) -> Explanation:
        """Inverse of `to_dict`. Raises SpecError for anything else."""
        if not (isinstance(found, Mapping) and isinstance(found.get("header"), Mapping) and isinstance(found.get("regions"), list)):
            raise SpecError("not a saved explanation: expected what Explanation.save writes, an object with header and regions")
        try:
            dims = [DimGroup(**{**g, "readers": tuple(g["readers"]), "why": tuple(g["why"])}) for g in found.get("dims", ())]
            return Explanation([_region(r) for r in found["regions"]], found["header"], dims)
        except (KeyError, TypeError, AttributeError) as error:
            raise SpecError(f"not a saved explanation: a region is malformed ({error})") from error

    @staticmethod
    def load(path: str | Path) -> Explanation:
        """Read what `save` wrote. Raises SpecError for other content, OSError for a file that can't be read."""
        try:
            return Explanation.from_dict(json.loads(Path(path).read_text()))
        except json.JSONDecodeError as error:
            raise SpecError(f"{path} is not JSON: {error}") from error

    def _footer(self) -> list[str]:
        sums = self.totals()
        line = f"{sums['sparse'] + sums['dense']} linear regions: {sums['sparse']} sparse, {sums['dense']} dense"
        if sums["dense_bytes"]:
            line += f"; weights {_size(sums['bytes'])} instead of {_size(sums['dense_bytes'])}"
        if sums["timed"] and sums["us"]:
            gain = sums["dense_us"] / sums["us"]
            line += f"; {_us(sums['us'])} us in the {sums['timed']} timed ones instead of {_us(sums['dense_us'])} us dense ({gain:.2f}x)"
        notes = self.header.get("notes") or []
        return [line, *(f"note: {note}" for note in ([notes] if isinstance(notes, str) else notes))]


def _dims_line(group: DimGroup) -> str:
    """One line on a dimension group."""
    text = f"  {group.name}: {group.dropped} of {group.size} dropped"
    if group.readers:
        text += f", read by {', '.join(group.readers[:2])}" + (f" and {len(group.readers) - 2} more" if len(group.readers) > 2 else "")
    if group.why:
        stay = f"{group.dead - group.dropped} dead ones stay" if group.dead > group.dropped else "some dead ones stay"
        text += f"; {stay}: {'; '.join(group.why)}"
    return text


def _is_linear(region: Region) -> bool:
    """Whether it has a weight, and is not a block some of whose tokens are skipped."""
    return bool(region.weights) or not {"expected_kept", "observed_kept", "seen"} & region.more.keys()


def is_sparse(region: Region) -> bool:
    """Whether the compiled model skips zeros there."""
    return region.format not in ("", "dense") and region.choice != "dense"


def collapse(regions: Iterable[Region]) -> list[tuple[str, list[Region]]]:
    """Regions that differ only in a number of their name, and in figures, as one: "encoder.layer.0-5.attention.self.query"."""
    groups: dict[Any, dict[tuple[Any, ...], list[Region]]] = {}
    for region in regions:
        parts = tuple((int(p),) if p.isdecimal() else p for p in _short(region.name).split("."))
        alike = (region.pattern, region.format, region.choice, _NUMBER.sub("#", _why(region)), str(region.more.get("m")))
        shape = tuple(region.more.get("shape") or ())
        key = (tuple("#" if isinstance(p, tuple) else p for p in parts), alike, shape)
        groups.setdefault(key, {}).setdefault(parts, []).append(region)
    return [(_spell(parts, len(members)), members) for items in groups.values() for parts, members in _join_slots(items).items()]


def merge_texts(texts: Sequence[str]) -> list[str]:
    """Texts that differ only in their numbers as one with ranges: "loses 1.2x", "loses 1.4x" -> "loses 1.2-1.4x"."""
    groups: dict[str, list[list[str]]] = {}
    for text in texts:
        groups.setdefault(_NUMBER.sub("#", text), []).append([text, *_NUMBER.findall(text)])
    merged: list[str] = []
    for group in groups.values():
        spans = [[min(column, key=float), max(column, key=float)] for column in zip(*(g[1:] for g in group), strict=True)]
        replaced = iter(low if low == high else f"{low}-{high}" for low, high in spans)
        merged.append(_NUMBER.sub(lambda _, found=replaced: next(found), group[0][0]))
    return merged


@dataclass(frozen=True)
class _Row:
    """One line of the table: the regions that it stands for."""

    name: str
    regions: Sequence[Region]

    def cells(self, with_m: bool) -> tuple[str, ...]:
        """The texts, in the order of the headings."""
        first = self.regions[0]
        shape = "x".join(map(str, first.more.get("shape") or ()))
        if with_m and first.more.get("m") is not None:
            shape += f" m={first.more['m']}"
        packed, dense = self._span(lambda r: _bytes_of(r) or None, _size), self._more("dense_bytes", _size)
        return (
            self.name, shape, first.pattern, self._more("zeros", lambda z: f"{100 * z:.1f} %"),
            first.format if is_sparse(first) else "dense", f"{packed} / {dense}" if packed and dense else packed or dense,
            first.choice, self._more("predicted_us", _us), self._more("measured_us", _us), self._more("dense_us", _us),
            self._span(_speed_up, lambda s: f"{s:.2f}x"),
        )

    def details(self) -> list[str]:
        """Why, then the notes."""
        said = [text for of in (_why, _kept) for r in self.regions if (text := of(r))]
        return merge_texts(said) + merge_texts([note for r in self.regions for note in r.notes])

    def _more(self, key: str, show: Callable[[Any], str]) -> str:
        return self._span(lambda r: r.more.get(key), show)

    def _span(self, of: Callable[[Region], Any], show: Callable[[Any], str]) -> str:
        values = [value for r in self.regions if (value := of(r)) is not None]
        if not values:
            return ""
        low, high = show(min(values)), show(max(values))
        return low if low == high else f"{low.removesuffix(' %').removesuffix('x')}-{high}"


def _table(rows: Sequence[_Row], with_m: bool) -> list[RenderableType]:
    """The heading, then each row with its details below, in columns of the same widths; columns that are all empty are left out.

    Where that is too wide, the layer's name gets a line of its own; if it still is, columns of text fold.
    """
    cells = [row.cells(with_m) for row in rows]
    used = [i for i in range(len(_HEADINGS)) if any(line[i] for line in cells)]
    widths = {i: max(len(line[i]) for line in (_HEADINGS, *cells)) for i in used}
    if names_apart := sum(widths.values()) + len(used) > WIDTH:
        used.remove(0)
        widths[0] = 0
    while sum(widths.values()) + len(used) + _INDENT > WIDTH and max(widths[i] for i in _FOLDING if i in used) > _NARROWEST:
        widths[max((i for i in _FOLDING if i in used), key=lambda i: widths[i])] -= 1
    indent = _INDENT if names_apart else 0
    parts: list[RenderableType] = [_line(_HEADINGS, used, widths, indent, "bold")]
    for row, line in zip(rows, cells, strict=True):
        parts += [Text(row.name)] if names_apart else []
        parts.append(_line(line, used, widths, indent))
        parts += [Padding(Text(detail, "dim"), (0, 0, 0, 2 * _INDENT)) for detail in row.details()]
    return parts


def _line(texts: Sequence[str], used: Sequence[int], widths: Mapping[int, int], indent: int, style: str = "") -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    for i in used:
        table.add_column(width=widths[i], overflow="fold", justify="left" if i in _FOLDING else "right")
    table.add_row(*(Text(texts[i], style) for i in used))
    return Padding(table, (0, 0, 0, indent))


def _short(name: str) -> str:
    """`a.b.query + a.b.key` -> `a.b.(query + key)`."""
    parts = [part.split(".") for part in name.split(" + ")]
    same = 0
    while len(parts) > 1 and all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    rest = " + ".join(".".join(p[same:]) for p in parts)
    return ".".join([*parts[0][:same], f"({rest})"]) if same else name


def _join_slots(items: dict[tuple[Any, ...], list[Region]]) -> dict[tuple[Any, ...], list[Region]]:
    """Unite names that agree in all but one number; a second number only where the first then covers the same set."""
    slots = [i for i, part in enumerate(next(iter(items))) if isinstance(part, tuple)]
    for slot in reversed(slots):
        found: dict[tuple[Any, ...], tuple[set[int], list[Region]]] = {}
        for parts, members in items.items():
            numbers, together = found.setdefault((*parts[:slot], *parts[slot + 1 :]), (set(), []))
            numbers.update(parts[slot])
            together.extend(members)
        items = {(*key[:slot], tuple(sorted(numbers)), *key[slot:]): members for key, (numbers, members) in found.items()}
    return items


def _spell(parts: tuple[Any, ...], count: int) -> str:
    """The name with ranges, and how many regions it stands for where the numbers don't say it."""
    name = ".".join(_ranges(p) if isinstance(p, tuple) else p for p in parts)
    said = math.prod(len(p) for p in parts if isinstance(p, tuple))
    return name if said == count else f"{name} ({count} uses)"


def _ranges(numbers: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _why(region: Region) -> str:
    """The reason; for a dense layer also from which fraction of zeros on it would pay."""
    even = region.more.get("break_even")
    if is_sparse(region) or even is None or "break-even" in region.reason:
        return region.reason
    hint = f"break-even at {100 * even:.1f} % zeros" if 0 <= even < 1 else "no fraction of zeros would pay"
    return f"{region.reason}; {hint}" if region.reason else hint


def _kept(region: Region) -> str:
    """What is kept of a region that skips at run time: as the spec says, and as the calls so far had it."""
    expected, seen = region.more.get("expected_kept"), getattr(region.more.get("seen"), "kept", region.more.get("observed_kept"))
    parts = [] if expected is None else [f"{expected:.1%} kept by the spec"]
    where = region.more.get("seen_in", "calls of few tokens" if region.weights else "")
    return "; ".join(parts if seen is None else [*parts, f"{seen:.1%} kept {f'in {where} ' if where else ''}so far"])


def _shared_m(regions: Sequence[Region]) -> Any:
    """The number of tokens that every region was tuned for; None if they differ or don't say."""
    found = [r.more.get("m") for r in regions]
    return found[0] if found and all(str(m) == str(found[0]) for m in found) else None


def _took(region: Region) -> float | None:
    """Microseconds of what runs: the sparse kernel's where the layer is sparse, else the dense code's."""
    return region.more.get("measured_us" if is_sparse(region) else "dense_us")


def _speed_up(region: Region) -> float | None:
    dense, measured = region.more.get("dense_us"), region.more.get("measured_us")
    return dense / measured if dense and measured else None


def _bytes_of(region: Region) -> int:
    """What the layer's weights take as compiled."""
    return region.bytes if region.bytes or is_sparse(region) else region.more.get("dense_bytes") or 0


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _us(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def _region_dict(region: Region) -> dict[str, Any]:
    own = {name: getattr(region, name) for name in _REGION_FIELDS if name not in ("more", "times")}
    more = dict(region.more)
    if (seen := more.pop("seen", None)) is not None:
        more["observed_kept"] = seen.kept
    return {**more, **own, "alternatives": region.times, "sparse": is_sparse(region), "speed_up": _speed_up(region)}


def _region(found: Mapping[str, Any]) -> Region:
    own = {name: found[name] for name in _REGION_FIELDS if name in found and name not in ("more", "times")}
    more = {name: value for name, value in found.items() if name not in (*_REGION_FIELDS, *_DERIVED)}
    own["weights"] = tuple(found.get("weights", ()))
    return Region(**own, times=dict(found.get("alternatives", {})), more=more)


def _plain(value: Any) -> Any:
    """JSON values: other objects by their text, a number that JSON lacks as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
