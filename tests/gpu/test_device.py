"""On a real GPU: kernels against float64, whole models captured as graphs, streams, several devices, odd inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import sparsecc
from sparsecc.codegen.kernel import ActivationType
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.devices import own_device
from sparsecc.codegen.triton.facts import spec_of
from sparsecc.codegen.verify import DTYPES, Case, verify
from sparsecc.formats import parse_format
from sparsecc.runtime.gpu import GpuLinear

pytestmark = pytest.mark.gpu

FORMATS = (
    "bsr(16, 16)", "bsr(64, 64)", "bsr(128, 128)", "packed_nm(2, 4)", "packed_nm(1, 4)", "packed_nm(4, 8)", "bitmap(64).panels(64)",
    "bitmap(16).block(4, 1).panels(32)", "csr", "bsr(4, 1)", "bsr(1, 16)", "nm(3, 5)", "packed_nm(2, 4) + csr",
)


@pytest.mark.parametrize("dtype", ["f32", "tf32", "f16", "bf16"])
@pytest.mark.parametrize("text", FORMATS)
def test_every_configuration_is_right(text: str, dtype: ActivationType) -> None:
    backend = TritonBackend(own_device())
    raw = parse_format("csr." + (dtype if dtype in ("f16", "bf16") else "f32")).codec
    terms = tuple(replace(parse_format(part), codec=raw) for part in text.split(" + "))
    for M, N, K in ((1, 256, 512), (7, 130, 300), (200, 256, 512), (130, 70, 96)):
        spec = replace(spec_of(terms, "gelu", True, (N, K), DTYPES[dtype], M), dtype=dtype)
        for seed, config in enumerate(backend.space(spec)):
            case = Case(terms, M, N, K, dtype, "gelu", True, True, seed=seed)
            assert verify(case, GpuLinear(backend, spec, config, (N, K)), "cuda") is None, f"{case} {config}"


def stack(pattern: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).eval()
    sparsecc.prune(model, pattern)
    return model.cuda().half()


@pytest.mark.parametrize("pattern", ["2:4", "block(64, 64, 0.9)", "unstructured(0.9)"])
@pytest.mark.parametrize("shapes", [None, "auto"])
def test_model(pattern: str, shapes: str | None) -> None:
    model = stack(pattern)
    x = torch.randn(8, 512, device="cuda", dtype=torch.half)
    compiled = sparsecc.compile(model, target="cuda", sparsity=pattern, example_inputs=(x,), dynamic_shapes=shapes)
    for _ in range(3):  # captured, then replayed, with other inputs each time
        x = torch.randn(8, 512, device="cuda", dtype=torch.half)
        kept = compiled(x)
        assert torch.allclose(kept.float(), model(x).float(), atol=2e-2)
        compiled(torch.zeros_like(x))
        assert torch.allclose(kept.float(), model(x).float(), atol=2e-2), "a later call wrote into an earlier result"


def test_streams_do_not_share_scratch() -> None:
    model = stack("2:4")
    x = torch.randn(1, 512, device="cuda", dtype=torch.half)
    compiled = sparsecc.compile(model, target="cuda", example_inputs=(x,), dynamic_shapes=None)
    wanted, streams, results = model(x), [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for stream in streams * 20:
        with torch.cuda.stream(stream):
            results.append(compiled(x))
    torch.cuda.synchronize()
    assert all(torch.allclose(result, wanted, atol=2e-2) for result in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    model = stack("2:4").to("cuda:1")
    x = torch.randn(3, 512, device="cuda:1", dtype=torch.half)
    assert torch.allclose(sparsecc.compile(model, target="cuda")(x), model(x), atol=2e-2)


def test_weight_and_input_on_other_devices() -> None:
    compiled = sparsecc.compile(stack("2:4"), target="cuda")
    with pytest.raises(sparsecc.SparseccError, match="cpu"):
        compiled(torch.randn(3, 512, dtype=torch.half))
