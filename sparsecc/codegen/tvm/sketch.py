"""Which of ReLU's zeros a coarse copy of the gate already shows.

A sketch is the gate in 8 bits, scale_i q_i, with rest_i >= |w_i - scale_i q_i|: where scale_i (q_i x) + rest_i |x| + b < 0 (Cauchy and
Schwarz), ReLU gives 0 whatever the row's own bits are, so it is not read. That is exact, and a quarter of the bytes; x is two numbers of
8 bits there, so that one instruction multiplies 64 of them.
"""

from __future__ import annotations

from sparsecc.codegen.tvm.host import Isa
from sparsecc.codegen.tvm.loops import AHEAD
from sparsecc.codegen.tvm.streams import total
from sparsecc.codegen.tvm.writer import Writer, splat, vec


def write_norms(w: Writer, tokens: int, isa: Isa) -> None:
    """x_m as coarse_m x1 + coarse_m / 254 x2 with x1 and x2 in 8 bits, side by side in `bytes`; norm_m bounds |x_m| and error_m what is
    left of it; sum1_m and sum2_m are the sums of x1 and x2, which correct for weights that are stored 128 too large."""
    lanes = isa.lanes
    w.opaque("width", "(D + 63) // 64 * 64")
    for m in range(tokens):
        x = vec("work", f"{m} * reach + k * {lanes}", lanes)
        names = ("most", "square", "left")
        sums = {name: w.registers(f"{name}{m}_", 1, 1, lanes)(0, 0) for name in names}
        for name in names:
            w(f"{sums[name]} = {splat('T.float32(0)', lanes)}")
        with w.block(f"for k in range(width // {lanes}):"):
            value = w.let("x", x)
            w(f"{sums['most']} = T.max({sums['most']}, T.max({value}, {splat('T.float32(0)', lanes)} - {value}))")
        for name, value in (("coarse", "T.float32(1e-30)"), ("norm", "T.float32(0)"), ("error", "T.float32(0)")):
            w(f'{name}{m} = T.alloc_buffer((1,), "float32", scope="global")')
            w(f"{name}{m}[0] = {value}")
        with w.block(f"for lane in range({lanes}):"):
            w(f"coarse{m}[0] = T.max(coarse{m}[0], most{m}_0[lane] / T.float32(127))")
        counts = [w.registers_of("int32", f"count{part}_{m}_", lanes) for part in (1, 2)]
        for count in counts:
            w(f"{count} = {splat('T.int32(0)', lanes)}")
        with w.block(f"for k in range(width // {lanes}):"):
            # in units of coarse, where squares neither vanish nor overflow
            rest = w.let("rest", f"{x} / {splat(f'coarse{m}[0]', lanes)}")
            w(f"{sums['square']} = {sums['square']} + {rest} * {rest}")
            for part, step in enumerate((splat("T.float32(1)", lanes), splat("T.float32(0.003937007874015748)", lanes))):
                scaled = f'T.call_llvm_pure_intrin("float32x{lanes}", "llvm.nearbyint", {rest} / {step})'
                whole = w.let("whole", f'T.Cast("int32x{lanes}", {scaled})')
                w(f'{vec("bytes", f"({2 * m + part}) * width + k * {lanes}", lanes)} = T.Cast("int8x{lanes}", {whole})')
                w(f"{counts[part]} = {counts[part]} + {whole}")
                rest = w.let("rest", f'{rest} - T.Cast("float32x{lanes}", {whole}) * {step}')
            w(f"{sums['left']} = {sums['left']} + {rest} * {rest}")
        w(f"norm{m}[0] = T.sqrt({total(w, sums['square'], lanes)}) * T.float32(1.0001) * coarse{m}[0]")
        w(f"error{m}[0] = T.sqrt({total(w, sums['left'], lanes)}) * T.float32(1.0001) * coarse{m}[0] + norm{m}[0] * T.float32(1e-6)")
        for part, count in enumerate(counts, 1):
            w(f'sum{part}_{m} = T.alloc_buffer((1,), "int32", scope="global")')
            w(f"sum{part}_{m}[0] = {total(w, count, lanes)}")


def write_candidates(w: Writer, tokens: int, streams: int, bias: bool, isa: Isa) -> None:
    """list[first...]: the task's rows that the sketch does not rule out for every token; their number in `candidates`. a = 0 for all."""
    streams = max(1, streams // (2 if tokens > 2 else 1))
    w('some = T.alloc_buffer((1,), "int64", scope="global")')
    w("some[0] = T.int64(0)")
    w.opaque("apart", f"count // {streams}")
    for together, times, start in ((streams, "apart", "i"), (1, f"count - apart * {streams}", f"apart * {streams} + i")):
        with w.block(f"for i in range({times}):"):
            places = [w.let("row", f"first + {start}{f' + {s} * apart' if s else ''}") for s in range(together)]
            rows = [w.let("at", f"{place} * width") for place in places]
            for place, dots in zip(places, _rough_dots(w, rows, tokens), strict=True):
                out = [_ruled_out(bias, place, m, *dots[m]) for m in range(tokens)]
                for m in range(tokens):
                    w(f"work[a0 + {m} * wide + {place}] = T.float32(0)")
                w(f'list[first + some[0]] = T.Cast("int32", {place})')
                ruled = out[0]
                for one in out[1:]:
                    ruled = f"T.And({ruled}, {one})"
                w(f"some[0] = some[0] + T.if_then_else({ruled}, T.int64(0), T.int64(1))")
    w.opaque("candidates", "some[0]")


def _rough_dots(w: Writer, rows: list[str], tokens: int) -> list[list[tuple[str, str]]]:
    """The integer products of rows of the sketch with x1 and x2 of every token, 64 bytes in a step."""
    w.made += 1
    accs = [w.registers_of("int32", f"rough{w.made}_{i}_", 16) for i in range(len(rows) * tokens * 2)]
    for acc in accs:
        w(f"{acc} = {splat('T.int32(0)', 16)}")
    with w.block("for k in range(width // 64):"):
        xs = [w.let("x8", vec("bytes", f"{part} * width + k * 64", 64)) for part in range(2 * tokens)]
        for s, row in enumerate(rows):
            where = f"T.address_of(sketch[{row} + k * 64 + {AHEAD}])"
            w(f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", {where}, T.int32(0), T.int32(3), T.int32(1)))')
            weight = w.let("w8", vec("sketch", f"{row} + k * 64", 64))
            for part, x in enumerate(xs):
                acc = accs[s * 2 * tokens + part]
                w(f'{acc} = T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", {acc}, {weight}, {x})')
    pick = lambda s, m, part: total(w, accs[(s * tokens + m) * 2 + part], 16)  # noqa: E731
    return [[(pick(s, m, 0), pick(s, m, 1)) for m in range(tokens)] for s in range(len(rows))]


def _ruled_out(bias: bool, place: str, m: int, coarse: str, fine: str) -> str:
    """Whether the row's product with a token is surely negative; false where anything is NaN."""
    parts = [f'T.Cast("float32", ({dots}) - sum{part}_{m}[0] * 128)' for part, dots in ((1, coarse), (2, fine))]
    dot = f"coarse{m}[0] * ({parts[0]} + {parts[1]} / T.float32(254)) * bound[{place} * 3]"
    slack = f"bound[{place} * 3 + 1] * norm{m}[0] + bound[{place} * 3 + 2] * error{m}[0]"
    return f"({dot} + {slack} + T.float32(1e-30){f' + bias[{place}]' if bias else ''} < T.float32(0))"
