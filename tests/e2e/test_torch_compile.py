"""torch.compile(model, backend="sparsecc"): results, names, changed weights, and errors that say what is wrong."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import sparsecc
from sparsecc.compile import Options, build
from sparsecc.dynamo import Frozen
from sparsecc.ir.program import Program

PATTERN = "block(4, 1, 0.9)"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


class Block(nn.Module):
    def __init__(this) -> None:  # Dynamo's sources hold the variable's name
        super().__init__()
        this.up, this.down, this.dropout = nn.Linear(256, 512), nn.Linear(512, 256), nn.Dropout(0.5)

    def forward(this, x: torch.Tensor) -> torch.Tensor:
        return x + this.dropout(this.down(nn.functional.gelu(this.up(x))))


def block() -> Block:
    torch.manual_seed(0)
    model = Block().eval().requires_grad_(False)
    sparsecc.prune(model, PATTERN)
    return model


def through(model: Any, sparsity: Any = PATTERN, **options: Any) -> Any:
    return torch.compile(model, backend="sparsecc", options={"sparsity": sparsity, "autotune": "none", "remainder": "eager", **options})


def test_results_at_several_sizes() -> None:
    model = block()
    compiled = through(model, {"up": PATTERN, "down": PATTERN})
    for shape in ((16, 256), (5, 256), (1, 256), (2, 3, 256)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)


def test_inside_a_function() -> None:
    model, x = block(), torch.randn(4, 256)
    compiled = through(lambda x: model(x) * 2, {"up": PATTERN})
    torch.testing.assert_close(compiled(x), model(x) * 2, rtol=0, atol=1e-5)


def test_two_models_in_a_function() -> None:
    encoder, decoder, x = block(), block(), torch.randn(4, 256)

    def both(first: nn.Module, second: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return second(first(x))

    compiled = through(both, {"first.up": PATTERN, "second.down": PATTERN})
    torch.testing.assert_close(compiled(encoder, decoder, x), decoder(encoder(x)), rtol=0, atol=1e-5)


def test_changed_weights_are_seen() -> None:
    model, x = block(), torch.randn(4, 256)
    compiled = through(model)
    compiled(x)
    with torch.no_grad():
        model.up.weight.mul_(2)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)


def test_errors() -> None:
    x = torch.randn(4, 256)
    with pytest.raises(sparsecc.PatternViolation, match=r"up\.weight must be nm\(2, 4\), but row"):
        through(block(), "2:4")(x)
    with pytest.raises(sparsecc.SpecError, match="'upp' matches no linear weight; closest: up"):
        through(block(), {"upp": PATTERN})(x)
    with pytest.raises(sparsecc.SpecError, match="there is no option 'tunes'"):
        through(block(), tunes="quick")(x)
    with pytest.raises(sparsecc.CaptureError, match=r"train mode \(dropout\): call model\.eval\(\)"):
        through(block().train())(x)


def test_globs_across_a_graph_break() -> None:
    """Each part holds some of the linears: a glob for the others is no error, only said."""
    model, x = block(), torch.randn(4, 256)

    def parts(x: torch.Tensor) -> torch.Tensor:
        y = model.up(x)
        torch._dynamo.graph_break()
        return model.down(y)

    with pytest.warns(UserWarning, match="in this part of the model"):
        torch.testing.assert_close(through(parts, {"up": PATTERN, "down": PATTERN})(x), model.down(model.up(x)), rtol=0, atol=1e-5)


def test_what_cannot_be_looked_at_whole_is_said() -> None:
    """torch.cond keeps Dynamo's own ops; the linears around it are packed all the same."""
    up, built = block().up, []

    def branching(x: torch.Tensor) -> torch.Tensor:
        y = up(x)
        return torch.cond(y.sum() > 0, lambda v: v.relu(), lambda v: -v, (y,))

    def keep(program: Program, inputs: Any) -> Any:
        built.append(build(program, inputs, Options(sparsity=PATTERN, autotune="none", remainder="eager")))
        return built[-1].run

    x = torch.randn(16, 256)
    got = torch.compile(branching, backend=lambda gm, inputs: Frozen(gm, keep))(x)
    torch.testing.assert_close(got, branching(x), rtol=0, atol=1e-5)
    told = str(built[0].explanation)
    assert "note: only linears were looked at" in told
    assert "cond" in told
