"""Laws of storage: unpack(pack(w)) == w, nbytes is what is stored, text round-trips, refusals say why."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.errors import FormatError, ShapeError
from sparsecc.formats import format as formats
from sparsecc.formats import level, pattern
from sparsecc.formats.codec import Raw
from sparsecc.formats.format import Format, parse_format
from sparsecc.formats.measure import CANDIDATE_BLOCKS, detect, measure
from sparsecc.formats.packed import PackedNM
from sparsecc.formats.shared import Shared
from sparsecc.formats.swizzle import Identity, Panels

LAW = settings(max_examples=60, deadline=None)

nms = st.sampled_from([(1, 1), (1, 2), (2, 4), (3, 5), (4, 8), (1, 16)])
levels = st.one_of(
    st.sampled_from([level.Dense(), level.Compressed(), level.Bitmap(), level.Bitmap(4), level.Bitmap(16)]),
    nms.map(lambda nm: level.NM(*nm)),
    st.sampled_from([(1, 1), (1, 2), (2, 4), (4, 8), (1, 16), (2, 8), (4, 16)]).map(lambda nm: PackedNM(*nm)),
    st.sampled_from([level.Sell(1, 1), level.Sell(2, 4), level.Sell(4, 4), level.Sell(3, 12), Shared(1, 2), Shared(3, 4), Shared(16, 32)]),
)
blocks = st.sampled_from([(1, 1), (4, 1), (8, 1), (16, 1), (1, 16), (4, 4), (16, 16), (2, 3)])
codecs = st.sampled_from([Raw("f32"), Raw("bf16"), Raw("f16")])
sizes = st.integers(0, 40)


@st.composite
def all_formats(draw: st.DrawFn) -> Format:
    of = draw(levels)
    width = draw(st.integers(1, 12)) * getattr(of, "m", 1)
    return Format(of, draw(blocks), draw(codecs), draw(st.sampled_from([Identity(), Panels(width)])))


def weight_for(fmt: Format, N: int, K: int, sparsity: float, seed: int) -> torch.Tensor:
    """A weight the format can hold, with odd values among its nonzeros."""
    random = torch.Generator().manual_seed(seed)
    (rows, cols), of = fmt.block, fmt.level
    grid = torch.rand(-(-N // rows), -(-K // cols), generator=random)
    kept = grid >= sparsity
    if isinstance(of, level.NM):
        kept &= pattern.NM(of.n, of.m).topk_mask(grid)
    kept = kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:N, :K]
    w = torch.randn(N, K, generator=random)
    odd = torch.rand(N, K, generator=random)
    w[odd < 0.1] = torch.nan
    w[(odd > 0.1) & (odd < 0.2)] = -torch.inf
    w[(odd > 0.2) & (odd < 0.4)] = 0.0
    return w.where(kept, torch.zeros(()))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@LAW
@given(all_formats(), sizes, sizes, st.sampled_from([0.0, 0.5, 0.9, 1.1]), st.integers(0, 1 << 30))
def test_unpack_inverts_pack(fmt: Format, N: int, K: int, sparsity: float, seed: int) -> None:
    w = weight_for(fmt, N, K, sparsity, seed)
    assert fmt.refuses(w) is None
    arrays = fmt.pack(w)
    assert tuple(arrays) == fmt.components()
    assert {name: a.dtype for name, a in arrays.items()} == fmt.dtypes(N, K)
    assert all(a.is_contiguous() and a.device.type == "cpu" for a in arrays.values())
    assert same(fmt.unpack(arrays, (N, K)), w.to(Raw.DTYPES[str(fmt.codec)]).float())
    kept = int(formats._occupied(fmt._blocks(w)).sum())
    stored, least = sum(a.nbytes for a in arrays.values()), fmt.nbytes(N, K, kept)
    assert stored >= least if isinstance(fmt.level, level.Sell | Shared) else stored == least


@LAW
@given(all_formats())
def test_text_round_trips(fmt: Format) -> None:
    assert parse_format(str(fmt)) == fmt


@LAW
@given(levels, st.integers(0, 9), st.integers(0, 40), st.integers(0, 1 << 30))
def test_a_level_gives_each_occupied_block_one_slot(of: level.Level, P: int, C: int, seed: int) -> None:
    P *= of.window
    grid = torch.rand(P, C, generator=torch.Generator().manual_seed(seed))
    occ = pattern.NM(of.n, of.m).topk_mask(grid) & (grid > 0.3) if isinstance(of, level.NM) else grid > 0.5
    arrays, slots = of.pack(occ)
    least = of.slots(P, C, int(occ.sum()))
    assert len(slots) >= least if isinstance(of, level.Sell | Shared) else len(slots) == least
    assert sum(a.nbytes for a in arrays.values()) == of.nbytes(P, C, len(slots))
    back = of.unpack(arrays, P, C)
    real = slots[:, 1] >= 0
    assert torch.equal(back[real], slots[real])
    stored = back[back[:, 1] >= 0]
    assert len(stored.unique(dim=0)) == len(stored), "two slots share a coordinate"
    seen = torch.zeros(P, C, dtype=torch.int64).index_put(tuple(slots[real].T), torch.tensor(1), accumulate=True)
    wanted = occ | (of == level.Dense())
    if isinstance(of, Shared):
        wanted = occ.view(P // of.rows, of.rows, C).any(1).repeat_interleave(of.rows, 0)
    assert torch.equal(seen == 1, wanted)


def test_nm_offsets_ascend_and_fill_up_with_free_ones() -> None:
    occ = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, 1]]).bool()
    arrays, slots = level.NM(2, 4).pack(occ)
    assert arrays["idx"].tolist() == [0, 3, 0, 1, 0, 1]
    assert slots.tolist() == [[0, -1], [0, 3], [0, -1], [0, -1], [0, 8], [0, -1]]


def test_sell_sorts_windows_and_pads_slices_with_readable_coordinates() -> None:
    rows = ["0001", "1011", "0000", "1100", "0100", "0000", "1010", "0010"]
    occ = torch.tensor([[bit == "1" for bit in row] for row in rows])
    arrays, slots = level.Sell(2, 4).pack(occ)
    assert arrays["order"].tolist() == [1, 3, 0, 2, 2, 0, 3, 1]
    assert arrays["ptr"].tolist() == [0, 3, 4, 6, 7]
    assert arrays["idx"].tolist() == [0, 0, 2, 1, 3, 1, 3, 0, 0, 1, 2, 1, 2, 0]
    assert slots[:, 1].tolist() == [0, 0, 2, 1, 3, -1, 3, -1, 0, 1, 2, -1, 2, -1]


def test_values_lie_column_major_in_a_block() -> None:
    w = torch.arange(1.0, 9.0).view(4, 2)
    assert parse_format("bsr(4, 2)").pack(w)["val"].tolist() == [1, 3, 5, 7, 2, 4, 6, 8]


def test_panels_are_panel_major() -> None:
    w = torch.arange(1.0, 11.0).view(2, 5)
    arrays = parse_format("csr.panels(2)").pack(w)
    assert arrays["val"].tolist() == [1, 2, 6, 7, 3, 4, 8, 9, 5, 10]
    assert arrays["idx"].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]
    assert arrays["ptr"].tolist() == [0, 2, 4, 6, 8, 9, 10]


def test_bitmap_bits_start_at_the_lowest() -> None:
    w = torch.zeros(1, 18)
    w[0, [0, 15, 17]] = 1
    assert parse_format("bitmap").pack(w)["bits"].tolist() == [[0x8001, 0x0002]]


def test_index_is_wide_only_where_it_must_be() -> None:
    csr = parse_format("csr")
    assert csr.dtypes(1, 65536)["idx"] == torch.uint16
    assert csr.dtypes(1, 65537)["idx"] == torch.int32
    assert parse_format("csr.panels(128)").dtypes(1, 1 << 20)["idx"] == torch.uint16
    w = torch.zeros(2, 65540)
    w[1, 65539] = 3
    assert torch.equal(csr.unpack(csr.pack(w), (2, 65540)), w)


def test_nbytes_takes_symbols() -> None:
    nnz = sympy.Symbol("nnz", integer=True, positive=True)
    for text in ("csr", "bsr(4, 1).bf16.panels(128)", "nm(2, 4)", "bitmap", "dense"):
        fmt = parse_format(text)
        assert sympy.sympify(fmt.nbytes(768, 3072, nnz)).subs(nnz, 1000) == fmt.nbytes(768, 3072, 1000)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("cst", 0, "did you mean 'csr'"),
        ("bsr(4)", 0, "takes 2 arguments, not 1"),
        ("bsr(4, x)", 7, "expected a number"),
        ("bsr(4,", 6, "expected ')'"),
        ("csr.bf15", 4, "did you mean 'bf16'"),
        ("csr.bf16.f16", 9, "given twice"),
        ("csr csr", 4, "expected '.' or the end"),
        ("", 0, "expected a name"),
        ("csr.panels(0)", 4, "positive"),
        ("nm(5, 4)", 0, "1 <= n <= m"),
        ("nm(2, 4).panels(6)", 9, "multiple of 4"),
        ("bsr(0, 1)", 0, "positive"),
    ],
)
def test_bad_text_gets_a_caret(text: str, column: int, message: str) -> None:
    with pytest.raises(FormatError) as error:
        parse_format(text)
    assert message in str(error.value)
    assert str(error.value).endswith(f"    {text}\n    {' ' * column}^")


def test_refusals_name_the_place() -> None:
    w = torch.zeros(4, 10)
    w[3, 4:7] = 1
    fmt = parse_format("nm(2, 4)")
    assert fmt.refuses(w) == "row 3, columns 4-7 hold 3 nonzeros, nm(2, 4) stores at most 2"
    with pytest.raises(FormatError, match="row 3"):
        fmt.pack(w)
    with pytest.raises(FormatError, match="too large for f16"):
        parse_format("csr.f16").pack(w * 1e5)
    assert parse_format("csr.bf16").refuses(w * 1e5) is None
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        fmt.pack(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_and_views_pack(dtype: torch.dtype) -> None:
    w = torch.randn(9, 14, dtype=dtype)[1:, ::2].T.requires_grad_()
    assert torch.equal(parse_format("csr").unpack(parse_format("csr").pack(w), (7, 8)), w.detach().float())


def test_lossless() -> None:
    w = torch.tensor([1.0, float("nan"), float("inf")])
    assert Raw("bf16").lossless_for(w)
    assert not Raw("bf16").lossless_for(torch.tensor([1.001]))
    assert not Raw("f16").lossless_for(torch.tensor([1e5]))


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, st.sampled_from([0.1, 0.6, 0.95]), st.sampled_from(CANDIDATE_BLOCKS), st.integers(0, 1 << 30))
def test_measure_counts(N: int, K: int, sparsity: float, block: tuple[int, int], seed: int) -> None:
    w = weight_for(Format(level.Compressed(), block), N, K, sparsity, seed)
    found = measure(w)
    assert found.nnz == int(w.count_nonzero())
    assert found.zero_rows.tolist() == [i for i in range(N) if not w[i].count_nonzero()]
    assert found.zero_cols.tolist() == [j for j in range(K) if not w[:, j].count_nonzero()]
    assert found.constant_row_nnz == (len(set(w.count_nonzero(1).tolist())) <= 1)
    for shape, measured in found.blocks.items():
        grid = formats._occupied(Format(level.Dense(), shape)._blocks(w))
        assert measured.kept == pytest.approx(grid.float().mean().item() if grid.numel() else 0.0)
        kept = int(grid.sum()) * shape[0] * shape[1]
        assert measured.fill == pytest.approx(found.nnz / kept if kept else 1.0)
    holds = [nm for nm in ((1, 4), (1, 2), (2, 4), (4, 8)) if pattern.NM(*nm).mask_violation(w) is None]
    assert found.nm == (holds[0] if holds else None)


@pytest.mark.parametrize(
    "text",
    ["block(4, 1, 0.9)", "block(8, 1, 0.8)", "block(16, 1, 0.8)", "block(1, 16, 0.8)", "block(4, 4, 0.8)", "block(16, 16, 0.7)",
     "block(32, 32, 0.7)", "nm(2, 4)", "nm(1, 4)", "nm(1, 2)", "nm(4, 8)", "unstructured(0.9)", "rows(0.3)", "cols(0.3)"],
)  # fmt: skip
def test_detect_finds_what_was_made(text: str) -> None:
    made = pattern.parse_pattern(text)
    w = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))
    found = detect(w * made.topk_mask(w.abs()))
    assert found.mask_violation(w * made.topk_mask(w.abs())) is None
    assert made.implies(found)
    assert str(found).split("(")[0] == text.split("(")[0]


@pytest.mark.parametrize(("rows", "cols", "found"), [((0, 1, 7), (2, 5), pattern.Cols()), ((0, 1, 7, 8, 9), (2, 5), pattern.Rows())])
def test_dead_rows_and_columns_are_no_groups(rows: tuple[int, ...], cols: tuple[int, ...], found: pattern.Pattern) -> None:
    w = torch.ones(12, 6)
    w[list(rows)] = 0
    w[:, list(cols)] = 0
    assert measure(w).nm is not None
    assert detect(w) == found


def test_detect_on_the_edges() -> None:
    assert detect(torch.randn(8, 8)) == pattern.ANY
    assert detect(torch.zeros(8, 8)) == pattern.Rows()
    assert detect(torch.zeros(0, 8)) == pattern.ANY
    assert detect(torch.zeros(8, 0)) == pattern.ANY
    assert detect(torch.randn(64, 64) * (torch.rand(64, 64) > 0.05)) == pattern.ANY


@pytest.mark.parametrize("text", ["csr", "bsr(4, 1)", "bitmap", "bitmap(16).panels(32)", "sell(4, 64).panels(16)"])
def test_positions_beyond_32_bits_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with over 2^31 blocks, which no test can hold."""
    fmt = parse_format(text)
    monkeypatch.setattr("sparsecc.formats.level.MOST", 100)
    few, many = torch.zeros(64, 64), torch.ones(64, 64)
    few[0] = 1
    assert fmt.refuses(few) is None
    assert "counts them in 32 bits: use larger blocks" in str(fmt.refuses(many))
    with pytest.raises(FormatError, match="in 32 bits"):
        fmt.pack(many)
