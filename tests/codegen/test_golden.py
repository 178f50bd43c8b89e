"""Kernel sources, line by line: what a change to the generators does to them shows in the diff of tests/golden.

After a change that is meant, run with UPDATE_GOLDENS=1 and read the diff.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.linear import linear_source
from sparsecc.codegen.tvm.attention import AttentionSpec, attention_source
from sparsecc.codegen.tvm.attention_rows import attention_rows_source
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.codegen.tvm.host import Isa
from sparsecc.codegen.tvm.pointwise import mask_tiles_source, rotary_source
from sparsecc.codegen.tvm.rows import append_source, norm_rows_source
from sparsecc.codegen.tvm.tiles import pack_rows_source
from sparsecc.formats import parse_format

FOLDER = Path(__file__).parents[1] / "golden"
BACKEND = TvmBackend(Isa("golden", lanes=4, registers=8, mcpu="x86-64"))  # of no machine: equal everywhere


WIDE = TvmBackend(Isa("golden wide", lanes=16, registers=24, mcpu="x86-64", features=("+avx512f", "+avx512vbmi2")))


def source(text: str, config: CpuConfig, backend: TvmBackend = BACKEND, **fields: object) -> str:
    formats = tuple(parse_format(part) for part in text.split(" + "))
    return backend.source(KernelSpec(formats, **fields), config)  # type: ignore[arg-type]


def triton(text: str, config: GpuConfig, **fields: object) -> str:
    return linear_source(KernelSpec(tuple(parse_format(part) for part in text.split(" + ")), **fields), config)  # type: ignore[arg-type]


GOLDENS = {
    "spmm_bsr_4_1": source("bsr(4, 1)", CpuConfig(1, 1)),
    "spmm_nm_gelu_residual_token": source("nm(2, 4)", CpuConfig(1, 1), epilogue="gelu", residual=True, layout="token"),
    "spmm_two_terms_ragged": source("bsr(2, 1) + csr.bf16", CpuConfig(1, 1), ragged=True),
    "half_tiles": source("shared(16, 32).bf16", CpuConfig(4, 1, 64, dot="amx"), layout="token", residual=True),
    "half_pairs": source("shared(2, 2).bf16", CpuConfig(4, 1, 64, dot="dpbf16"), layout="token"),
    "spmv_csr_silu": source("csr", CpuConfig(1, streams=2), epilogue="silu", regime="one"),
    "spmv_bitmap_few_bf16": source("bitmap.bf16", CpuConfig(2, streams=2), backend=WIDE, residual=True, regime="few", dtype="bf16"),
    "spmv_bitmap_panels": source("bitmap.block(4, 1).panels(32)", CpuConfig(1, 4), regime="one"),
    "pack_rows": pack_rows_source(2),
    "triton_bsr_gelu_residual": triton("bsr(64, 64).bf16", GpuConfig(), epilogue="gelu", residual=True, dtype="bf16"),
    "triton_bsr_few_split": triton("bsr(64, 64).bf16", GpuConfig(bm=16, split=4), regime="few", dtype="bf16"),
    "triton_nm_one": triton("packed_nm(2, 4).f16", GpuConfig(bn=16, bk=256, stages=1), regime="one", dtype="f16"),
    "triton_bitmap": triton("bitmap(64).f16.panels(64)", GpuConfig(), dtype="f16", ragged=True, tail=True),
    "triton_csr_blocks": triton("bsr(4, 1)", GpuConfig(bm=64, bn=16, stages=1)),
    "triton_nm_and_csr": triton("packed_nm(2, 4).f16 + csr.f16", GpuConfig(bm=16, bn=16), regime="few", dtype="f16"),
    "attention_causal": attention_source(AttentionSpec(8, "causal"), 1, 2),
    "attention_masked": attention_source(AttentionSpec(6, "rows"), 1, 2),
    "mask_tiles": mask_tiles_source(True, 2),
    "rotary": rotary_source(1, 2),
    "norm_rows_bf16": norm_rows_source("rms", "bf16", 4),
    "append_rows": append_source("f32", 4),
    "attention_rows_masked": attention_rows_source(6, "mask", "f32", 4),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_source(name: str) -> None:
    file, text = FOLDER / f"{name}.py", GOLDENS[name]
    if os.environ.get("UPDATE_GOLDENS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.exists(), f"no golden {file.name}: run with UPDATE_GOLDENS=1"
    changes = difflib.unified_diff(file.read_text().splitlines(), text.splitlines(), file.name, "now", lineterm="")
    assert not (diff := "\n".join(changes)), f"kernel source changed; if meant, run with UPDATE_GOLDENS=1\n{diff}"


def test_no_golden_is_left_over() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == set(GOLDENS)


def test_source_is_a_pure_function() -> None:
    spec = KernelSpec((parse_format("bsr(4, 1)"),), "gelu", True)
    assert BACKEND.source(spec, CpuConfig()) == BACKEND.source(spec, CpuConfig())
