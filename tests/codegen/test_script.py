"""Kernels' text read by our reader is what TVM's parser makes of it, and the passes that are left out change no object file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsecc.codegen.tvm.backend import IDLE
from sparsecc.codegen.tvm.host import host_isa

GOLDEN = Path(__file__).parents[1] / "golden"
KERNELS = sorted(file.stem for file in GOLDEN.glob("*.py") if not file.stem.startswith("triton"))
SOME = ("append_rows", "rotary", "spmm_two_terms_ragged", "attention_rows_masked")
HEAD = """@T.prim_func(s_tir=True)
def f(x_h: T.handle("float32"), N: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "f"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
"""
SYNTAX = """    T.attr(T.int32(0), "device_id", 0)
    for i in T.parallel(N):
        left = T.alloc_buffer((1,), "int64", scope="global")
        left[0] = -i + 3
        at: T.let = i * 2 % 7
        while left[0] != 0:
            left[0] = left[0] - 1
            if (at >= 0) and (at < N) and (at + i <= N):
                at: T.let = left[0] << T.int64(1)
                x[at] = T.Select(x[at] > T.float32(0), x[at] / T.float32(2), T.float32("-inf"))
            else:
                for k in range(1, at):
                    x[T.ramp(k, 1, 4)] = T.broadcast(T.Cast("float32", k == 2), 4)
        x[at] = T.if_then_else((i == 0) or (at == 1), T.float32(1.0), x[i])
    T.evaluate(T.call_extern("int32", "g", T.address_of(x[N])))
"""
"""Everything that the reader knows, and a name that is bound again in a block, which ends with it."""


def parsed(source: str) -> Any:
    """What TVM's own parser makes of it."""
    from tvm.script import from_source
    from tvm.script import tirx as T

    return from_source(source, extra_vars={"T": T})


def assert_read_alike(source: str) -> None:
    from tvm.ir import assert_structural_equal

    from sparsecc.codegen.tvm.script import read

    found, expected = read(source), parsed(source)
    assert_structural_equal(found, expected)
    assert found.script() == expected.script(), "names"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in KERNELS])
def test_kernels_read_as_by_tvm(name: str) -> None:
    assert_read_alike((GOLDEN / f"{name}.py").read_text())


def test_the_whole_syntax_reads_as_by_tvm() -> None:
    assert_read_alike(HEAD + SYNTAX)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x[0] = y[0]", "y is not defined"),
        ("x[0] += T.float32(1)", "AugAssign"),
        ("a = b = T.alloc_buffer((1,))", "Assign"),
        ("a = N + 1", "Assign"),
        ("a: T.int64 = N", "AnnAssign"),
        ("if N > 0:\n        y: T.let = N + 1\n    x[y] = x[0]", "y is not defined"),
        ("for i, j in T.grid(2, 3):\n        x[i] = x[j]", "For"),
        ("x[0] = x[0] if N > 0 else x[1]", "IfExp"),
        ("x[0] = T.Cast('float32', 0 < N < 3)", "Compare"),
        ("x[~N] = x[0]", "UnaryOp"),
        ("x[N**2] = x[0]", "BinOp"),
    ],
)
def test_the_rest_is_refused(text: str, said: str) -> None:
    from sparsecc.codegen.tvm.script import read

    with pytest.raises(SyntaxError, match=said):
        read(f"{HEAD}    {text}\n")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in KERNELS])
def test_passes_that_are_left_out_change_no_object(name: str, tmp_path: Path) -> None:
    import tvm

    from sparsecc.codegen.tvm.script import read

    function, objects = read((GOLDEN / f"{name}.py").read_text()), []
    for left_out in ([], IDLE):
        with tvm.transform.PassContext(disabled_pass=left_out):
            built: Any = tvm.compile(function, target=host_isa().target())
        file = tmp_path / "kernel.o"
        getattr(built, "mod", built).write_to_file(str(file), "o")
        objects.append(file.read_bytes())
    assert objects[0] == objects[1]
