"""A sparse linear for Triton: y[M, N] = epilogue(sum_t W_t x + bias) + residual, the terms one after the other into one accumulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsecc.codegen.config import to_text
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.lines import Lines
from sparsecc.codegen.triton.bitmap import bitmap_columns, bitmap_rows, refuses_bitmap, write_bitmap
from sparsecc.codegen.triton.bsr import refuses_bsr, write_bsr
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.csr import refuses_csr, write_csr
from sparsecc.codegen.triton.dense import refuses_dense, write_dense
from sparsecc.codegen.triton.nm import nm_columns, refuses_nm, write_nm
from sparsecc.codegen.triton.tile import TL, Tile
from sparsecc.formats import Bitmap, Compressed, Dense, Format, PackedNM
from sparsecc.formats.level import NM


@dataclass(frozen=True)
class Family:
    """How one kind of storage is run. `rows`: features of a tile where the format decides them, else None; `columns`: of a step of the
    pipelined loop, for the config's bk."""

    name: str
    refuses: Callable[[Format], str | None]
    write: Callable[[Tile, int], None]
    rows: Callable[[Format], int | None] = lambda fmt: None
    columns: Callable[[Format, int], int] = lambda fmt, bk: bk


BSR = Family("bsr", refuses_bsr, write_bsr, lambda fmt: fmt.block[0], lambda fmt, bk: min(bk, fmt.block[1]))
CSR = Family("csr", refuses_csr, write_csr)
NM_PACKED = Family("nm", refuses_nm, write_nm, columns=nm_columns)
BITMAP = Family("bitmap", refuses_bitmap, write_bitmap, bitmap_rows, lambda fmt, bk: bitmap_columns(fmt))
DENSE = Family("dense", refuses_dense, write_dense)
FAMILIES = (BSR, NM_PACKED, BITMAP, CSR, DENSE)

ELEMENT = {"f32": "fp32", "tf32": "fp32", "f16": "fp16", "bf16": "bf16"}
"""Our names of dtypes -> those of Triton's signatures."""


def family(fmt: Format) -> Family | None:
    """Who runs the format, None where nobody does."""
    match fmt.level:
        case PackedNM():
            return NM_PACKED
        case Compressed() if min(fmt.block) >= 16:
            return BSR
        case Compressed() | NM():
            return CSR
        case Bitmap():
            return BITMAP
        case Dense():
            return DENSE
    return None


def families(spec: KernelSpec) -> list[Family]:
    """Of every term. Raises TypeError for a format that has none: `refuses_linear` says so first."""
    found = [family(fmt) for fmt in spec.formats]
    if None in found:
        raise TypeError(f"no kernel reads one of {', '.join(map(str, spec.formats))}")
    return [one for one in found if one is not None]


def refuses_linear(spec: KernelSpec) -> str | None:
    """Why there is no kernel for the spec, or None."""
    if not spec.formats:
        return "low-rank terms run as two dense products"
    if spec.layout != "row":
        return "GPU kernels keep features consecutive"
    for fmt in spec.formats:
        one = family(fmt)
        reason = f"{fmt.level} is a CPU's storage" if one is None else one.refuses(fmt)
        if reason:
            return reason
        wanted = spec.dtype if spec.dtype in ("f16", "bf16") else "f32"
        if wanted != "f32" and str(fmt.codec) != wanted:
            return f"values in {fmt.codec} against activations in {wanted}: store them alike"
    rows = {r for fmt, one in zip(spec.formats, families(spec), strict=True) if (r := one.rows(fmt)) is not None}
    return f"terms with tiles of {' and '.join(map(str, sorted(rows)))} rows" if len(rows) > 1 else None


def tile_rows(spec: KernelSpec, config: GpuConfig) -> int:
    """Features per program: what a format demands, else the config's."""
    wanted = [one.rows(fmt) for fmt, one in zip(spec.formats, families(spec), strict=True)]
    return next((rows for rows in wanted if rows is not None), config.bn)


def transposes(spec: KernelSpec) -> bool:
    """Whether the kernel reads x^T beside x."""
    return spec.regime != "one" and CSR in families(spec)


def pointers(spec: KernelSpec, split: bool) -> dict[str, str]:
    """The kernel's arrays in order, all on 16 bytes: name -> element type. `split` adds partial sums and counters of finished parts."""
    own = ELEMENT[spec.dtype]
    found = {"x": own, **({"xt": own} if transposes(spec) else {}), "y": own, "bias": own, **({"res": own} if spec.residual else {})}
    for t, fmt in enumerate(spec.formats):
        kinds = {"ptr": "i32", "idx": "i32" if spec.wide else "u16", "bits": "u16", "val": ELEMENT[str(fmt.codec)]}
        if isinstance(fmt.level, NM):
            kinds["idx"] = "u16" if isinstance(fmt.level, PackedNM) and fmt.level.bits > 8 else "u8"
        found |= {f"{name}{t}": kinds[name] for name in fmt.components()}
    return found | ({"partial": "fp32", "done": "i32"} if split else {})


def sizes(spec: KernelSpec) -> tuple[str, ...]:
    """The kernel's integers in order: sizes, and how far apart rows of x, of x^T and of the residual lie."""
    return ("M", "N", "K", "x_step", *(("xt_step",) if transposes(spec) else ()), *(("res_step",) if spec.residual else ()))


def signature(spec: KernelSpec, config: GpuConfig) -> dict[str, str]:
    """Argument -> type, with what is known of its value: `*fp16` (on 16 bytes), `i32`, `i32 % 16` (a multiple of 16)."""
    arrays = {name: f"*{kind}" for name, kind in pointers(spec, config.split > 1).items()}
    whole = {"x_step": True, "xt_step": True, "K": not spec.tail, "N": not spec.ragged, "res_step": not spec.ragged}
    return arrays | {name: "i32 % 16" if whole.get(name) else "i32" for name in sizes(spec)}


def linear_source(spec: KernelSpec, config: GpuConfig) -> str:
    """The kernel as Triton source, what it must be compiled with in the comments above it. Its grid is (tiles of features x tiles of
    tokens, config.split)."""
    w = Lines()
    tile = Tile(w, spec, config, tile_rows(spec, config))
    arguments = signature(spec, config)
    w(f"# {spec}")
    w(f"# {to_text(config)}")
    w(f"# {', '.join(f'{name}: {kind}' for name, kind in arguments.items())}")
    w("@triton.jit")
    with w.block(f"def linear({', '.join(arguments)}):"):
        w(f"tiles = tl.cdiv(N, {tile.bn})")
        w("tile_n = tl.program_id(0) % tiles")  # programs side by side share the activations
        if config.split > 1:
            w("part = tl.program_id(1)")
        w(f"rn = tile_n * {tile.bn} + tl.arange(0, {tile.bn})")
        if not tile.one:
            w(f"tokens = tl.program_id(0) // tiles * {config.bm} + tl.arange(0, {config.bm})")
            w("rm = tl.minimum(tokens, M - 1)")  # what is beyond is computed twice and not stored
            w("x_rows = x + rm.to(tl.int64)[None, :] * x_step")
        w(f"acc = tl.zeros({tile.shape}, tl.float32)")
        for t, one in enumerate(families(spec)):
            one.write(tile, t)
        if config.split == 1:
            _finish(tile)
        else:
            _add_up(tile)
    return w.text


def _add_up(tile: Tile) -> None:
    """The part that finishes last adds up all of them in order, so that equal inputs give equal bits."""
    w, config = tile.w, tile.config
    size = tile.bn * (1 if tile.one else config.bm)
    inner = f"tl.arange(0, {tile.bn})"
    if not tile.one:
        inner = f"{inner}[:, None] * {config.bm} + tl.arange(0, {config.bm})[None, :]"
    w("tile = tl.program_id(0)")
    w(f"mine = partial + tile.to(tl.int64) * {config.split * size} + ({inner})")
    w(f"tl.store(mine + part * {size}, acc)")
    w("tl.debug_barrier()")  # every thread's stores come before the count
    w('arrived = tl.atomic_add(done + tile, 1, sem="acq_rel")')
    with w.block(f"if arrived == {config.split - 1}:"):
        w("tl.debug_barrier()")
        w(f"acc = tl.zeros({tile.shape}, tl.float32)")
        with w.block(f"for other in range({config.split}):"):
            w(f'acc += tl.load(mine + other * {size}, cache_modifier=".cg")')  # from L2: this multiprocessor may hold older lines
        w("tl.store(done + tile, 0)")
        _finish(tile)


def _finish(tile: Tile) -> None:
    """Bias, activation, residual, store."""
    w, spec = tile.w, tile.spec
    bounds = "rn < N" if spec.ragged else ""
    along = "" if tile.one else "[:, None]"
    w(f"acc += tl.load(bias + rn{f', mask={bounds}, other=0.0' if bounds else ''}).to(tl.float32){along}")
    if spec.epilogue:
        w(f"acc = {ACTIVATION[spec.epilogue]}")
    if tile.one:
        place, residual, mask = "rn", "rn", bounds
    else:
        place, residual = (f"tokens.to(tl.int64)[None, :] * {step} + rn[:, None]" for step in ("N", "res_step"))
        mask = "(tokens < M)[None, :]" + (" & (rn < N)[:, None]" if bounds else "")
    masked = f", mask={mask}" if mask else ""
    if spec.residual:
        w(f"acc += tl.load(res + {residual}{masked}{', other=0.0' if mask else ''}).to(tl.float32)")
    w(f"tl.store(y + {place}, acc.to({TL[spec.dtype]}){masked})")


ACTIVATION = {
    "relu": "tl.where(acc < 0, 0.0, acc)",  # NaN stays NaN
    "gelu": "0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))",
    "gelu_tanh": "acc / (1.0 + tl.exp(-1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)))",
    "silu": "acc / (1.0 + tl.exp(-acc))",
    "relu6": "tl.where(acc < 0, 0.0, tl.where(acc > 6, 6.0, acc))",
    "hardswish": "acc * tl.where(acc < -3, 0.0, tl.where(acc > 3, 6.0, acc + 3)) * (1.0 / 6.0)",
}
"""The epilogues in float32."""
