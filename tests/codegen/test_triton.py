"""The GPU backend without a GPU: what it refuses, what it compiles to, what its device table says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from sparsecc.codegen.config import from_text, to_text
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.compiler import header
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.devices import device_of, devices, own_device
from sparsecc.codegen.triton.linear import CSR, families, pointers, signature
from sparsecc.errors import TargetError
from sparsecc.formats import parse_format

TARGETS = ("cuda:sm_80", "cuda:sm_90", "hip:gfx942")
H100 = TritonBackend(device_of("cuda:sm_90"))

FAMILIES = (
    "bsr(128, 128)", "bsr(64, 64)", "bsr(16, 16)", "packed_nm(2, 4)", "packed_nm(1, 4)", "packed_nm(4, 8)", "bitmap(64).panels(64)",
    "bitmap(16).block(4, 1).panels(32)", "csr", "bsr(4, 1)", "bsr(1, 16)",
)


def spec(text: str, dtype: str = "bf16", **fields: object) -> KernelSpec:
    raw = parse_format("csr." + (dtype if dtype in ("f16", "bf16") else "f32")).codec
    terms = tuple(replace(parse_format(part), codec=raw) for part in text.split(" + "))
    return KernelSpec(terms, dtype=dtype, **fields)  # type: ignore[arg-type]


def narrow_products(ttir: str) -> list[str]:
    """Pointers offset by 32-bit products of a size or a position: with over 2^31 elements such an offset wraps around. Not those into
    `ptr`, which has one entry for a row or a window of many elements."""
    lines = re.finditer(r"(%\w+) = ([\w.]+) (.*?) : (.*)", ttir)
    made = {line[1]: (line[2], re.findall(r"%[\w#]+", line[3]), line[4]) for line in lines}
    constants = {name for name, (op, _, _) in made.items() if op == "arith.constant"}

    def multiplies(name: str, seen: frozenset[str] = frozenset()) -> bool:
        op, given, kind = made.get(name, ("", [], ""))
        if not op or name in seen or op in ("tt.load", "arith.extsi"):  # an extension is where 64 bits begin
            return False
        known = [one for one in given if one in constants or made.get(one, ("", [""], ""))[1][:1] in [[c] for c in constants]]
        if op == "arith.muli" and not known and "i64" not in kind:
            return True
        return any(multiplies(one, seen | {name}) for one in given)

    added = {name: given for name, (op, given, _) in made.items() if op == "tt.addptr" and not given[0].startswith("%ptr")}
    return [name for name, given in added.items() if multiplies(given[1])]


def test_the_check_of_offsets_finds_narrow_ones() -> None:
    wrong = """
    %rows = arith.muli %row, %K : i32
    %at = arith.addi %rows, %k : i32
    %p = tt.addptr %val, %at : !tt.ptr<f16>, i32
    """
    assert narrow_products(wrong) == ["%p"]
    wide = """
    %wide = arith.extsi %row : i32 to i64
    %rows = arith.muli %wide, %K64 : i64
    %p = tt.addptr %val, %rows : !tt.ptr<f16>, i64
    """
    assert narrow_products(wide) == []


@pytest.mark.parametrize(("target", "text"), [
    (target, text) for i, target in enumerate(TARGETS) for j, text in enumerate(FAMILIES) if target == "cuda:sm_90" or (i + j) % 3 == 0
])
def test_compiles_without_the_device(text: str, target: str) -> None:
    backend = TritonBackend(device_of(target))
    regime = ("many", "few", "one")[FAMILIES.index(text) % 3] if target == "cuda:sm_80" else "many"
    one = spec(text, epilogue="gelu", residual=True, regime=regime)
    made = backend.binary(one, backend.space(one)[0])
    assert made.spills == 0 and made.shared <= backend.device.shared and 0 < made.registers <= 512
    assert 0 < made.occupancy <= 1
    if families(one)[0] is not CSR and regime != "one":
        assert {"cuda:sm_80": "mma.sync", "cuda:sm_90": "mma", "hip:gfx942": "v_mfma"}[target] in made.matrix
    assert not narrow_products(made.asm["ttir"])
    if target == "cuda:sm_90" and "64" in text and regime == "many":
        assert made.matrix.startswith("wgmma")


def test_every_family_has_configurations_that_fit_the_smallest_memory() -> None:
    backend = TritonBackend(device_of("hip:gfx942"))
    for text in FAMILIES:
        for regime in ("many", "few", "one"):
            for dtype in ("f32", "tf32", "f16", "bf16"):
                assert backend.space(spec(text, dtype, regime=regime)), (text, regime, dtype)


@pytest.mark.parametrize(
    ("text", "dtype", "fields", "reason"),
    [
        ("bsr(48, 48)", "bf16", {}, "sides of 16, 32, 64, 128"),
        ("bitmap", "bf16", {}, "bitmap(64) has"),
        ("bitmap(64)", "bf16", {}, "panels(64)"),
        ("bitmap(16).block(4, 4).panels(32)", "bf16", {}, "at most 8 entries"),
        ("sell(4, 64)", "bf16", {}, "a CPU's storage"),
        ("packed_nm(4, 16).panels(64)", "f16", {}, "in order"),
        ("bsr(8, 8)", "f32", {}, "at most 16 entries"),
        ("bsr(16, 16) + bsr(64, 64)", "bf16", {}, "terms with tiles of 16 and 64 rows"),
        ("csr", "f16", {"layout": "token"}, "features consecutive"),
    ],
)
def test_refuses(text: str, dtype: str, fields: dict, reason: str) -> None:
    assert reason in str(H100.refuses(spec(text, dtype, **fields)))


def test_refuses_values_of_another_dtype_than_the_activations() -> None:
    assert "store them alike" in str(H100.refuses(KernelSpec((parse_format("csr.bf16"),), dtype="f16")))
    assert H100.refuses(KernelSpec((parse_format("csr.bf16"),), dtype="f32")) is None  # widened: exact


def test_cpu_formats_and_gpu_formats_are_told_apart() -> None:
    from sparsecc.codegen.tvm.backend import TvmBackend

    for text in ("packed_nm(2, 4)", "bitmap(64)"):
        assert "a GPU's storage" in str(TvmBackend.of().refuses(KernelSpec((parse_format(text),))))


def test_text_says_what_it_was_compiled_with() -> None:
    one = spec("packed_nm(2, 4) + csr", regime="few", residual=True)
    config = H100.space(one)[0]
    found, arguments = header(H100.source(one, replace(config, split=2)))
    assert found == replace(config, split=2)
    assert arguments == signature(one, replace(config, split=2))
    assert list(arguments)[: len(pointers(one, True))] == list(pointers(one, True))
    assert arguments["N"] == "i32 % 16" and header(H100.source(replace(one, ragged=True), config))[1]["N"] == "i32"


def test_configuration_round_trips() -> None:
    assert from_text(to_text(GpuConfig(split=4)), GpuConfig) == GpuConfig(split=4)


def test_device_table() -> None:
    assert {"cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942"} <= set(devices())
    for device in devices().values():
        assert device.shared <= device.shared_total and device.flops["f16"] > device.flops["f32"] > 1e12 and device.bandwidth > 1e11
    h100 = devices()["cuda:sm_90"]
    assert h100.occupancy(4, 32, 0) == 1.0 and h100.occupancy(4, 255, 0) == pytest.approx(8 / 64)
    assert h100.occupancy(8, 64, 200 << 10) == pytest.approx(8 / 64)


def test_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(TargetError, match="cuda:sm_90"):
        device_of("cuda:sm_12")


def test_no_gpu_says_what_is_missing_and_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TargetError, match=r"needs a GPU.*'hip:gfx942'.*TRITON_INTERPRET"):
        own_device()
