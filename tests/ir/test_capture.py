"""Real models through torch.export: equal results, flexible calls, clear refusals."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import BertConfig, BertModel

from sparsecc.capture import Captured, capture
from sparsecc.errors import CaptureError, ShapeError
from sparsecc.ir.text import parse_program, print_program, tensors_of


def bert(attention: str) -> BertModel:
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64
    )
    return BertModel._from_config(config, attn_implementation=attention).eval()


def batch(rows: int, columns: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, columns, dtype=torch.long)
    mask[-1, columns // 2 :] = 0
    return {"input_ids": torch.randint(0, 100, (rows, columns)), "attention_mask": mask}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def captured_bert(request: pytest.FixtureRequest) -> tuple[BertModel, Captured]:
    model = bert(request.param)
    return model, capture(model, (), batch(2, 7))


@pytest.mark.parametrize("size", [(2, 7), (5, 9), (3, 64)])
def test_bert_equals_the_model(captured_bert: tuple[BertModel, Captured], size: tuple[int, int]) -> None:
    model, captured = captured_bert
    inputs = batch(*size)
    flat = captured.flatten((), inputs)
    captured.check(flat)
    got = captured.unflatten(captured.program.run(*flat))
    with torch.no_grad():
        want = model(**inputs)
    assert type(got) is type(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def test_bert_text_round_trip(captured_bert: tuple[BertModel, Captured]) -> None:
    program = captured_bert[1].program
    text = print_program(program)
    parsed = parse_program(text, tensors_of(program))
    assert print_program(parsed) == text
    flat = captured_bert[1].flatten((), batch(3, 11))
    for got, want in zip(parsed.run(*flat), program.run(*flat), strict=True):
        assert torch.equal(got, want)


def test_calls_as_the_signature_allows(captured_bert: tuple[BertModel, Captured]) -> None:
    captured = captured_bert[1]
    inputs = batch(2, 7)
    ids, mask = inputs.values()
    want = [id(t) for t in captured.flatten((), inputs)]
    for args, kwargs in (((ids, mask), {}), ((ids,), {"attention_mask": mask, "token_type_ids": None}),
                         ((), {"attention_mask": mask, "input_ids": ids})):
        assert [id(t) for t in captured.flatten(args, kwargs)] == want


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": torch.zeros(1, 7, dtype=torch.long)}, ShapeError, "input_ids, dimension 0: size 1 is outside .* 2 or more"),
        ({"attention_mask": torch.ones(2, 3, dtype=torch.long)}, ShapeError, "attention_mask, dimension 1: size 3, must equal input_ids"),
        ({"input_ids": torch.zeros(2, 7)}, ShapeError, "input_ids is f32, captured as i64"),
        ({"input_ids": torch.zeros(7, dtype=torch.long)}, ShapeError, "input_ids has 1 dimensions"),
        ({"attention_mask": None}, ShapeError, "'attention_mask' was a tensor when the model was captured, now it is None"),
        ({"token_type_ids": torch.zeros(2, 7, dtype=torch.long)}, ShapeError, "'token_type_ids' was not given when"),
        (batch(2, 80), ShapeError, "size 80 is outside the captured range, 2 to 64"),
    ],
)
def test_refusals_name_the_argument(
    captured_bert: tuple[BertModel, Captured], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    captured = captured_bert[1]
    with pytest.raises(error, match=message):
        captured.check(captured.flatten((), batch(2, 7) | change))


class Odd(nn.Module):
    """Tied weights, a written buffer, in-place arithmetic, nested inputs and outputs, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, ids: torch.Tensor, scale: float = 1.0, state: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
        self.calls += 1
        hidden = self.embed(ids) + 1
        hidden.mul_(2)
        extra = 0 if state is None else state["a"] + state["b"][0]
        return {"logits": self.head(hidden) * scale, "n": 3, "none": None, "extra": [extra]}


def test_trees_constants_buffers_and_ties() -> None:
    model = Odd().eval()
    state = {"a": torch.randn(4), "b": (torch.randn(4),)}
    ids = torch.randint(0, 10, (2, 3))
    captured = capture(model, (ids, 2.0), {"state": state})
    flat = captured.flatten((ids,), {"scale": 2.0, "state": state})
    captured.check(flat)
    before = model.calls.clone()
    got = captured.unflatten(captured.program.run(*flat))
    assert torch.equal(model.calls, before + 1)
    want = model(ids, 2.0, state)
    torch.testing.assert_close(got["logits"], want["logits"])
    assert (got["n"], got["none"]) == (3, None)
    torch.testing.assert_close(got["extra"][0], want["extra"][0])
    assert sum(n.op == "get_attr" and "weight" in n.target for n in captured.program.graph.nodes) == 1
    with pytest.raises(ShapeError, match=r"'scale' was 2\.0 when the model was captured, now it is 1\.0"):
        captured.flatten((ids,), {"state": state})
    with pytest.raises(ShapeError, match="another structure"):
        captured.flatten((ids, 2.0), {"state": {"a": state["a"]}})
    with pytest.raises(ShapeError, match=r"state\['b'\]\[0\]|state\['a'\]"):
        captured.check(captured.flatten((ids, 2.0), {"state": {"a": torch.randn(4), "b": (torch.randn(5),)}}))


def test_the_ecosystems_sparse_weights_become_plain() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    prune.l1_unstructured(model[0], "weight", 0.5)
    model[2].weight = nn.Parameter(model[2].weight.detach().to_sparse_csr())
    x = torch.randn(3, 8)
    captured = capture(model, (x,))
    torch.testing.assert_close(captured.program.run(x)[0], model(x))
    assert set(captured.program.origin.values()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert hasattr(model[0], "weight_orig")
    assert model[2].weight.layout == torch.sparse_csr


class Keywords(nn.Module):
    def forward(self, x: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return x * others["scale"] + others["shift"]


def test_what_stands_in_keywords_may_vary_too() -> None:
    model, make = Keywords().eval(), lambda n: {"scale": torch.randn(n, 4), "shift": torch.randn(4)}
    captured = capture(model, (torch.randn(3, 4),), make(3))
    assert "forward" not in vars(model)
    x, kwargs = torch.randn(7, 4), make(7)
    flat = captured.flatten((x,), kwargs)
    captured.check(flat)
    torch.testing.assert_close(captured.program.run(*flat)[0], model(x, **kwargs))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_refusals_to_capture() -> None:
    with pytest.raises(CaptureError, match=r"train mode: call model\.eval\(\) first"):
        capture(nn.Linear(2, 2), (torch.randn(3, 2),))
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    mixed[1].train()
    with pytest.raises(CaptureError, match="1 is in train mode"):
        capture(mixed, (torch.randn(3, 2),))
    with pytest.raises(CaptureError, match=r"cannot capture Branching: .* at .*test_capture\.py:\d+"):
        capture(Branching().eval(), (torch.randn(3),))


def test_exported_program_and_fixed_sizes() -> None:
    model, x = nn.Linear(4, 2).eval(), torch.randn(3, 4)
    exported = capture(torch.export.export(model, (x,)))
    torch.testing.assert_close(exported.program.run(*exported.flatten((x,), {}))[0], model(x))
    fixed = capture(model, (x,), dynamic_shapes=None)
    with pytest.raises(ShapeError, match="input, dimension 0: size 5, captured as exactly 3"):
        fixed.check(fixed.flatten((torch.randn(5, 4),), {}))
