from collections.abc import Callable

import numpy as np
import pytest

from moeless.engine.elastic import COLUMNS
from moeless.engine.job import Job
from moeless.engine.results import CellRecords, crowded, layer_seconds


def records(**columns):
    rows_SILC = np.zeros((2, 1, 1, len(COLUMNS)))
    for name, seconds_S in columns.items():
        rows_SILC[:, 0, 0, COLUMNS.index(name)] = seconds_S
    return CellRecords(rows_SILC, np.zeros(1), np.ones(1), [], [])


def test_waiting_for_a_slower_attention_is_no_part_of_a_layer():
    # rank 0 came 5 s before rank 1 and waited in the gather; from there on both take 3 s
    late = layer_seconds(records(total=[8.0, 3.0], gather=[6.0, 1.0], compute=[1.5, 0.5]), own_only=False)
    even = layer_seconds(records(total=[3.0, 3.0], gather=[1.0, 1.0], compute=[1.5, 0.5]), own_only=False)
    assert late.total[0, 0] == even.total[0, 0] == pytest.approx(3.0)
    assert late.exchange[0, 0] == pytest.approx(1.5)
    # waiting inside the layer counts: rank 1's second half of the exchange waits for rank 0's experts
    slow = layer_seconds(records(total=[4.0, 4.0], gather=[1.0, 1.0], compute=[2.5, 0.5]), own_only=False)
    assert slow.total[0, 0] == pytest.approx(4.0)


def on(machine: int, *cpus: int, quota: float | None = None) -> dict[str, object]:
    return {"machine": machine, "cpus": list(cpus), "cpu_quota": quota}


def test_ranks_are_compared_with_the_cores_of_their_own_machine(make_job: Callable[..., Job]) -> None:
    job = make_job(ranks=4)
    # two machines of two cores each have a core for each of four ranks; one machine has not
    assert crowded(job, [on(0, 0, 1), on(0, 0, 1), on(2, 0, 1), on(2, 0, 1)]) is None
    assert crowded(job, [on(0, 0, 1)] * 4) == (4, 2)
    # ranks that are bound to a core each have one
    assert crowded(job, [on(0, 0), on(0, 1), on(0, 2), on(0, 3)]) is None
    # one machine that is crowded is enough
    assert crowded(job, [on(0, *range(8)), on(1, 0), on(1, 0), on(1, 0)]) == (3, 1)


def test_a_processor_quota_counts_as_that_many_cores(make_job: Callable[..., Job]) -> None:
    job = make_job(ranks=2)
    assert crowded(job, [on(0, *range(8), quota=1.5)] * 2) == (2, 1)
    assert crowded(job, [on(0, *range(8), quota=2.0)] * 2) is None
    assert crowded(make_job(ranks=2, device="cuda"), [on(0, 0)] * 2) is None
