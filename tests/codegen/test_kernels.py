"""Numerics of the CPU kernels against float64: every format, both regimes, odd sizes, any strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.formats import Format, parse_format
from sparsecc.formats.level import NM
from sparsecc.formats.pattern import NM as NMPattern
from sparsecc.ir.ops import ACTIVATIONS, empty_output, token_row
from sparsecc.runtime.launch import LinearKernel

TOLERANCE = 2e-5
"""Largest error over largest output: sums in another order, and activations as polynomials."""


@dataclass(frozen=True)
class Case:
    """One kernel per regime: formats joined by " + ", then what surrounds the product."""

    formats: str
    shape: tuple[int, int]
    epilogue: str = ""
    residual: bool = False
    layout: str = "row"
    config: CpuConfig = CpuConfig(2, 2, 64)  # noqa: RUF009

    @property
    def parsed(self) -> tuple[Format, ...]:
        return tuple(parse_format(text) for text in self.formats.split(" + "))

    @property
    def spec(self) -> KernelSpec:
        formats, (N, K) = self.parsed, self.shape
        ragged = any(N % (fmt.block[0] * fmt.level.window) for fmt in formats)
        wide = any(fmt.grid(N, K)[1] > 65536 for fmt in formats)
        return KernelSpec(formats, self.epilogue, self.residual, self.layout, "many", ragged, wide)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.formats}-{self.epilogue or 'linear'}{'+res' if self.residual else ''}-{self.layout}"


CASES = [
    Case("dense", (37, 61), "gelu", config=CpuConfig(1, 1, 64)),
    Case("csr", (150, 96), "gelu", True, "row"),
    Case("csr", (70, 64), "silu", True, "token"),
    Case("bsr(4, 1)", (128, 96), "", True, "token"),
    Case("bsr(4, 1)", (131, 77), "gelu", True, "row"),
    Case("bsr(8, 1)", (72, 50), "relu", False, "token", CpuConfig(4, 1, 64)),
    Case("bsr(16, 1)", (50, 37), "gelu_tanh", True, "row", CpuConfig(1, 4, 64)),
    Case("bsr(1, 16)", (33, 72), "silu", False, "token"),
    Case("bsr(4, 4)", (66, 42), "", True, "row", CpuConfig(1, 2, 64)),
    Case("bsr(16, 16)", (64, 96), "relu", True, "token"),
    Case("bsr(32, 32)", (80, 100), "gelu", False, "token", CpuConfig(1, 1, 64)),
    Case("bsr(3, 2)", (49, 35), "gelu_tanh", False, "token"),
    Case("nm(2, 4)", (65, 90), "relu", False, "row"),
    Case("nm(2, 4)", (8, 3), "", False, "token"),
    Case("nm(1, 3)", (34, 64), "", True, "token", CpuConfig(4, 4, 64)),
    Case("bitmap", (40, 83), "silu", True, "row"),
    Case("bitmap.block(4, 1)", (42, 70), "gelu", False, "token"),
    Case("csr.panels(16)", (65, 100), "relu", True, "row"),
    Case("bsr(4, 1).panels(8)", (26, 60), "gelu", True, "token"),
    Case("sell(4, 16)", (64, 96), "gelu", True, "token"),
    Case("sell(2, 8).panels(16)", (61, 90), "silu", True, "row"),
    Case("sell(4, 64).panels(32)", (150, 70), "", True, "token", CpuConfig(4, 1, 64)),
    Case("sell(2, 4).block(4, 1).panels(32)", (85, 70), "relu", False, "token", CpuConfig(1, 1, 64)),
    Case("sell(3, 6).block(1, 16)", (35, 70), "", False, "row"),
    Case("sell(2, 4).block(32, 1)", (100, 40), "", True, "token"),
    Case("csr.bf16", (48, 64), config=CpuConfig(4, 2, 64)),
    Case("bsr(4, 1).f16", (66, 40), "silu"),
    Case("bsr(4, 1) + csr", (67, 53), "gelu", True, "row", CpuConfig(1, 2, 64)),
]
TOKENS = (1, 2, 16, 33, 100)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: memory that nobody wrote shows. One thread: the work is tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def make_weight(fmt: Format, shape: tuple[int, int]) -> Tensor:
    """f32[N, K] that the format holds exactly, with an empty and a full row of blocks."""
    N, K = shape
    (br, bc), w = fmt.block, torch.randn(N, K).to(fmt.codec.torch_dtype).float()
    if isinstance(fmt.level, NM):
        return w * NMPattern(fmt.level.n, fmt.level.m).topk_mask(w.abs())
    kept = torch.rand(-(-N // br), -(-K // bc)) < 0.3
    kept[0], kept[1] = False, True
    return w * kept.repeat_interleave(br, 0).repeat_interleave(bc, 1)[:N, :K]


def make(case: Case) -> tuple[LinearKernel, list[Tensor], Tensor]:
    """The kernel, its packed arguments, and the sum of its terms in float64."""
    weights = [make_weight(fmt, case.shape) for fmt in case.parsed]
    params = [a for fmt, w in zip(case.parsed, weights, strict=True) for a in fmt.pack(w).values()]
    kernel = LinearKernel(TvmBackend.of(), case.spec, case.config, case.shape)
    return kernel, params, torch.stack(weights).double().sum(0)


def wanted(case: Case, x: Tensor, w: Tensor, bias: Tensor | None, res: Tensor | None) -> Tensor:
    y = x.double() @ w.t()
    y = ACTIVATIONS[case.epilogue].fn(y if bias is None else y + bias.double())
    return y if res is None else y + res.double()


def assert_close(y: Tensor, want: Tensor, what: str = "") -> None:
    assert y.shape == want.shape and y.dtype == torch.float32
    error = (y - want).abs().max() / want.abs().max()
    assert error <= TOLERANCE, f"{what} relative error {error:.2g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    kernel, params, w = make(case)
    N, K = case.shape
    bias = torch.randn(N)
    for tokens in TOKENS:
        kernel(torch.full((tokens, K), torch.nan), params, bias, torch.zeros(tokens, N) if case.residual else None)  # poisons scratch
        x, res = torch.randn(tokens, K), torch.randn(tokens, N) if case.residual else None
        y = kernel(x, params, bias, res)
        assert_close(y, wanted(case, x, w, bias, res))
        token_minor = y.stride() == (1, token_row(tokens))
        assert token_minor if case.layout == "token" else y.is_contiguous()


def test_no_bias_and_leading_dimensions() -> None:
    for case in (CASES[1], CASES[2]):
        kernel, params, w = make(case)
        N, K = case.shape
        for lead in ((), (1, 1), (3, 5), (2, 1, 17), (3, 40)):
            x, res = torch.randn(*lead, K), torch.randn(*lead, N)
            y = kernel(x, params, None, res)
            assert_close(y, wanted(case, x, w, None, res))
            assert y.stride() == empty_output(x, N, case.layout).stride()


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3], CASES[9]], ids=str)
def test_token_minor_sequences(case: Case) -> None:
    """Sequences that another kernel wrote are read where they are; what is beyond their tokens doesn't matter."""
    kernel, params, w = make(case)
    N, K = case.shape
    bias = torch.randn(N)
    for lead in ((2, 7), (3, 16), (2, 2, 33), (2, 100)):
        x, res = (empty_output(torch.empty(*lead, 1), size, "token").copy_(torch.randn(*lead, size)) for size in (K, N))
        want = wanted(case, x, w, bias, res)
        assert_close(kernel(x, params, bias, res), want)
        assert_close(kernel(x.contiguous(), params, bias, res), want)
        assert_close(kernel(x[..., 1:, :], params, bias, res[..., 1:, :]), want[..., 1:, :])


def test_wide_coordinates() -> None:
    case = Case("csr", (5, 70000))
    kernel, params, w = make(case)
    assert case.spec.wide and params[1].dtype == torch.int32
    for tokens in (1, 3):
        x = torch.randn(tokens, 70000)
        assert_close(kernel(x, params, None, None), wanted(case, x, w, None, None))


def _inside(values: Tensor, storage: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> Tensor:
    """`values` as a view of a storage that is NaN everywhere else."""
    out = view(torch.full(storage, torch.nan))
    assert out.shape == values.shape
    return out.copy_(values)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v.clone(),
    "offset by one element": lambda v: _inside(v, (v.numel() + 1,), lambda s: s[1:].view(v.shape)),
    "transposed": lambda v: _inside(v, (v.shape[1], v.shape[0]), lambda s: s.t()),
    "token-minor, whole vectors": lambda v: _inside(v, (v.shape[1], -(-v.shape[0] // 16) * 16), lambda s: s[:, : v.shape[0]].t()),
    "token-minor, misaligned": lambda v: _inside(v, (v.shape[1], v.shape[0] // 16 * 16 + 32), lambda s: s[:, 3 : 3 + v.shape[0]].t()),
    "token-minor, later columns": lambda v: _inside(v, (v.shape[1], 128), lambda s: s[:, 16 : 16 + v.shape[0]].t()),
    "every second row": lambda v: _inside(v, (2 * v.shape[0], v.shape[1]), lambda s: s[::2]),
    "every second feature": lambda v: _inside(v, (v.shape[0], 2 * v.shape[1]), lambda s: s[:, ::2]),
    "padded rows": lambda v: _inside(v, (v.shape[0], v.shape[1] + 5), lambda s: s[:, 2:-3]),
    "strided both ways": lambda v: _inside(v, (3 * v.shape[1], 2 * v.shape[0]), lambda s: s[::3, ::2].t()),
}


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3]], ids=str)
@pytest.mark.parametrize("tokens", [1, 33, 48])
def test_any_strides_and_alignment(case: Case, tokens: int) -> None:
    kernel, params, w = make(case)
    N, K = case.shape
    bias, x, res = torch.randn(N), torch.randn(tokens, K), torch.randn(tokens, N)
    want = wanted(case, x, w, bias, res)
    for name, place in STRIDES.items():
        given_x, given_res = place(x), place(res)
        for y in (kernel(given_x, params, bias, res), kernel(x, params, bias, given_res), kernel(given_x, params, bias, given_res)):
            assert_close(y, want, name)
        assert torch.equal(given_x, x) and torch.equal(given_res, res), f"{name}: inputs are read only"


def test_expanded_and_permuted_activations() -> None:
    for case in (CASES[1], CASES[2]):
        kernel, params, w = make(case)
        N, K = case.shape
        for x in (
            torch.randn(1, K).expand(20, K),  # one token repeated
            torch.randn(20, 1).expand(20, K),  # one feature repeated
            torch.randn(5, 4, K).transpose(0, 1),  # [4, 5, K]: tokens without a common stride
            torch.randn(4, 1, K).expand(4, 5, K),
            torch.randn(K, 4, 8).permute(1, 2, 0),  # token-minor
            torch.randn(2, 3, 2 * K)[:, 1:, K:],
        ):
            res = torch.randn(N, *reversed(x.shape[:-1])).permute(*range(x.ndim - 1, -1, -1))
            assert_close(kernel(x, params, torch.ones(N), res), wanted(case, x, w, torch.ones(N), res))


@given(st.integers(2, 90), st.integers(1, 90), st.integers(1, 70), st.sampled_from(sorted(STRIDES)), st.integers(0, 2**16))
def test_any_size(N: int, K: int, tokens: int, strides: str, seed: int) -> None:
    torch.manual_seed(seed)
    case = CASES[4]  # ragged code serves whole blocks too
    fmt = case.parsed[0]
    w = make_weight(fmt, (N, K)) if N > 4 else torch.randn(N, K)
    kernel = LinearKernel(TvmBackend.of(), case.spec, case.config, (N, K))
    x, res, bias = torch.randn(tokens, K), torch.randn(tokens, N), torch.randn(N)
    y = kernel(STRIDES[strides](x), list(fmt.pack(w).values()), bias, STRIDES[strides](res))
    torch.testing.assert_close(y.double(), wanted(case, x, w.double(), bias, res), rtol=1e-5, atol=2e-5)


def test_zeros_that_are_not_stored_contribute_nothing() -> None:
    for case in (CASES[1], CASES[3]):
        fmt, (N, K) = case.parsed[0], case.shape
        w = make_weight(fmt, case.shape)
        w[:, 7] = 0
        kernel, bias = LinearKernel(TvmBackend.of(), case.spec, case.config, case.shape), torch.randn(N)
        for tokens in (1, 20):
            x, res = torch.randn(tokens, K), torch.randn(tokens, N)
            x[:, 7] = torch.inf
            y = kernel(x, list(fmt.pack(w).values()), bias, res)
            x[:, 7] = 0
            assert_close(y, wanted(case, x, w.double(), bias, res))


def test_all_zero_weight_gives_the_bias() -> None:
    case = CASES[2]
    kernel, bias = LinearKernel(TvmBackend.of(), case.spec, case.config, case.shape), torch.randn(70)
    params = list(case.parsed[0].pack(torch.zeros(70, 64)).values())
    for tokens in (1, 17):
        res = torch.randn(tokens, 70)
        want = wanted(case, torch.zeros(tokens, 64), torch.zeros(70, 64).double(), bias, res)
        assert_close(kernel(torch.randn(tokens, 64), params, bias, res), want)


def test_refusals() -> None:
    backend = TvmBackend.of()
    assert "larger than 64" in (backend.refuses(KernelSpec((parse_format("bsr(65, 1)"),))) or "")
    assert "larger than 64" in (backend.refuses(KernelSpec((parse_format("bsr(1, 128)"),))) or "")
    assert backend.refuses(KernelSpec(())) is not None
    assert all(backend.refuses(case.spec) is None for case in CASES)


def test_spec_as_text() -> None:
    assert str(CASES[-1].spec) == "linear(bsr(4, 1) + csr) gelu +residual -> row, many, ragged"
    assert str(KernelSpec((parse_format("csr"),), regime="one", wide=True)) == "linear(csr) -> row, one, wide"
