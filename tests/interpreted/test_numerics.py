"""GPU kernels in Triton's interpreter against float64: random cases over formats, shapes, dtypes, masks and configurations.

Triton reads TRITON_INTERPRET when it is imported, so these run in a process of their own, started by tests/codegen/test_interpreter.py.
SPARSECC_CASES=n changes how many there are.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch

from sparsecc.codegen.kernel import ActivationType
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.devices import device_of
from sparsecc.codegen.triton.facts import spec_of
from sparsecc.codegen.verify import DTYPES, MASKS, Case, verify
from sparsecc.formats import parse_format
from sparsecc.runtime.gpu import GpuLinear

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start of the process")

BACKEND = TritonBackend(device_of("cuda:sm_90"))
CASES = int(os.environ.get("SPARSECC_CASES", "320"))
FORMATS = (
    "bsr(16, 16)", "bsr(32, 16)", "bsr(16, 64)", "bsr(64, 64)", "packed_nm(2, 4)", "packed_nm(1, 4)", "packed_nm(4, 8)", "packed_nm(1, 2)",
    "packed_nm(2, 8)", "packed_nm(4, 16)", "bitmap(16).panels(32)", "bitmap(64).panels(64)", "bitmap(16).block(4, 1).panels(32)",
    "bitmap(16).block(2, 2).panels(64)", "bitmap(32).block(1, 4).panels(32)", "csr", "bsr(4, 1)", "bsr(1, 16)", "nm(2, 4)", "nm(3, 5)",
    "dense",
    "packed_nm(2, 4) + csr", "bsr(16, 16) + csr", "bitmap(16).panels(32) + bsr(16, 16)",
)


def formats(text: str, codec: str) -> tuple:
    """The formats of a sum, with values in `codec`."""
    found = (parse_format(part) for part in text.split(" + "))
    raw = parse_format(f"csr.{codec}").codec
    return tuple(replace(fmt, codec=raw) for fmt in found)


def draw(seed: int) -> tuple[Case, GpuConfig]:
    """A case that a kernel takes, and one of its configurations, cut down to what an interpreter can run."""
    r = random.Random(seed)
    dtype: ActivationType = r.choice(("f32", "tf32", "f16", "bf16"))
    terms = formats(FORMATS[seed % len(FORMATS)], dtype if dtype in ("f16", "bf16") else r.choice(("f32", "f32", "bf16")))
    case = Case(
        terms, M=r.choice((1, 1, 2, 5, 16, 17)), N=r.choice((1, 9, 20, 33)), K=r.choice((1, 5, 32, 48, 70)), dtype=dtype,
        epilogue=r.choice(("", "", "relu", "gelu", "gelu_tanh", "silu")), bias=r.random() < 0.7, residual=r.random() < 0.4,
        mask=r.choice(MASKS), density=r.choice((0.1, 0.3, 0.6)), seed=seed,
    )
    spec = spec_of(case.formats, case.epilogue, case.residual, (case.N, case.K), DTYPES[dtype], case.M)
    small = [c for c in BACKEND.space(spec) if c.split <= 4 and c.bm <= 64] or BACKEND.space(spec)[:1]
    return case, r.choice(small if seed % 8 == 0 else small[:2])


@pytest.mark.parametrize("seed", range(CASES))
def test_random_case(seed: int) -> None:
    case, config = draw(seed)
    spec = spec_of(case.formats, case.epilogue, case.residual, (case.N, case.K), DTYPES[case.dtype], case.M)
    spec = replace(spec, dtype=case.dtype)
    assert BACKEND.refuses(spec) is None
    kernel = GpuLinear(BACKEND, spec, config, (case.N, case.K))
    wrong = verify(case, kernel, again=config.split > 1)  # counters of finished parts have to be left as they were
    assert wrong is None, f"{case}, {config}: {wrong}"


def test_the_harness_catches_a_kernel_that_skips_a_row() -> None:
    case = Case(formats("csr", "f32"), M=3, N=8, K=32)
    spec = spec_of(case.formats, "", False, (8, 32), torch.float32, 3)
    kernel = GpuLinear(BACKEND, spec, BACKEND.space(spec)[0], (8, 32))

    def skips(x, params, bias, residual):
        y = kernel(x, params, bias, residual)
        y[2] = 0
        return y

    assert "wanted" in str(verify(case, skips))
    assert verify(case, kernel) is None


@pytest.mark.parametrize("tokens", [1, 7])
def test_strides_and_alignment(tokens: int) -> None:
    fmt = parse_format("packed_nm(2, 4)")
    w = torch.randn(20, 64) * torch.tensor([1, 0, 0, 1]).repeat(16)
    spec = spec_of((fmt,), "", True, (20, 64), torch.float32, tokens)
    kernel = GpuLinear(BACKEND, spec, BACKEND.space(spec)[0], (20, 64))
    params = list(fmt.pack(w).values())
    base, res = torch.randn(tokens + 1, 2 * 64 + 3), torch.randn(20)
    views = (base[1:, 1:65], base[:tokens, :128:2], base[0, :64].expand(tokens, 64), torch.randn(64, tokens).T, base[1:, :64].unsqueeze(1))
    for x in views:
        wanted = torch.nn.functional.linear(x, w) + res
        assert torch.allclose(kernel(x, params, None, res.expand(*x.shape[:-1], 20)), wanted, atol=1e-4)


def test_no_tokens() -> None:
    fmt = parse_format("csr")
    spec = spec_of((fmt,), "", False, (20, 64), torch.float32, 4)
    kernel = GpuLinear(BACKEND, spec, BACKEND.space(spec)[0], (20, 64))
    assert kernel(torch.randn(2, 0, 64), list(fmt.pack(torch.randn(20, 64)).values()), None, None).shape == (2, 0, 20)
