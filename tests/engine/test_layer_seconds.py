import numpy as np
import pytest

from moeless.engine.elastic import COLUMNS
from moeless.engine.results import CellRecords, layer_seconds


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
