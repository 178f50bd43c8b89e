"""The inner loops of `streams`: each adds the products of some rows of blocks to their sums, a step of every row in turn."""

from __future__ import annotations

from sparsecc.codegen.tvm.entries import pointers, value, value_bytes, widen
from sparsecc.codegen.tvm.terms import Sums, Term, expands, pairs
from sparsecc.codegen.tvm.writer import Writer, splat
from sparsecc.formats.level import NM

AHEAD = 1024
"""Bytes between a load of values and the prefetch beside it."""


def write_bitmap(term: Term, parents: list[str], sums: Sums) -> None:
    w, fmt, t = term.w, term.fmt, term.t
    span, paired = expands(fmt, term.isa), pairs(fmt, term.isa)
    w(f"words{t}: T.let = (C{t} + 15) // 16")
    ats = []
    for parent in parents:
        w.made += 1
        ats.append(f"at_{w.made}")
        w(f'{ats[-1]} = T.alloc_buffer((1,), "int64", scope="global")')
        w(f'{ats[-1]}[0] = T.Cast("int64", ptr{t}[{parent}])')

    def step(word: str, bits: int) -> None:
        offsets = range(0, span if paired else bits, 16)
        xs = [[w.let("x", term.x(m, f"{word} * 16 + {i}", 16)) for i in offsets] for m in range(term.tokens)]
        for s, (parent, at) in enumerate(zip(parents, ats, strict=True)):
            offset = f"{parent} * words{t} + {word}"
            two = f'T.reinterpret("uint32", bits{t}[T.ramp({offset}, 1, 2)])'  # rows of words are only 2-byte aligned
            mask = w.let("mask", f"bits{t}[{offset}]" if span == 16 else two if bits == 32 else f'T.Cast("uint32", bits{t}[{offset}])')
            write_prefetch(w, f"val{t}", f"{at}[0]", value_bytes(fmt))
            for i, weight in enumerate(_expanded(term, f"{at}[0]", mask)[: len(offsets)]):
                for m in range(term.tokens):
                    sums.add(s, m, 0, weight, xs[m][i])
            w(f'{at}[0] = {at}[0] + T.Cast("int64", T.popcount({mask}))')

    per = span // 16
    with w.block(f"for word in range(words{t} // {per}):"):
        step(f"word * {per}", span)
    if per > 1:
        with w.block(f"if words{t} % 2 == 1:"):
            step(f"(words{t} - 1)", 16)


def _expanded(term: Term, at: str, mask: str) -> list[str]:
    """The next values as float32 vectors, zeros where the mask has them. Nothing behind them is read."""
    w, t, span = term.w, term.t, expands(term.fmt, term.isa)
    dtype = "float32x16" if span == 16 else "uint16x32"
    zero = "T.broadcast(T.float32(0), 16)" if span == 16 else "T.broadcast(T.uint16(0), 32)"
    bits = f'T.reinterpret("uint1x{span}", {mask})'
    found = w.let("found", f'T.call_llvm_pure_intrin("{dtype}", "llvm.masked.expandload", T.address_of(val{t}[{at}]), {bits}, {zero})')
    if span == 16:
        return [found]
    if str(term.fmt.codec) == "f16":
        halves = [f"T.Shuffle([{found}], {list(range(i, i + 16))})" for i in (0, 16)]
        return [w.let("weight", f'T.Cast("float32x16", T.reinterpret("float16x16", {half}))') for half in halves]
    two = w.let("two", f'T.reinterpret("uint32x16", {found})')
    even = f"T.shift_left({two}, T.broadcast(T.uint32(16), 16))"
    odd = f"T.bitwise_and({two}, T.broadcast(T.uint32(4294901760), 16))"
    return [w.let("weight", f'T.reinterpret("float32x16", {part})') for part in (even, odd)]


def write_prefetch(w: Writer, buffer: str, at: str, itemsize: int) -> None:
    where = f"T.address_of({buffer}[{at} + {AHEAD // itemsize}])"
    w(f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", {where}, T.int32(0), T.int32(3), T.int32(1)))')


def write_gathered(term: Term, parents: list[str], sums: Sums) -> None:
    """16 nonzeros of a row at once; what is left of a row is one masked step."""
    w, fmt, t = term.w, term.fmt, term.t
    los, counts = _spans(term, parents)

    def step(s: int, at: str, mask: str) -> None:
        first = w.let("entry", at)
        idx = w.let("idx", f'T.Cast("int32x16", {_masked(term, "idx", first, mask)})')
        weight = w.let("weight", widen(_masked(term, "val", first, mask), str(fmt.codec), 16))
        for m in range(term.tokens):
            x = f"T.address_of({term.x(m, '0')})"
            gather = '"llvm.x86.avx512.mask.gather.dps.512"'
            found = f'T.call_llvm_pure_intrin("float32x16", {gather}, {ZERO}, {x}, {idx}, {mask or ALL}, T.int32(4))'
            sums.add(s, m, 0, weight, found)

    common = _least(w, counts, 16)
    with w.block(f"for j in range({common}):"):
        for s, lo in enumerate(los):
            for name, size in (("val", value_bytes(fmt)), ("idx", 2)):
                write_prefetch(w, f"{name}{t}", f"{lo} + j * 16", size)
            step(s, f"{lo} + j * 16", "")
    for s, (lo, count) in enumerate(zip(los, counts, strict=True)):
        with w.block(f"for j in range({count} // 16 - {common}):"):
            step(s, f"{lo} + ({common} + j) * 16", "")
        with w.block(f"if {count} % 16 != 0:"):
            bits = f'T.Cast("uint16", T.shift_left(T.int32(1), T.Cast("int32", {count} % 16)) - 1)'
            step(s, f"{lo} + {count} // 16 * 16", w.let("some", f'T.reinterpret("uint1x16", {bits})'))


ZERO = "T.broadcast(T.float32(0), 16)"
ALL = 'T.reinterpret("uint1x16", T.uint16(65535))'


def _masked(term: Term, name: str, at: str, mask: str) -> str:
    """16 elements of a component; those outside the mask are zero and not read."""
    if not mask:
        return f"{name}{term.t}[T.ramp({at}, 1, 16)]"
    dtype = pointers(term.fmt, term.wide, term.t)[f"{name}{term.t}"]
    zero = f"T.broadcast(T.{dtype}(0), 16)"
    return f'T.call_llvm_pure_intrin("{dtype}x16", "llvm.masked.load", T.address_of({name}{term.t}[{at}]), {mask}, {zero})'


def write_compressed(term: Term, parents: list[str], sums: Sums) -> None:
    """Blocks, or single nonzeros, one of each row in a step."""
    w, t = term.w, term.t
    los, counts = _spans(term, parents)
    common = _least(w, counts, 1)
    with w.block(f"for j in range({common}):"):
        for s, lo in enumerate(los):
            j = w.let("entry", f"{lo} + j")
            write_prefetch(w, f"val{t}", f"{j} * {term.fmt.block[0] * term.fmt.block[1]}", value_bytes(term.fmt))
            write_block(term, sums, s, j, f'T.Cast("int64", idx{t}[{j}])')
    if len(los) > 1:
        for s, (lo, count) in enumerate(zip(los, counts, strict=True)):
            with w.block(f"for j in range({count} - {common}):"):
                j = w.let("entry", f"{lo} + {common} + j")
                write_block(term, sums, s, j, f'T.Cast("int64", idx{t}[{j}])')


def write_permuted(term: Term, parents: list[str], sums: Sums) -> None:
    """16 slots of N:M at once: their offsets pick from the two vectors of x that their groups span."""
    w, fmt, t = term.w, term.fmt, term.t
    n, m = fmt.level.n, fmt.level.m  # type: ignore[attr-defined]
    span = 16 // n * m
    w(f"slots{t}: T.let = (C{t} + {m - 1}) // {m} * {n}")
    base = f"T.Shuffle([{', '.join(f'T.int32({i // n * m})' for i in range(16))}], {list(range(16))})"
    with w.block(f"for j in range(slots{t} // 16):"):
        xs = [[w.let("x", term.x(k, f"j * {span} + {i}", 16)) for i in (0, 16)] for k in range(term.tokens)]
        for s, parent in enumerate(parents):
            at = w.let("slot", f"{parent} * slots{t} + j * 16")
            write_prefetch(w, f"val{t}", at, value_bytes(fmt))
            offsets = w.let("offsets", f'T.Cast("int32x16", idx{t}[T.ramp({at}, 1, 16)]) + {base}')
            weight = w.let("weight", value(fmt, t, at, 16))
            for k in range(term.tokens):
                low, high = xs[k]
                picked = f'T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.vpermi2var.ps.512", {low}, {offsets}, {high})'
                sums.add(s, k, 0, weight, picked)
    with w.block(f"for rest in range(slots{t} % 16):"):
        w(f"slot{t}: T.let = slots{t} // 16 * 16 + rest")
        for s, parent in enumerate(parents):
            at = w.let("slot", f"{parent} * slots{t} + slot{t}")
            col = w.let("col", f'slot{t} // {n} * {m} + T.Cast("int64", idx{t}[{at}])')
            for k in range(term.tokens):
                lane = f"{sums.name}{s * term.tokens + k}[0]"
                w(f"{lane} = {lane} + {value(fmt, t, at)} * {term.x(k, col)}")


def write_counted(term: Term, parents: list[str], sums: Sums) -> None:
    """As many blocks in every row: N:M, or all of them."""
    w, fmt, t = term.w, term.fmt, term.t
    size = fmt.block[0] * fmt.block[1]
    if isinstance(fmt.level, NM):
        n, m = fmt.level.n, fmt.level.m
        w(f"groups{t}: T.let = (C{t} + {m - 1}) // {m}")
        with w.block(f"for g in range(groups{t}):"):
            for s, parent in enumerate(parents):
                for slot in range(n):
                    j = w.let("entry", f"({parent} * groups{t} + g) * {n} + {slot}")
                    write_block(term, sums, s, j, f'g * {m} + T.Cast("int64", idx{t}[{j}])')
        return
    with w.block(f"for c in range(C{t}):"):
        for s, parent in enumerate(parents):
            j = w.let("entry", f"{parent} * C{t} + c")
            write_prefetch(w, f"val{t}", f"{j} * {size}", value_bytes(fmt))
            write_block(term, sums, s, j, "c")


def write_block(term: Term, sums: Sums, s: int, j: str, col: str) -> None:
    """One stored block times its columns of x."""
    w, (br, bc) = term.w, term.fmt.block
    along_cols, width = term.along_cols, sums.width
    xb = w.let("xb", f"({col}) * {bc}" if bc > 1 else col)
    count = bc // along_cols
    with w.block_if(count > 1, f"for cc in range({count}):"):
        cc = "cc" if count > 1 else "0"
        weights = [
            w.let("weight", value(term.fmt, term.t, f"{j} * {br * bc} + {cc} * {br * along_cols} + {q * width}", width))
            for q in range(sums.parts)
        ]
        for m in range(term.tokens):
            at = f"{xb} + {cc} * {along_cols}"
            x = w.let("x", term.x(m, at, along_cols) if along_cols > 1 else splat(term.x(m, at), width))
            for q, weight in enumerate(weights):
                sums.add(s, m, q, weight, x)


def _spans(term: Term, parents: list[str]) -> tuple[list[str], list[str]]:
    """Where the entries of each parent begin, and how many they are."""
    w, t = term.w, term.t
    ptr = lambda p: f'T.Cast("int64", ptr{t}[{p}])'  # noqa: E731
    los = [w.let("lo", ptr(parent)) for parent in parents]
    return los, [w.let("entries", f"{ptr(f'{parent} + 1')} - {lo}") for parent, lo in zip(parents, los, strict=True)]


def _least(w: Writer, counts: list[str], per: int) -> str:
    """The whole steps of `per` entries that every row has; a name."""
    least = counts[0]
    for count in counts[1:]:
        least = f"T.min({least}, {count})"
    w.made += 1
    w.opaque(f"common_{w.made}", f"{least} // {per}" if per > 1 else least)
    return f"common_{w.made}"
