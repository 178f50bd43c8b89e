"""What the user writes becomes rules; what cannot be read says where."""

from __future__ import annotations

import pytest

from sparsecc.errors import SpecError
from sparsecc.formats.pattern import NM, Block
from sparsecc.spec import DETECT, Rule, SparsitySpec, options


@pytest.mark.parametrize("nothing", [None, "detect", {}, SparsitySpec()])
def test_nothing_named_is_detect(nothing: object) -> None:
    spec = SparsitySpec.parse(nothing)  # pyright: ignore[reportArgumentType]
    assert spec.rule_for("any.module") == DETECT
    assert spec.rule_for("any.module").mode == "detect"
    assert str(spec) == "detect"


@pytest.mark.parametrize("one", ["2:4", "nm(2, 4)", NM(2, 4), Rule(NM(2, 4)), {"*": "2:4"}])
def test_one_pattern_is_for_all(one: object) -> None:
    spec = SparsitySpec.parse(one)  # pyright: ignore[reportArgumentType]
    assert spec.rule_for("layers.0.q_proj") == Rule(NM(2, 4))
    assert spec.rule_for("layers.0.q_proj").mode == "require"
    assert not spec.names("layers.0.q_proj")


def test_the_last_match_wins() -> None:
    spec = SparsitySpec.parse(
        {"*": "2:4", "layers.*.mlp.*": options("block(4, 1)", codec="bf16"), "layers.0.*": "dense", "layers.0.q": "detect"}
    )
    assert spec.rule_for("layers.1.mlp.up") == Rule(Block(4, 1), "bf16")
    assert spec.rule_for("layers.0.mlp.up").mode == "dense"
    assert spec.rule_for("layers.0.q") == DETECT
    assert spec.rule_for("head") == Rule(NM(2, 4))
    assert spec.names("layers.0.q")
    assert SparsitySpec.parse(spec) is spec
    assert hash(spec) == hash(SparsitySpec(spec.entries))
    assert str(spec).startswith("* -> nm(2, 4); layers.*.mlp.* -> block(4, 1), bf16 values; layers.0.* -> dense")


def test_unknown_globs_get_the_closest_names() -> None:
    spec = SparsitySpec.parse({"*": "2:4", "encoder.layer.0.atention.query": "2:4", "encoder.layer.*": "2:4"})
    with pytest.raises(SpecError, match=r"0\.atention\.query' matches no linear weight; closest: encoder\.layer\.0\.attention\.query"):
        spec.check_globs(["encoder.layer.0.attention.query", "pooler"])
    spec = SparsitySpec.parse({"encoder.*": "2:4", "pooler": "dense"})
    spec.check_globs(iter(["encoder.layer.0.attention.query", "pooler"]))


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ("blok(4, 1)", "did you mean 'block'"),
        ({"enc.*": "nm(2 4)"}, r"sparsity\['enc.\*'\]: expected a number"),
        ({3: "2:4"}, "globs over module names"),
        (0.9, "got 0.9"),
        ({"*": 0.9}, "got 0.9"),
    ],
)
def test_what_cannot_be_read(sparsity: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SparsitySpec.parse(sparsity)  # pyright: ignore[reportArgumentType]


def test_options() -> None:
    assert options("2:4", codec="f16") == Rule(NM(2, 4), "f16")
    assert options(codec="bf16") == Rule(None, "bf16")
    assert options("dense").mode == "dense"
    with pytest.raises(SpecError, match="unknown codec 'int4'"):
        options("2:4", codec="int4")
