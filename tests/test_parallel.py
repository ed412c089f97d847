"""Sharing out and putting together: what two or three processes have together is what one has."""

from __future__ import annotations

import pytest
import torch

from compress import parallel
from compress.calibration.statistics import InputStatistics
from tests.processes import in_processes
from tests.tiny import CPU


@pytest.mark.parametrize("processes", [2, 3])
def test_shares_go_back_into_the_order_they_were_dealt_from(processes, tmp_path):
    items = [f"item {number}" for number in range(7)]

    def work():
        with parallel.group():
            mine = parallel.share(items)
            firsts = [mine[: parallel.among_first(number)] for number in range(len(items) + 1)]
            return mine, parallel.in_order(mine), firsts, parallel.from_leader(parallel.rank()), parallel.total(1)

    results = in_processes(processes, work, tmp_path)

    for rank, (mine, everything, firsts, leader, total) in enumerate(results):
        assert mine == items[rank::processes] and everything == items
        assert firsts == [[item for item in items[:number] if item in mine] for number in range(len(items) + 1)]
        assert leader == 0 and total == processes


def test_one_process_is_everybody():
    assert parallel.count() == 1 and parallel.leads() and not parallel.started_to_follow()
    assert parallel.share([1, 2]) == parallel.in_order([1, 2]) == parallel.from_leader([1, 2]) == [1, 2]
    assert parallel.among_first(5) == parallel.total(5) == 5


@pytest.mark.parametrize("paired", [0, 1, 3])
def test_added_up_statistics_are_those_of_one_process(paired, tmp_path):
    """Five batches of different lengths, the first `paired` with a source stream beside them; one process may have no
    pair at all."""
    columns, hidden = 200, 6
    generator = torch.Generator().manual_seed(paired)
    batches = [
        [torch.randn(2, 5 + number, width, generator=generator) for width in (columns, columns, hidden, hidden)]
        for number in range(5)
    ]

    def work():
        statistics = InputStatistics(columns, CPU)
        share = parallel.share(batches)
        for number, (inputs, reference, residual, source_residual) in enumerate(share):
            if number < parallel.among_first(paired):
                statistics.add_pair(inputs, reference, None, (residual, source_residual))
            else:
                statistics.add(inputs, None)
        statistics.reduce()
        mismatch = statistics.mismatch()
        tokens = (statistics.tokens, mismatch and mismatch.tokens)
        return tokens, [
            statistics.hessian()[0],
            *((mismatch.hessian, mismatch.cross, mismatch.residual) if mismatch else ()),
        ]

    expected_tokens, expected = work()

    def together():
        with parallel.group():
            return work()

    for tokens, found in in_processes(2, together, tmp_path):
        assert tokens == expected_tokens
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-16)
