"""CompiledModule: state, shapes, threads, what it refuses, and the dense remainder with and without a C++ compiler."""
from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

import sparsecc
from sparsecc.runtime import remainder
from sparsecc.runtime.module import VARIANTS

PATTERN = "block(4, 1, 0.9)"


def mlp(seed: int = 0) -> nn.Sequential:
    """256 -> 512 -> 256, 4x1 blocks at 90 %: large enough that every estimate prefers sparse code."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval().requires_grad_(False)
    sparsecc.prune(model, PATTERN)
    return model


def compiled(model: Any, **options: Any) -> sparsecc.CompiledModule:
    return sparsecc.compile(model, **{"autotune": "none", "remainder": "eager", **options})


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * max(float(want.abs().max()) if want.numel() else 0.0, 1e-3))


def sparse_regions(module: sparsecc.CompiledModule) -> int:
    return module.explain().to_dict()["totals"]["sparse"]


def test_any_leading_shape_stride_and_alignment() -> None:
    model = mlp()
    module = compiled(model)
    big = torch.randn(64, 3, 257)
    for x in (big[:40, 0, :256], big[:40, :, 1:], big[::2, 1, :256], torch.randn(256, 48).t(), torch.randn(2, 5, 7, 256), torch.randn(256)):
        same(module(x), model(x))
    assert sparse_regions(module) == 2
    with torch.inference_mode():
        same(module(big[:8, 0, 1:]), model(big[:8, 0, 1:]))


def test_new_sizes_run_and_new_forms_are_captured() -> None:
    model = mlp()
    module = compiled(model)
    for rows in (16, 2, 33, 128):
        same(module(torch.ones(rows, 256)), model(torch.ones(rows, 256)))
    assert len(module.graphs) == 1
    for shape in ((1, 256), (0, 256), (2, 3, 256)):
        x = torch.randn(shape)
        same(module(x), model(x))
    assert len(module.graphs) > 1


def test_example_inputs_fix_the_range() -> None:
    model, x = mlp(), torch.randn(16, 256)
    for example in (x, (x,), [x], {"input": x}):
        assert len(compiled(model, example_inputs=example).graphs) == 1
    module = compiled(model, example_inputs=x, dynamic_shapes=None)
    same(module(x), model(x))
    with pytest.raises(sparsecc.ShapeError, match="size 17, captured as exactly 16"):
        module(torch.randn(17, 256))
    with pytest.raises(sparsecc.ShapeError, match="captured with 2"):
        compiled(model, example_inputs=x)(torch.randn(3, 4, 256))
    rows = torch.export.Dim("rows", min=2, max=32)
    bounded = compiled(model, example_inputs=x, dynamic_shapes=({0: rows},))
    same(bounded(x[:4]), model(x[:4]))
    with pytest.raises(sparsecc.ShapeError, match="outside the captured range"):
        bounded(torch.randn(33, 256))


def test_captures_do_not_pile_up() -> None:
    module = compiled(mlp(), dynamic_shapes=None, target="reference")
    for rows in range(2, 2 + VARIANTS):
        module(torch.randn(rows, 256))
    with pytest.raises(sparsecc.ShapeError, match=f"{VARIANTS} captures are kept at most: give example_inputs"):
        module(torch.randn(99, 256))


def test_state_is_the_models() -> None:
    model, other, x = mlp(), mlp(1), torch.randn(8, 256)
    for options in ({}, {"example_inputs": x}):
        module = compiled(model, **options)
        same(module(x), model(x))
        assert list(module.state_dict()) == list(model.state_dict())
        assert all(a is b for a, b in zip(module.parameters(), model.parameters(), strict=True))
        module.load_state_dict(other.state_dict())
        same(module(x), other(x))
        assert sparse_regions(module) == 2
        module.load_state_dict(mlp().state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})
    with pytest.raises(sparsecc.ShapeError):
        module(torch.randn(3, 3, 256))


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_the_models_dtype_may_change_afterwards(remainder: str) -> None:
    """What was captured keeps its weights, the dense ones too."""
    model, x = nn.Sequential(mlp(), nn.Linear(256, 24)).eval(), torch.randn(3, 256)
    with torch.no_grad():
        wanted, module = model(x), compiled(model, example_inputs=x, remainder=remainder)
        same(module(x), wanted)
        model.double()
        same(module(x), wanted)


def test_modes_attributes_and_copies() -> None:
    model = mlp()
    model.note = "kept"  # type: ignore[assignment]
    module = compiled(model)
    assert not module.training
    assert module.eval() is module
    assert module.note == "kept"
    with pytest.raises(sparsecc.CaptureError, match="nothing is compiled yet"):
        module.explain()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense
    with pytest.raises(sparsecc.CaptureError, match="for inference: train the model"):
        module.train()
    for do in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(sparsecc.CaptureError, match="cannot be pickled or copied: save the model"):
            do(module)
    assert module.to("cpu").float() is module
    for move in (lambda: module.half(), lambda: module.to("meta"), lambda: module.double()):
        with pytest.raises(sparsecc.TargetError, match="cannot be moved or cast"):
            move()


def test_history_as_text() -> None:
    module = compiled(mlp())
    module(torch.randn(16, 256))
    assert [line.split()[1] for line in module.ir().splitlines()][:5] == ["capture", "canonicalize", "masks", "reorder", "select"]
    assert "% block(4, 1)" in module.ir("select")
    with pytest.raises(sparsecc.SpecError, match="did you mean 'layout'"):
        module.ir("layuot")


def test_concurrent_calls() -> None:
    model = mlp()
    module, right = compiled(model), []
    # torch.export cannot share the process with calls of other nn.Modules: what is wanted is computed before.
    cases = {rows: [(x := torch.randn(rows + i % 3, 256), model(x)) for i in range(20)] for rows in (1, 2, 16, 40)}

    def work(rows: int) -> None:
        for x, want in cases[rows]:
            right.append(torch.allclose(module(x), want, atol=1e-5))

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 2, 16, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 80
    assert len(module.graphs) == 2  # one row is a form of its own


def test_exported_program() -> None:
    model, x = mlp(), torch.randn(8, 256)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
    module = compiled(exported, sparsity=PATTERN)
    same(module(x), model(x))
    same(module(x[:3]), model(x[:3]))
    assert sparse_regions(module) == 2
    assert list(module.state_dict()) == list(model.state_dict())
    with pytest.raises(sparsecc.ShapeError):
        module(torch.randn(65, 256))
    with pytest.raises(sparsecc.CaptureError, match="weights are fixed"):
        module.load_state_dict(model.state_dict())


def test_remainder_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(program: Any) -> Any:
        raise AssertionError("Inductor was asked")

    monkeypatch.setattr(remainder, "has_compiler", lambda: False)
    monkeypatch.setattr(remainder, "_inductor", refuse)
    model, x = mlp(), torch.randn(8, 256)
    same(compiled(model, remainder="auto")(x), model(x))


def test_remainder_that_inductor_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(remainder, "has_compiler", lambda: True)
    monkeypatch.setattr(remainder, "_inductor", fail)
    model, x = mlp(), torch.randn(8, 256)
    with pytest.warns(UserWarning, match="Inductor cannot compile the dense remainder"):
        same(compiled(model, remainder="auto")(x), model(x))
    with pytest.raises(RuntimeError, match="no such thing"):
        compiled(model, remainder="inductor")(x)


@pytest.mark.skipif(not remainder.has_compiler(), reason="no C++ compiler")
def test_inductor_fuses_the_rest() -> None:
    model, x = nn.Sequential(*mlp(), nn.LayerNorm(256), nn.Softmax(-1)).eval().requires_grad_(False), torch.randn(8, 256)
    module = compiled(model, remainder="inductor")
    same(module(x), model(x))
    same(module(x[:5]), model(x[:5]))
