"""Thresholds on the inputs of attention's projections, against the dense model with those inputs zeroed by hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparsecc
from examples.models import bert_base, llama_stack
from sparsecc.errors import SpecError
from sparsecc.ir.text import parse_program, print_program
from sparsecc.methods import cats, chess

EAGER: dict[str, Any] = {"autotune": "none", "remainder": "eager"}


def model() -> Any:
    return llama_stack(32, 96, 2, heads=4, kv_heads=2, vocab=64)


def ids(tokens: int) -> Tensor:
    return torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def masked(dense: Any, levels: dict[str, Tensor]) -> Any:
    """The model whose named linears read nothing of at most their threshold."""
    for name, level in levels.items():
        dense.get_submodule(name).register_forward_pre_hook(lambda _, x, level=level: (torch.where(x[0].abs() > level, x[0], 0.0),))
    return dense


def test_q_and_o_read_what_exceeds_their_thresholds_and_k_and_v_read_everything() -> None:
    found = chess.attention(model(), [ids(40), ids(33)], 0.5)
    assert set(found.levels) == {f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qo"}
    wanted = masked(model(), found.levels)
    read = []
    wanted.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, x: read.append(x[0]))
    compiled = sparsecc.compile(model(), "cpu", {"*.self_attn.*": found}, **EAGER)
    for tokens in (1, 40, 37):  # by the kernel, then by dense code
        inputs = {"input_ids": ids(tokens), "use_cache": False}
        y, dense = wanted(**inputs).logits, model()(**inputs).logits
        assert torch.allclose(compiled(**inputs).logits, y, atol=1e-5) and not torch.allclose(y, dense, atol=1e-3)
    assert 0.4 < float((read[1] == 0).float().mean()) < 0.6
    regions = [r for r in compiled.explain().to_dict()["regions"] if r["reason"].startswith("a linear on its active inputs")]
    assert {r["name"] for r in regions} == set(found.levels)
    seen = [r["observed_kept"] for r in regions if r["observed_kept"] is not None and "q_proj" in r["name"]]
    assert seen and all(0.2 < kept < 0.8 for kept in seen)
    for stage in ("skip", "bundle"):
        assert print_program(parse_program(compiled.ir(stage))) == compiled.ir(stage)


@pytest.mark.slow
def test_all_of_chess_and_nothing_of_it() -> None:
    data = [ids(24)]
    spec = {"*.mlp": cats.calibrate(model(), data, 0.0), "*_proj": chess.attention(model(), data, 0.0, "qkvo")}
    inputs = {"input_ids": ids(3), "use_cache": False}
    compiled = sparsecc.compile(model(), "reference", spec, dict(inputs), **EAGER)
    assert torch.allclose(compiled(**inputs).logits, model()(**inputs).logits, atol=1e-5)
    assert compiled.ir("skip").count("sparsecc.neurons(") == 2 * 5
    everything = sparsecc.inputs(float("inf"))  # drops all: attention adds nothing
    compiled = sparsecc.compile(model(), "cpu", {"*.o_proj": everything}, dict(inputs), **EAGER)
    without = masked(model(), {f"model.layers.{i}.self_attn.o_proj": torch.tensor(torch.inf) for i in range(2)})
    assert torch.allclose(compiled(**inputs).logits, without(**inputs).logits, atol=1e-5)


def test_thresholds_are_numpys() -> None:
    dense, read = model(), []
    dense.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, x: read.append(x[0]))
    dense(input_ids=ids(50), use_cache=False)
    level = chess.attention(model(), [ids(50)], 0.4).levels["model.layers.1.self_attn.o_proj"]
    sizes = np.sort(np.abs(read[0].numpy().ravel()))
    assert np.isclose(float(level), sizes[round(0.4 * sizes.size) - 1], rtol=1e-5)


@pytest.mark.slow
def test_projections_with_a_bias() -> None:
    dense = bert_base(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64, num_attention_heads=4)
    inputs = {"input_ids": ids(9)}
    found = chess.attention(dense, [ids(30)], 0.5, ("q", "o"))
    assert len(found.levels) == 4
    compiled = sparsecc.compile(dense, "cpu", {"*": found}, **EAGER)
    assert torch.allclose(compiled(**inputs)[0], masked(dense, found.levels)(**inputs)[0], atol=1e-5)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: chess.attention(model(), [], 0.5), "empty"), (lambda: chess.attention(model(), [ids(8)], 1.0), r"in \[0, 1\)"),
    (lambda: chess.attention(model(), [ids(8)], 0.5, "qz"), "parts"), (lambda: sparsecc.inputs(-1.0), "0 or larger"),
    (lambda: chess.attention(torch.nn.Linear(4, 4).eval(), [torch.randn(2, 4)], 0.5), "no scaled_dot_product_attention"),
    (lambda: sparsecc.inputs(), "one of"), (lambda: sparsecc.inputs(policy="knee"), "no policy for inputs"),
    (lambda: sparsecc.inputs(float("nan")), "0 or larger"), (lambda: sparsecc.inputs(levels={}), "at least one"),
])
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize(("spec", "message"), [
    ({"*.query": sparsecc.inputs(0.1)}, "names no linear of this model; there are model.layers.0"),
    ({"*.k_proj": sparsecc.inputs(levels={"model.layers.0.self_attn.q_proj": torch.ones(1)})}, "of which it names none"),
    ({"*.q_proj": sparsecc.inputs(levels={"model.layers.0.self_attn.q_proj": torch.ones(7)})}, r"wanted 1 or 32"),
    ({"*.mlp": sparsecc.neurons(), "*.down_proj": sparsecc.inputs(0.1)}, "down_proj lies in a feed-forward block that skips neurons"),
])
def test_what_is_not_there_is_refused_by_name(spec: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        sparsecc.compile(model(), "reference", spec, {"input_ids": ids(5), "use_cache": False}, **EAGER)
