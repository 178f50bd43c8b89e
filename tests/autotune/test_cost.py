"""The cost model: counts are exact, predictions rank."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import ranking
from sparsecc.autotune import OVERHEAD, M, Machine, break_even, cost, costs, dense_work, predict, work
from sparsecc.autotune.fit import fit, non_negative
from sparsecc.formats import parse_format

measured = Machine.measured  # the one that measures: a fixture replaces it while tests run
MACHINE = Machine(flops=1e11, bandwidth=2e10, threads=2, cache_bandwidth=1e11)


def test_dense_work_is_the_textbook_count() -> None:
    dense = dense_work(30, 20)
    assert dense.flops == 2 * 30 * 20 * M
    assert dense.bytes == 4 * 30 * 20 + 4 * M * (30 + 20)


@pytest.mark.parametrize("text", ["csr", "bsr(4, 1)", "bsr(4, 1).bf16", "nm(2, 4)", "bitmap", "csr.panels(8)", "dense"])
def test_work_counts_what_is_packed(text: str) -> None:
    """The weight's bytes are those of the packed arrays, the kept entries the length of `val`."""
    w = torch.zeros(8, 16)
    w[:4, 1] = 1
    w[2, 8] = 2
    fmt = parse_format(text)
    arrays = fmt.pack(w)
    blocks = 2 if fmt.block == (4, 1) else 5
    done = work(fmt, 8, 16, blocks)
    assert done.bytes.subs(M, 0) == sum(a.nbytes for a in arrays.values())
    assert done.flops == 2 * arrays["val"].numel() * M


def test_limits_of_the_machine() -> None:
    dense = dense_work(1000, 1000)
    limits = (2e9 / 2e11, 4e6 / 2e10, 1000 * 4 * 2000 / 1e11)
    assert cost.limits(dense, 1000, MACHINE) == pytest.approx(limits)
    assert predict(dense, 1000, MACHINE, (1.0, 2.0, 3.0)) == pytest.approx(OVERHEAD + limits[0] + 2 * limits[1] + 3 * limits[2])


def test_ranking_at_90_percent_zeros() -> None:
    """What was measured: 4x1 blocks beat unstructured CSR, which beats dense; at 10 % zeros CSR does not."""

    def seconds(text: str, kept: float) -> float:
        fmt = parse_format(text)
        blocks = int(kept * 3072 * 768 / (fmt.block[0] * fmt.block[1]))
        return predict(work(fmt, 3072, 768, blocks), 128, MACHINE, costs(fmt, "many", ""))

    assert seconds("bsr(4, 1)", 0.1) < seconds("csr", 0.1) < seconds("dense", 0.1)
    assert seconds("csr", 0.9) > seconds("dense", 0.9)


def test_what_was_not_measured_takes_after_its_nearest() -> None:
    table = cost.measured_costs()["many"]
    config, known = next(iter(table["csr 4"].items()))
    assert costs(parse_format("bsr(4, 1).bf16"), "many", config) == known
    assert costs(parse_format("bsr(8, 1)"), "many", config) == known
    assert costs(parse_format("bsr(64, 1)"), "many", "") == cost.middle(table["csr 16"].values())
    assert costs(parse_format("nm(1, 4).block(4, 1)"), "many", "") == cost.middle(table["nm 1"].values())
    assert costs(parse_format("packed_nm(2, 4)"), "many", "") == cost.middle(table["csr 1"].values())
    every = [one for kinds in cost.measured_costs().values() for kind in kinds.values() for one in kind.values()]
    assert all(0 <= factor < 20 for one in every for factor in one) and all(sum(one) > 0 for one in every)


def test_fit_finds_the_factors_behind_the_times() -> None:
    random = torch.Generator().manual_seed(0)
    limits = [tuple((1e-4 * torch.rand(3, generator=random, dtype=torch.float64)).tolist()) for _ in range(200)]
    points = [(one, OVERHEAD + 2 * one[0] + one[1] + 1.5 * one[2]) for one in limits]
    a, b, c = fit(points)
    assert a > c > b > 0  # drawn together a little by the prior
    errors = [abs(OVERHEAD + a * x + b * y + c * z - seconds) / seconds for (x, y, z), seconds in points]
    assert max(errors) < 0.25 and sum(errors) / len(errors) < 0.05
    assert fit(points[:1]) == pytest.approx([(points[0][1] - OVERHEAD) / sum(limits[0])] * 3)  # type: ignore[arg-type]
    pulled = non_negative(torch.eye(2).double(), torch.tensor([1.0, -1.0]).double())
    assert pulled.tolist() == [1.0, 0.0]


def test_the_best_is_among_the_first_five_of_a_model_that_never_saw_the_shape() -> None:
    """On the committed measurements: see benchmarks/ranking.py."""
    rows = json.loads(ranking.RESULTS.read_text())["rows"]
    every = ranking.points(rows)
    predicted = ranking.left_out(rows, every)
    own, more = (ranking.summary(predicted, every, which) for which in (True, False))
    assert own["problems"] == 105 and own["best within the first 5"] >= 0.97 and own["regret"][5]["largest"] < 0.02
    assert more["of these within the first 5"] >= 0.9 and more["regret"][5]["mean"] < 0.005
    named = {kind: found for kind, found in ranking.fitted(every).items() if kind[0] in cost.measured_costs()}
    for regime, kinds in cost.measured_costs().items():
        for kind, configs in kinds.items():
            for config, known in configs.items():
                assert named[regime, kind, config] == pytest.approx(known, abs=1e-3)


def test_break_even() -> None:
    assert break_even({0.9: 1.0}, dense=5.0) == pytest.approx(0.5)
    assert break_even({0.9: 1.0}, dense=20.0) == 0.0
    assert break_even({0.5: 2.0, 0.9: 1.2}, dense=2.5) == pytest.approx(0.25)  # 1 + 2 * kept
    assert break_even({0.5: 2.0, 0.9: 1.2}, dense=0.9) is None
    assert break_even({0.5: 1.0, 0.9: 2.0}, dense=1.5) is None
    assert break_even({}, dense=1.0) is None
    assert break_even({1.0: 1.0}, dense=1.0) is None


def test_machine_is_measured_once() -> None:
    before = torch.get_num_threads()
    machine = measured(1)
    assert machine is measured(1)
    assert torch.get_num_threads() == before
    assert machine.threads == 1
    assert machine.flops > 0 and 0 < machine.bandwidth <= machine.cache_bandwidth
