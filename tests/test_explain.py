"""The table of decisions: collapsing, figures, JSON."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sympy

from sparsecc.errors import SpecError
from sparsecc.explain import WIDTH, Explanation, collapse, merge_texts
from sparsecc.ir.program import Region


def sparse(name: str, measured: float = 40.0, zeros: float = 0.9, **more: Any) -> Region:
    figures = {"shape": (1536, 384), "zeros": zeros, "dense_bytes": 2_359_296, "m": 128,
               "predicted_us": 38.0, "measured_us": measured, "dense_us": 160.0}
    return Region(name, (f"{name}.weight",), "block(4, 1)", "", "bsr(4, 1)", "spmm", 260_000, {"dense": 160.0, "spmm": measured}, [],
                  figures | more)


def dense(name: str, reason: str, **more: Any) -> Region:
    return Region(name, pattern="unstructured", reason=reason, choice="dense", more={"shape": (384, 384), "m": 128} | more)


def names(*regions: Region) -> list[str]:
    return [name for name, _ in collapse(regions)]


def test_identical_layers_are_one_row() -> None:
    found = collapse([sparse(f"encoder.layer.{i}.{part}") for i in range(6) for part in ("query", "output.dense")])
    assert [(name, len(members)) for name, members in found] == [("encoder.layer.0-5.query", 6), ("encoder.layer.0-5.output.dense", 6)]


def test_holes_and_two_numbers() -> None:
    assert names(*(sparse(f"h.{i}.fc") for i in (0, 1, 2, 5, 10))) == ["h.0-2,5,10.fc"]
    assert names(*(sparse(f"a.{i}.b.{j}") for i in range(3) for j in range(2))) == ["a.0-2.b.0-1"]
    assert names(sparse("a.0.b.0"), sparse("a.0.b.1"), sparse("a.1.b.0")) == ["a.0.b.0-1", "a.1.b.0"]
    assert names(sparse("0"), sparse("2")) == ["0,2"]
    assert names(sparse("fc1"), sparse("fc2")) == ["fc1", "fc2"]  # a number inside a word is a name, not an index
    assert names(sparse("tied"), sparse("tied")) == ["tied (2 uses)"]


def test_fused_names_are_shortened() -> None:
    fused = [sparse(" + ".join(f"layer.{i}.attention.{part}" for part in ("query", "key", "value"))) for i in range(4)]
    assert names(*fused) == ["layer.0-3.attention.(query + key + value)"]
    assert names(sparse("a + b")) == ["a + b"]
    assert names(sparse("a.b + a.b.c")) == ["a.(b + b.c)"]


@pytest.mark.parametrize("field", ["pattern", "format", "choice", "reason"])
def test_different_decisions_stay_apart(field: str) -> None:
    one, other = sparse("l.0"), sparse("l.1")
    setattr(other, field, "other")
    assert names(one, other) == ["l.0", "l.1"]


def test_shapes_and_tokens_stay_apart() -> None:
    assert names(sparse("l.0"), sparse("l.1", shape=(8, 8)), sparse("l.2", m=1)) == ["l.0", "l.1", "l.2"]


def test_merge_texts() -> None:
    assert merge_texts(["loses 1.2x at 9", "loses 1.4x at 9", "other", "loses 0.9x at 10"]) == ["loses 0.9-1.4x at 9-10", "other"]
    assert merge_texts([]) == [] and merge_texts(["same", "same"]) == ["same"]


def test_figures() -> None:
    text = str(Explanation([sparse("l.0.fc", 40.0, 0.9), sparse("l.1.fc", 32.0, 0.905)], {"target": "cpu", "threads": 2}))
    assert text.splitlines()[0] == "sparsecc  target: cpu  threads: 2  tokens: 128"
    for cell in ("l.0-1.fc", "1536x384", "block(4, 1)", "90.0-90.5 %", "bsr(4, 1)", "260 kB / 2.36 MB", "spmm", "38.0", "32.0-40.0", "160",
                 "4.00-5.00x"):
        assert cell in text, cell
    assert "2 linear regions: 2 sparse, 0 dense; weights 520 kB instead of 4.72 MB; " in text
    assert "72.0 us in the 2 timed ones instead of 320 us dense (4.44x)" in text


def test_why_dense_names_the_break_even() -> None:
    slow = [dense(f"l.{i}", f"csr is {1.2 + i / 10}x slower", break_even=0.7, measured_us=200.0, dense_us=100.0) for i in range(2)]
    text = str(Explanation(slow))
    assert "csr is 1.2-1.3x slower; break-even at 70.0 % zeros" in text and "0.50x" in text
    assert "200 us in the 2 timed ones instead of 200 us dense (1.00x)" in text  # what runs is the dense code
    assert "no fraction of zeros would pay" in str(Explanation([dense("l", "", break_even=1.3)]))
    assert str(Explanation([dense("l", "break-even is 90 %", break_even=0.9)])).count("break-even") == 1


def test_what_is_unknown_is_left_out() -> None:
    text = str(Explanation([Region("pooler", reason="no zeros")]))
    assert "predicted" not in text and "pattern" not in text and "0 B" not in text
    assert "pooler dense" in text and "    no zeros" in text
    assert "0 linear regions" in str(Explanation([]))


def test_notes_and_brackets_are_not_markup() -> None:
    region = sparse("l")
    region.notes = ["dropped rows [3, 5] of [bold]l", "dropped rows [3, 6] of [bold]l"]
    region.reason = "f32[s0, 4]"
    text = str(Explanation([region], {"notes": ["lm_head [tied]"]}))
    assert "    dropped rows [3, 5-6] of [bold]l" in text and "    f32[s0, 4]" in text and "note: lm_head [tied]" in text


def test_the_widest_table_fits() -> None:
    region = sparse("model.decoder.layers.0." + "very_long_name." * 9 + "fc", predicted_us=123456.0)
    region.format, region.choice = "bsr(4, 1).bf16.panels(128)", "spmm(" + "vectors=2, " * 12 + ")"
    other = sparse("b", m=1)
    lines = str(Explanation([region, other])).splitlines()
    assert max(map(len, lines)) <= WIDTH and not any(line.endswith(" ") for line in lines)
    assert "123456" in "\n".join(lines)
    typical = sparse(" + ".join(f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")))
    assert "encoder.layer.0.attention.self.(query + key + value)" in str(Explanation([typical, sparse("x", m=64)]))  # never folded


def test_str_has_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in str(Explanation([sparse("l")]))


def test_html() -> None:
    explanation = Explanation([sparse("l<0>")])
    assert explanation._repr_html_().startswith("<pre>") and "l&lt;0&gt;" in explanation._repr_html_()


def test_dict_is_json_and_loads_again(tmp_path: Path) -> None:
    regions = [sparse("l.0", m=sympy.Symbol("s0"), config="spmm(vectors=2)", worst=float("inf")), dense("head", "no zeros", break_even=0.7)]
    explanation = Explanation(regions, {"target": "cpu", "where": tmp_path, "notes": ["n"]})
    explanation.save(tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    first = found["regions"][0]
    assert first["alternatives"] == {"dense": 160.0, "spmm": 40.0} and first["shape"] == [1536, 384] and first["m"] == "s0"
    assert first["sparse"] and first["speed_up"] == 4.0 and first["config"] == "spmm(vectors=2)" and first["worst"] is None
    assert found["totals"] == explanation.totals() == {
        "sparse": 1, "dense": 1, "bytes": 260_000, "dense_bytes": 2_359_296, "timed": 1, "us": 40.0, "dense_us": 160.0}
    again = Explanation.load(tmp_path / "x.json")
    assert str(again) == str(explanation) and again.to_dict() == explanation.to_dict()


@pytest.mark.parametrize("content", ["{", "[]", '{"regions": []}', '{"header": {}, "regions": [3]}', '{"header": {}, "regions": [{}]}'])
def test_other_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SpecError, match=r"JSON|not a saved explanation"):
        Explanation.load(tmp_path / "x.json")
