"""The cost model: counts are exact, predictions rank."""

from __future__ import annotations

import pytest
import torch

from sparsecc.autotune import EFFICIENCY, OVERHEAD, M, Machine, break_even, dense_work, efficiency, predict, work
from sparsecc.formats import parse_format

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


def test_prediction_is_a_roofline() -> None:
    dense = dense_work(1000, 1000)
    bandwidth_bound = 4e6 / 2e10 + 4 * 2000 / 1e11 + OVERHEAD
    assert predict(dense, 1, MACHINE, 0.5) == pytest.approx(bandwidth_bound)
    assert predict(dense, 1000, MACHINE, 0.5) == pytest.approx(2e9 / 1e11 + OVERHEAD)
    assert predict(dense, 1000, MACHINE, 1.0) < predict(dense, 1000, MACHINE, 0.5)


def test_ranking_at_90_percent_zeros() -> None:
    """What was measured: 4x1 blocks beat unstructured CSR, which beats dense; at 10 % zeros CSR does not."""

    def seconds(text: str, kept: float) -> float:
        fmt = parse_format(text)
        blocks = int(kept * 3072 * 768 / (fmt.block[0] * fmt.block[1]))
        return predict(work(fmt, 3072, 768, blocks), 128, MACHINE, efficiency(fmt))

    assert seconds("bsr(4, 1)", 0.1) < seconds("csr", 0.1) < seconds("dense", 0.1)
    assert seconds("csr", 0.9) > seconds("dense", 0.9)


def test_efficiency_takes_the_largest_entry_below() -> None:
    assert efficiency(parse_format("csr")) == EFFICIENCY["csr", 1]
    assert efficiency(parse_format("bsr(1, 16)")) == EFFICIENCY["csr", 1]
    assert efficiency(parse_format("bsr(6, 1).bf16")) == EFFICIENCY["csr", 4]
    assert efficiency(parse_format("nm(2, 4).block(64, 1)")) == EFFICIENCY["nm", 4]
    assert all(0 < share <= 1 for share in EFFICIENCY.values())


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
    machine = Machine.measured(1)
    assert machine is Machine.measured(1)
    assert torch.get_num_threads() == before
    assert machine.threads == 1
    assert machine.flops > 0 and 0 < machine.bandwidth <= machine.cache_bandwidth
