"""Family neurons: a feed-forward block of one token, or a few, of which only the active neurons are read (decode).

    1  parallel over rows     a = act(gate x + b)                       every row of the gate, or of fc1, is read; or its sketch, and
                              only those rows that it does not rule out
    2  one thread             what a policy needs of the whole row (a k-th largest value, mean and deviation); then the list of
                              neurons that any of the tokens keeps
    3  parallel over list     h = a * (up_i x);  y_task += h * down_i   only the rows of active neurons are read
    4  one thread             y = bias + the sum of y_task

A linear on its active inputs has no gate: a is x, step 1 only reads it.
A neuron's row of up and column of down lie side by side ("LLM in a flash", Alizadeh et al. 2023): `bundle` [F, rows, D]. Several
neurons are walked at once, because one core that reads one place has too few cache lines under way (see `streams`).
Where more than `limit` neurons are active, step 3 is left out: `list[F]` has their number, and dense code takes over from `a`.
The sketch is that of `sketch`. Sums are float32; NaN is active under every policy, so that it shows in y as it does in the dense model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsecc.codegen.tvm.activation import write_activation
from sparsecc.codegen.tvm.entries import STORED, load, store
from sparsecc.codegen.tvm.host import Isa
from sparsecc.codegen.tvm.loops import AHEAD
from sparsecc.codegen.tvm.sketch import write_candidates, write_norms
from sparsecc.codegen.tvm.streams import total
from sparsecc.codegen.tvm.writer import Writer, splat, vec

INTS = ("M", "F", "D", "reach", "wide", "gate_step", "tasks", "limit", "keep")
"""Scalar arguments: tokens; neurons; features; floats of a token in x's and in a's part of `work`; elements from a gate's row to the next;
parts of the work; most neurons that are worth skipping others for; neurons that a top-k keeps."""

TILES = (1, 2, 4, 8)
"""Tokens that a kernel may take together: they share a list of neurons."""

SIZE = 'T.bitwise_and(T.reinterpret("int32", {}), T.int32(2147483647))'
"""|a| as an integer: in the order of the floats, NaN above all, where comparisons of floats would drop it."""


@dataclass(frozen=True)
class NeuronSpec:
    """What a kernel computes, for any size.

    policy: "nonzero" keeps a != 0, "threshold" |a| > level_i, "topk" the `keep` largest |a| (of equal ones the first), "stat" what exceeds
      mean + level_0 deviations of the row before the activation, less that threshold, "all" everything.
    up: whether the neurons are gated, h = act(gate x) * (up x); else h = act(fc1 x + b).
    bias: of fc1; dtype: of weights, x and y ("f32", "bf16", "f16"). sketch: whether ReLU's zeros are first looked for in one.
    gate: without one h = x, of F features, for a linear on its active inputs.
    """

    policy: str = "nonzero"
    activation: str = "relu"
    up: bool = True
    bias: bool = False
    dtype: str = "f32"
    sketch: bool = False
    gate: bool = True

    @property
    def rows(self) -> int:
        """Rows of D elements that a neuron takes in the bundle."""
        return 2 if self.up else 1


def neurons_source(spec: NeuronSpec, tokens: int, streams: int, isa: Isa) -> str:
    """The kernel's text for up to `tokens` tokens, `streams` rows at once."""
    w = Writer()
    dtype = STORED[spec.dtype]
    params = {"x": dtype, "y": dtype, "work": "float32", "list": "int32", "bytes": "int8", "gate": dtype, "bundle": dtype}
    params |= {"level": "float32", "bias": "float32", "out": "float32"}
    params |= {"sketch": "uint8", "bound": "float32"} if spec.sketch else {}
    streams = max(1, min(streams, (isa.registers - 8) // tokens))
    with w.function("neurons", params, INTS):
        # work: x [tokens][reach], a [tokens][wide], y of every task [tasks][tokens][reach]
        w.opaque("a0", f"{tokens} * reach")
        w.opaque("y0", f"a0 + {tokens} * wide")
        if spec.gate:
            _write_neurons(w, spec, tokens, streams, isa)
        else:
            _write_inputs(w, spec, tokens)
        if spec.policy == "stat":
            _write_stat(w, spec, tokens, isa)
        if spec.policy == "topk":
            _write_kth(w, tokens)
        _write_list(w, spec, tokens)
        with w.block("if listed <= limit:"):
            with w.block("for task in T.parallel(tasks):"):
                _write_listed(w, spec, tokens, streams, isa)
            _write_y(w, spec, tokens, isa)
    return w.text


def _write_neurons(w: Writer, spec: NeuronSpec, tokens: int, streams: int, isa: Isa) -> None:
    """a of all neurons, or of those that a sketch does not rule out."""
    _write_x(w, spec, tokens, isa)
    if spec.sketch:
        write_norms(w, tokens, isa)
    with w.block("for task in T.parallel(tasks):"):
        w.opaque("first", "F * task // tasks")
        w.opaque("count", "F * (task + 1) // tasks - first")
        if spec.sketch:
            write_candidates(w, tokens, streams, spec.bias, isa)
        _write_gate(w, spec, tokens, streams, isa)
        if spec.policy != "stat":
            _write_active(w, spec, tokens, isa, "first", "count")


def _write_inputs(w: Writer, spec: NeuronSpec, tokens: int) -> None:
    """a = x in float32; zero for missing tokens."""
    with w.block(f"for m in range(T.int64({tokens})):"), w.block("for i in range(F):"):
        known = load("x", spec.dtype, "T.min(m, M - 1) * F + i", 1)
        w(f"work[a0 + m * wide + i] = T.if_then_else(m < M, {known}, T.float32(0))")


def _write_x(w: Writer, spec: NeuronSpec, tokens: int, isa: Isa) -> None:
    """x in float32, zero from D to `reach`; of bf16 the even and the odd of every two vectors apart. Missing tokens are zero."""
    paired = spec.dtype == "bf16"
    step = 2 * isa.lanes if paired else isa.lanes
    with w.block(f"for m in range(T.int64({tokens})):"):
        with w.block(f"for k in range(T.if_then_else(m < M, D // {step}, 0)):"):
            parts = [load("x", spec.dtype, f"m * D + k * {step} + {i * isa.lanes}", isa.lanes) for i in range(step // isa.lanes)]
            if paired:
                parts = _apart([w.let("part", part) for part in parts], isa.lanes)
            for i, part in enumerate(parts):
                w(f"{vec('work', f'm * reach + k * {step} + {i * isa.lanes}', isa.lanes)} = {part}")
        w.opaque("done", f"T.if_then_else(m < M, D // {step} * {step}, 0)")
        with w.block("for rest in range(reach - done):"):
            w("k: T.let = done + rest")
            known = f"T.if_then_else(tir_all(m < M, k < D), {load('x', spec.dtype, 'm * D + k', 1)}, T.float32(0))"
            w(f"work[m * reach + {_place('k', paired, isa.lanes)}] = {known.replace('tir_all', 'T.And')}")


def _apart(parts: list[str], lanes: int) -> list[str]:
    return [f"T.Shuffle([{', '.join(parts)}], {list(range(odd, 2 * lanes, 2))})" for odd in (0, 1)]


def _place(k: str, paired: bool, lanes: int) -> str:
    """Where feature k lies among the float32 ones."""
    step = 2 * lanes
    return f"{k} // {step} * {step} + {k} % 2 * {lanes} + {k} % {step} // 2" if paired else k


def _weights(w: Writer, spec: NeuronSpec, buffer: str, at: str, isa: Isa) -> list[str]:
    """The vectors of a step as float32, in the order in which x lies; and a prefetch."""
    size = 4 if spec.dtype == "f32" else 2
    where = f"T.address_of({buffer}[{at} + {AHEAD // size}])"
    w(f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", {where}, T.int32(0), T.int32(3), T.int32(1)))')
    if spec.dtype != "bf16":
        return [w.let("weight", load(buffer, spec.dtype, at, isa.lanes))]
    two = w.let("two", f'T.reinterpret("uint32x{isa.lanes}", {buffer}[T.ramp({at}, 1, {2 * isa.lanes})])')
    even = f"T.shift_left({two}, {splat('T.uint32(16)', isa.lanes)})"
    odd = f"T.bitwise_and({two}, {splat('T.uint32(4294901760)', isa.lanes)})"
    return [w.let("weight", f'T.reinterpret("float32x{isa.lanes}", {part})') for part in (even, odd)]


def _step(spec: NeuronSpec, isa: Isa) -> int:
    return 2 * isa.lanes if spec.dtype == "bf16" else isa.lanes


def _write_dots(w: Writer, spec: NeuronSpec, tokens: int, isa: Isa, buffer: str, rows: list[str]) -> list[list[str]]:
    """Names of the products of some rows (by the place of their first element) with every token."""
    w.made += 1
    name, step, lanes = f"dot{w.made}_", _step(spec, isa), isa.lanes
    sums = w.registers(name, len(rows) * tokens, 1, lanes)
    for i in range(len(rows) * tokens):
        w(f"{sums(i, 0)} = {splat('T.float32(0)', lanes)}")
    with w.block(f"for k in range(D // {step}):"):
        x = lambda m, i: w.let("x", vec("work", f"{m} * reach + k * {step} + {i * lanes}", lanes))  # noqa: E731
        xs = [[x(m, i) for i in range(step // lanes)] for m in range(tokens)]
        for s, row in enumerate(rows):
            for i, weight in enumerate(_weights(w, spec, buffer, f"{row} + k * {step}", isa)):
                for m in range(tokens):
                    acc = sums(s * tokens + m, 0)
                    w(f"{acc} = {acc} + {weight} * {xs[m][i]}")
    with w.block(f"for rest in range(D % {step}):"):
        w(f"tail: T.let = D // {step} * {step} + rest")
        for s, row in enumerate(rows):
            weight = w.let("weight", load(buffer, spec.dtype, f"{row} + tail"))
            for m in range(tokens):
                lane = f"{name}{s * tokens + m}[0]"
                w(f"{lane} = {lane} + {weight} * work[{m} * reach + {_place('tail', spec.dtype == 'bf16', lanes)}]")
    return [[f"({total(w, sums(s * tokens + m, 0), lanes)})" for m in range(tokens)] for s in range(len(rows))]


def _write_gate(w: Writer, spec: NeuronSpec, tokens: int, streams: int, isa: Isa) -> None:
    """a of the task's rows, before the activation."""
    rows_of = "candidates" if spec.sketch else "count"
    w.opaque("each", f"{rows_of} // {streams}")
    for together, times, start in ((streams, "each", "i"), (1, f"{rows_of} - each * {streams}", f"each * {streams} + i")):
        with w.block(f"for i in range({times}):"):
            places = [w.let("row", f"first + {start}{f' + {s} * each' if s else ''}") for s in range(together)]
            if spec.sketch:
                places = [w.let("candidate", f'T.Cast("int64", list[{place}])') for place in places]
            rows = [w.let("at", f"{place} * gate_step") for place in places]
            for place, dots in zip(places, _write_dots(w, spec, tokens, isa, "gate", rows), strict=True):
                for m, dot in enumerate(dots):
                    w(f"work[a0 + {m} * wide + {place}] = {dot}{f' + bias[{place}]' if spec.bias else ''}")


def _write_active(w: Writer, spec: NeuronSpec, tokens: int, isa: Isa, first: str, count: str) -> None:
    """The activation, in place."""
    def each(m: str, at: str, lanes: int) -> None:
        place = vec("work", f"a0 + {m} * wide + {at}", lanes)
        w(f"{place} = {write_activation(w, spec.activation, [place], lanes)[0] if spec.activation else place}")

    with w.block(f"for m in range(T.int64({tokens})):"):
        _vectors(w, isa.lanes, first, count, lambda at, lanes: each("m", at, lanes))


def _vectors(w: Writer, lanes: int, first: str, count: str, write: Callable[[str, int], None]) -> None:
    """`write(place, lanes)` for a range: vectors, then one by one."""
    with w.block(f"for v in range({count} // {lanes}):"):
        w(f"at: T.let = {first} + v * {lanes}")
        write("at", lanes)
    with w.block(f"for v in range({count} % {lanes}):"):
        w(f"at: T.let = {first} + {count} // {lanes} * {lanes} + v")
        write("at", 1)


def _write_stat(w: Writer, spec: NeuronSpec, tokens: int, isa: Isa) -> None:
    """a = act(max(g - mean - level * deviation, 0)) (Spark Transformer, You et al. 2025), in two passes over a row that is in cache."""
    lanes = isa.lanes
    with w.block(f"for m in range(T.min(M, T.int64({tokens}))):"):
        for name, of in (("mean", "{v}"), ("square", "({v} - mean) * ({v} - mean)")):
            sums = w.registers(f"{name}_", 1, 1, lanes)
            w(f"{sums(0, 0)} = {splat('T.float32(0)', lanes)}")

            def add(at: str, n: int, of: str = of, name: str = name) -> None:
                value = w.let("g", vec("work", f"a0 + m * wide + {at}", n))
                term = of.format(v=value).replace("mean", splat("mean", n))
                place = vec(f"{name}_0", 0, n) if n > 1 else f"{name}_0[0]"
                w(f"{place} = {place} + {term}")

            _vectors(w, lanes, "T.int64(0)", "F", add)
            w(f'{name}_at = T.alloc_buffer((1,), "float32", scope="global")')
            w(f'{name}_at[0] = ({total(w, sums(0, 0), lanes)}) / T.Cast("float32", F)')
            w(f"{name}: T.let = {name}_at[0]")
        w("cut: T.let = mean + T.sqrt(square) * level[0]")

        def soft(at: str, n: int) -> None:
            place = vec("work", f"a0 + m * wide + {at}", n)
            over = w.let("over", f"{place} - {splat('cut', n)}")
            kept = w.let("kept", write_activation(w, "relu", [over], n)[0])
            w(f"{place} = {write_activation(w, spec.activation, [kept], n)[0] if spec.activation else kept}")

        _vectors(w, lanes, "T.int64(0)", "F", soft)


def _write_kth(w: Writer, tokens: int) -> None:
    """The k-th largest |a| of every token, by bisection over the bits (of positive floats they order as integers); then all others
    become zero, of those equal to it the last ones too."""
    bits = SIZE.format("work[a0 + m * wide + i]")
    with w.block(f"for m in range(T.min(M, T.int64({tokens}))):"):
        for name, start in (("low", "T.int32(0)"), ("high", "T.int32(2147483647)"), ("above", "T.int32(0)")):
            w(f'{name} = T.alloc_buffer((1,), "int32", scope="global")')
            w(f"{name}[0] = {start}")
        with w.block("for step in range(31):"):  # the largest bits that at least `keep` values reach
            w("middle: T.let = low[0] + (high[0] - low[0]) // 2 + (high[0] - low[0]) % 2")
            w("above[0] = 0")
            with w.block("for i in range(F):"):
                w(f'above[0] = above[0] + T.Cast("int32", {bits} >= middle)')
            w("low[0] = T.if_then_else(above[0] >= T.Cast(\"int32\", keep), middle, low[0])")
            w("high[0] = T.if_then_else(above[0] >= T.Cast(\"int32\", keep), high[0], T.max(low[0], middle - 1))")
        w("above[0] = 0")
        with w.block("for i in range(F):"):
            w(f'above[0] = above[0] + T.Cast("int32", {bits} > low[0])')
        w('spare = T.alloc_buffer((1,), "int32", scope="global")')
        w('spare[0] = T.Cast("int32", keep) - above[0]')
        with w.block("for i in range(F):"):
            w(f"equal: T.let = T.Cast(\"int32\", {bits} == low[0])")
            w(f"stays: T.let = T.Or({bits} > low[0], T.And(equal == 1, spare[0] > 0))")
            w("spare[0] = spare[0] - equal")
            w("work[a0 + m * wide + i] = T.if_then_else(stays, work[a0 + m * wide + i], T.float32(0))")


def _write_list(w: Writer, spec: NeuronSpec, tokens: int) -> None:
    """The active neurons of any token, in order; their number in list[F]. A value that its own token does not keep becomes zero."""
    w('found = T.alloc_buffer((1,), "int64", scope="global")')
    w("found[0] = T.int64(0)")
    with w.block("for i in range(F):"):
        w('list[found[0]] = T.Cast("int32", i)')
        if spec.policy == "all":
            w("found[0] = found[0] + T.int64(1)")
        else:
            kept = []
            for m in range(tokens):
                a = f"work[a0 + {m} * wide + i]"
                size = w.let("size", SIZE.format(a))
                if spec.policy == "threshold":
                    cut = 'T.reinterpret("int32", level[i])'
                    w(f"{a} = T.if_then_else({size} <= {cut}, T.float32(0), {a})")
                    kept.append(f"{size} > {cut}")
                else:
                    kept.append(f"{size} > 0")
            any_of = kept[0]
            for m, one in enumerate(kept[1:], 1):
                any_of = f"T.Or({any_of}, T.And({m} < M, {one}))"
            w(f'found[0] = found[0] + T.Cast("int64", {any_of})')
    w.opaque("listed", "found[0]")
    w('list[F] = T.Cast("int32", listed)')


def _write_listed(w: Writer, spec: NeuronSpec, tokens: int, streams: int, isa: Isa) -> None:
    """The task's part of the list, into its own y."""
    w.opaque("own", f"y0 + task * {tokens} * reach")
    with w.block(f"for v in range({tokens} * reach // {isa.lanes}):"):
        w(f"{vec('work', f'own + v * {isa.lanes}', isa.lanes)} = {splat('T.float32(0)', isa.lanes)}")
    w.opaque("from_", "listed * task // tasks")
    w.opaque("number", "listed * (task + 1) // tasks - from_")
    whole = f"number // {streams}"
    for together, times, start in ((streams, whole, f"i * {streams}"), (1, f"number - {whole} * {streams}", f"{whole} * {streams} + i")):
        with w.block(f"for i in range({times}):"):
            ids = [w.let("neuron", f'T.Cast("int64", list[from_ + {start} + {s}])') for s in range(together)]
            hs = [[w.let("h", f"work[a0 + {m} * wide + {one}]") for m in range(tokens)] for one in ids]
            rows = [w.let("at", f"{one} * {spec.rows} * D") for one in ids]
            if spec.up:
                dots = _write_dots(w, spec, tokens, isa, "bundle", rows)
                hs = [[w.let("h", f"{h} * {dot}") for h, dot in zip(h_s, dot_s, strict=True)] for h_s, dot_s in zip(hs, dots, strict=True)]
                rows = [w.let("at", f"{row} + D") for row in rows]
            _write_axpy(w, spec, tokens, isa, rows, hs)


def _write_axpy(w: Writer, spec: NeuronSpec, tokens: int, isa: Isa, rows: list[str], hs: list[list[str]]) -> None:
    """y += h * down, for some neurons at once."""
    step, lanes = _step(spec, isa), isa.lanes
    with w.block(f"for k in range(D // {step}):"):
        weights = [_weights(w, spec, "bundle", f"{row} + k * {step}", isa) for row in rows]
        for m in range(tokens):
            for i in range(step // lanes):
                place = vec("work", f"own + {m} * reach + k * {step} + {i * lanes}", lanes)
                value = place
                for s in range(len(rows)):
                    value = f"({value} + {splat(hs[s][m], lanes)} * {weights[s][i]})"
                w(f"{place} = {value}")
    with w.block(f"for rest in range(D % {step}):"):
        w(f"tail: T.let = D // {step} * {step} + rest")
        for s, row in enumerate(rows):
            weight = w.let("weight", load("bundle", spec.dtype, f"{row} + tail"))
            for m in range(tokens):
                place = f"work[own + {m} * reach + {_place('tail', spec.dtype == 'bf16', lanes)}]"
                w(f"{place} = {place} + {hs[s][m]} * {weight}")


def _write_y(w: Writer, spec: NeuronSpec, tokens: int, isa: Isa) -> None:
    """y = the sum of every task's, plus the bias `out`, in the order of features."""
    paired, step, lanes = spec.dtype == "bf16", _step(spec, isa), isa.lanes
    with w.block(f"for m in range(T.min(M, T.int64({tokens}))):"):
        with w.block(f"for k in range(reach // {lanes}):"):
            w(f"at: T.let = y0 + m * reach + k * {lanes}")
            with w.block("for other in range(tasks - 1):"):
                more = vec("work", f"at + (other + 1) * {tokens} * reach", lanes)
                w(f"{vec('work', 'at', lanes)} = {vec('work', 'at', lanes)} + {more}")
        with w.block(f"for k in range(D // {step}):"):
            w(f"at: T.let = y0 + m * reach + k * {step}")
            parts = [w.let("part", vec("work", f"at + {i * lanes}", lanes)) for i in range(step // lanes)]
            if paired:
                mixed = [i // 2 + i % 2 * lanes for i in range(step)]
                parts = [w.let("part", f"T.Shuffle([{', '.join(parts)}], {mixed[i * lanes : (i + 1) * lanes]})") for i in range(2)]
            for i, part in enumerate(parts):
                value = w.let("value", f"{part} + {vec('out', f'k * {step} + {i * lanes}', lanes)}")
                w(f"{vec('y', f'm * D + k * {step} + {i * lanes}', lanes)} = {store(w, value, spec.dtype, lanes)}")
        with w.block(f"for rest in range(D % {step}):"):
            w(f"tail: T.let = D // {step} * {step} + rest")
            value = w.let("value", f"work[y0 + m * reach + {_place('tail', paired, lanes)}] + out[tail]")
            w(f"y[m * D + tail] = {store(w, value, spec.dtype, 1)}")
