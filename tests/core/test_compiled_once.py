"""Functions that are compiled once: their callers hold an address, and their annotations state their types."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from moeless.contracts import FloatArray, IntArray
from moeless.jit import njit, njit_once


class Parts(NamedTuple):
    load_SE: IntArray
    scale: float


@njit_once
def scaled(load_E: FloatArray, parts: Parts, times: int) -> tuple[float, int]:
    if times < 0:
        raise ValueError("times")
    total = 0.0
    for load in load_E:
        total += load * parts.scale * times
    return total, parts.load_SE.sum()


@njit(nogil=True)
def first(load_E, parts, times):
    return scaled(load_E, parts, times)[0]


@njit(nogil=True)
def second(load_E, parts, times):
    return scaled(load_E[:2], parts, times)[1] + first(load_E, parts, times)


LOAD_E, PARTS = np.arange(4.0), Parts(np.ones((2, 3), np.int64), 0.5)


def test_a_caller_is_compiled_without_it():
    @njit_once
    def unused(count: int) -> int:
        raise AssertionError

    @njit(nogil=True)
    def caller(count):
        return unused(count) if count > 0 else 0

    assert caller(0) == 0
    assert caller.signatures
    assert not unused.signatures


def test_all_callers_share_one_compiled_function():
    assert first(LOAD_E, PARTS, 2) == 6.0
    assert second(LOAD_E, PARTS, 2) == 12.0
    assert scaled(LOAD_E, PARTS, 2) == (6.0, 6)
    assert len(scaled.signatures) == 1


def test_its_errors_reach_the_caller_s_caller():
    with pytest.raises(ValueError, match="times"):
        second(LOAD_E, PARTS, -1)


def test_other_types_are_refused():
    with pytest.raises(TypeError):
        scaled(LOAD_E.astype(np.int64), PARTS, 2)


def test_an_array_s_name_tells_its_axes():
    with pytest.raises(TypeError, match="load"):

        @njit_once
        def untold(load: FloatArray) -> int:
            return len(load)
