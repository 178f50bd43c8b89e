"""Learned routers of tokens against the masked dense model: FTP and mixture-of-depths, padding, nothing kept, everything kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsecc
from examples.models import bert_base
from sparsecc.errors import SelectionError, SpecError
from sparsecc.ir.text import parse_program, print_program
from tests.passes.routed import Oracle, batch, depth_router, depths, ftp_router, knee, llama, mass

EAGER: dict[str, Any] = {"autotune": "none", "remainder": "eager"}
SLOW_REFERENCE, SLOW_CPU = (pytest.param(target, marks=pytest.mark.slow) for target in ("reference", "cpu"))
SCHEDULE = [0, 0.5, 0.5, 0.9, 0.5, 0]


def close(y: Tensor, wanted: Tensor, real: Tensor) -> bool:
    return torch.allclose(y[real], wanted[real], atol=2e-5)


@pytest.mark.parametrize("target", [SLOW_REFERENCE, "cpu"])
def test_the_learned_router_is_the_masked_dense_model(target: str) -> None:
    model, router = llama(), ftp_router()
    compiled = sparsecc.compile(model, target, {"layers.*": sparsecc.ftp(SCHEDULE, router)}, batch(), **EAGER)
    for inputs in (batch(), batch((31, 33), left=True), batch((2, 2))):  # in the last one every token is protected
        oracle = Oracle(model, inputs)
        wanted, keeps = oracle.ftp(router, SCHEDULE)
        assert close(compiled(**inputs).logits, wanted, oracle.real)
        counts = [keep[oracle.real].float().mean() for keep in keeps[1:5]]
        assert all(0.05 < c < 0.95 for c in counts) if oracle.S > 2 else all(c == 1 for c in counts)
    regions = [r for r in compiled.explain().to_dict()["regions"] if "learned router 4-64-1" in r["reason"]]
    assert len(regions) == 4 and all(0 < r["observed_kept"] < 1 for r in regions)
    printed = compiled.ir("skip")
    assert print_program(parse_program(printed)) == printed


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_causal_calls_without_a_mask(strict: bool) -> None:
    model, router = llama(4), ftp_router(2, seed=0)
    schedule, inputs = [0.3, 0.5, 0.0, 0.5], batch((41, 41), masked=False)
    spec = sparsecc.ftp(schedule, router, policy="schedule" if strict else "threshold(0.4)")
    compiled = sparsecc.compile(model, "cpu", {"layers.*": spec}, inputs, **EAGER)
    oracle = Oracle(model, inputs)
    wanted, keeps = oracle.ftp(router, schedule, 0.4, strict)
    assert close(compiled(**inputs).logits, wanted, oracle.real)
    counts = [tuple(keep.sum(-1).tolist()) for keep in keeps]
    assert (counts[0] == (29, 29)) if strict else any(a != b for a, b in counts)


@pytest.mark.parametrize("bias", [-1e3, pytest.param(1e3, marks=pytest.mark.slow)])
def test_all_and_none(bias: float) -> None:
    """Only the protected tokens stay, or all of them, which is the dense model."""
    model, router, inputs = llama(3), ftp_router(bias=bias), batch((20, 9))
    compiled = sparsecc.compile(model, "cpu", {"layers.*": sparsecc.ftp(0.5, router)}, inputs, **EAGER)
    oracle = Oracle(model, inputs)
    wanted, keeps = oracle.ftp(router, [0.5] * 3)
    assert {int(k[oracle.real].sum()) for k in keeps} == ({4} if bias < 0 else {29})
    assert close(compiled(**inputs).logits, wanted, oracle.real)
    if bias > 0:
        assert close(compiled(**inputs).logits, model(**inputs).logits, oracle.real)


def test_routers_compose_with_sparse_weights_and_their_layouts() -> None:
    """Values are token-minor between packed linears, also those that are gathered and scattered."""
    model, router, inputs = llama(2), ftp_router(), batch((70, 33))
    sparsecc.prune(model, {"*_proj": "unstructured(0.9)"})
    spec = {"*_proj": "unstructured(0.9)", "layers.*": sparsecc.ftp(0.4, router)}
    compiled = sparsecc.compile(model, "cpu", spec, inputs, **EAGER)
    oracle = Oracle(model, inputs)
    wanted, _ = oracle.ftp(router, [0.4] * 2)
    text = compiled.ir("layout")
    assert 'layout="token"' in text and text.count("sparsecc.rotary(") == 4  # what the router reads of a block stays there, too
    for _ in range(2):  # recorded, then replayed
        assert close(compiled(**inputs).logits, wanted, oracle.real)


@pytest.mark.parametrize("target", ["reference", SLOW_CPU])
def test_mixture_of_depths_by_threshold(target: str) -> None:
    """gamma-MoD: a tied router behind the norm, compact positions, the feed-forward branch scaled; layers 2 and 3 of five."""
    model, weight, inputs = llama(5), depth_router(), batch((24, 17, 3))
    spec = {"layers.[23]": sparsecc.mixture_of_depths({f"model.layers.{i}.router.weight": weight for i in (2, 3)}, "threshold(0.5)")}
    compiled = sparsecc.compile(model, target, spec, inputs, **EAGER)
    for given in (inputs, batch((50, 24))):
        oracle = Oracle(model, given)
        wanted, keeps = depths(oracle, [None, None, weight, weight, None], lambda p: p > 0.5)
        assert close(compiled(**given).logits, wanted, oracle.real)
        assert all(0 < int(k.sum()) < int(oracle.real.sum()) for k in keeps)
    assert compiled.ir("skip").count("= const(\"depth_router") == 1


HOW: list[tuple[str, dict[str, Any], Any]] = [
    ("ratio(0.5)", {"span": (2, 18), "scale": "block"}, lambda p: p >= p.sort(descending=True).values[-(-len(p) // 2) - 1]),
    ("topk(5)", {"span": (4, 20), "positions": "original"}, lambda p: p >= p.sort(descending=True).values[min(5, len(p)) - 1]),
    ("knee", {"scale": "none"}, lambda p: p >= knee(p)),
    ("mass(0.7)", {"reads": "stream"}, lambda p: p >= mass(p, 0.7)),
]


@pytest.mark.parametrize(("policy", "how", "chosen"), [
    HOW[0], pytest.param(*HOW[1], marks=pytest.mark.slow), HOW[2], pytest.param(*HOW[3], marks=pytest.mark.slow)])
def test_mixture_of_depths_by_other_policies(policy: str, how: dict[str, Any], chosen: Any) -> None:
    model, inputs = llama(3), batch((24, 20))
    router = depth_router(1, layers=2)
    compiled = sparsecc.compile(model, "cpu", {"layers.[12]": sparsecc.mixture_of_depths(router, policy, **how)}, inputs, **EAGER)
    oracle = Oracle(model, inputs)
    asked = {"compact": how.get("positions", "compact") == "compact", "stream": "reads" in how, **how}
    wanted, keeps = depths(oracle, [None, *router.values()], lambda p: chosen(p.float()), **asked)
    assert close(compiled(**inputs).logits, wanted, oracle.real)
    assert all(0 < int(k.sum()) < int(oracle.real.sum()) for k in keeps)


def test_a_fixed_number_follows_from_the_length() -> None:
    model, weight, inputs = llama(2), depth_router(), batch((24, 24), masked=False)
    compiled = sparsecc.compile(model, "cpu", {"layers.1": sparsecc.mixture_of_depths(weight, "ratio(0.5)")}, inputs, **EAGER)
    for given in (inputs, batch((31, 31), masked=False)):
        oracle = Oracle(model, given)
        wanted, _ = depths(oracle, [None, weight], lambda p: p >= p.sort(descending=True).values[-(-len(p) // 2) - 1])
        assert close(compiled(**given).logits, wanted, oracle.real)
    assert "sparsecc.keep(" not in compiled.ir("skip")


@pytest.mark.parametrize("name", [pytest.param("opt", marks=pytest.mark.slow), "bert"])
def test_other_models_keep_everything_or_some(name: str) -> None:
    """[B * S, D] (OPT), norms behind the sums (BERT): everything is the dense model, some agrees with the reference."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 64}
    torch.manual_seed(0)
    if name == "opt":
        config = OPTConfig(ffn_dim=96, word_embed_proj_dim=64, **sizes)
        config._attn_implementation = "sdpa"
        model, inputs = OPTForCausalLM(config).eval().requires_grad_(False), batch((24, 9))
    else:
        model, inputs = bert_base(intermediate_size=96, **sizes), batch((24, 9))
        del inputs["use_cache"]
    weight, real = depth_router(), inputs["attention_mask"].bool()
    ys = {}
    for target, policy in (("cpu", "threshold(-1.0)"), ("cpu", "threshold(0.5)"), ("reference", "threshold(0.5)")):
        scale = "none" if "-1" in policy else "mlp"
        spec = {"*": sparsecc.mixture_of_depths(weight, policy, scale, "original")}
        compiled = sparsecc.compile(model, target, spec, inputs, **EAGER)
        ys[target, policy] = compiled(**inputs)[0]
        kept = [r["observed_kept"] for r in compiled.explain().to_dict()["regions"] if "mixture" in r["reason"]]
        assert len(kept) == 2 and (kept == [1, 1] if scale == "none" else all(0 < k < 1 for k in kept))
    assert close(ys["cpu", "threshold(-1.0)"], model(**inputs)[0], real)
    assert close(ys["cpu", "threshold(0.5)"], ys["reference", "threshold(0.5)"], real)


def test_nan_selects_nothing() -> None:
    model, inputs = llama(2), batch((8, 8))
    spec = {"layers.*": sparsecc.mixture_of_depths(depth_router(), "threshold(0.5)")}
    compiled = sparsecc.compile(model, "reference", spec, inputs, **EAGER)
    model.model.embed_tokens.weight[inputs["input_ids"][1, 3]] = torch.nan
    with pytest.raises(SelectionError, match=r"token \d of sequence \d is NaN"):
        compiled(**inputs)


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in ftp_router().items() if key != name}


@pytest.mark.parametrize(("make", "message"), [
    (lambda: sparsecc.ftp(0.3, without("router.fc2.bias")), "router.fc2.bias is missing"),
    (lambda: sparsecc.ftp(0.3, {**ftp_router(), "router.fc1.weight": torch.ones(64, 5)}), r"fc1.weight is \[64, 5\], wanted \[64, 4\]"),
    (lambda: sparsecc.ftp(0.3, {**ftp_router(), "router.fc2.weight": torch.ones(3, 64)}), "1 or 2 outputs"),
    (lambda: sparsecc.ftp(0.3, {**ftp_router(), "router.fc1.bias": torch.full((64,), torch.nan)}), "fc1.bias has NaN"),
    (lambda: sparsecc.ftp(None, ftp_router()), "the checkpoint doesn't have it"),
    (lambda: sparsecc.ftp(None, {**ftp_router(), "scheduler.sparsity": torch.tensor([0.1, 1.0])}), r"schedule\[1\] = 1.0"),
    (lambda: sparsecc.ftp(0.3, ftp_router(), policy="stat(0.1)"), "stat is no policy for tokens"),
    (lambda: sparsecc.ftp(0.3, policy="threshold(0.1)"), "the static one follows its schedule"),
    (lambda: sparsecc.ftp(0.3, "nowhere.safetensors"), "nowhere.safetensors"),
    (lambda: sparsecc.mixture_of_depths(torch.ones(3, 64)), r"router.weight is \[3, 64\]"),
    (lambda: sparsecc.mixture_of_depths({"gate": torch.ones(2, 64)}), "no tensor router.weight"),
    (lambda: sparsecc.mixture_of_depths(depth_router(), scale="half"), "scale='half'"),
    (lambda: sparsecc.mixture_of_depths(depth_router(), span=(1,)), "span"),
    (lambda: sparsecc.mixture_of_depths(depth_router(), reads="all"), "reads='all'"),
    (lambda: sparsecc.mixture_of_depths(depth_router(), positions="new"), "positions='new'"),
])
def test_bad_routers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize(("router", "message"), [
    (torch.ones(2, 32), r"router.weight is \[2, 32\], but the stream of model.layers.0 has 64"),
    (depth_router(layers=2), "the checkpoint has 2 routers, model.layers.2 is block 3"),
])
def test_routers_that_do_not_fit_the_model_are_refused(router: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        sparsecc.compile(llama(3), "reference", {"layers.*": sparsecc.mixture_of_depths(router)}, batch((8, 8)), **EAGER)


def test_checkpoints_are_read(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    save_file({**ftp_router(), "scheduler.sparsity": torch.tensor([0.0, 0.4, 0.3])}, tmp_path / "router.safetensors")
    found = sparsecc.ftp(router=tmp_path / "router.safetensors")
    assert found.schedule == (0.0, 0.4, 0.3) and str(found.policy) == "threshold(0.5)" and "4-64-1" in str(found)
