"""Splitting a trace's requests, never single tokens, into training and test requests.

The split is that of ``serve-bench``: one seeded permutation, cut at 70 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moeless.contracts import IntArray
from moeless.errors import UserError

SplitBy = Literal["request", "category", "time"]
TRAIN_SHARE = 0.7
#: Share of the training requests that is for validation: early stopping, calibration, blend weights.
VALIDATION_SHARE = 0.15


@dataclass(frozen=True)
class Split:
    """Indices of the requests for the fit, for validation during the fit, and for testing; each ascending."""

    fit: IntArray
    validation: IntArray
    test: IntArray

    @property
    def train(self) -> IntArray:
        """All training requests: fit and validation, ascending."""
        return np.sort(np.concatenate([self.fit, self.validation]))


def split_requests(category: Sequence[str], by: SplitBy = "request", seed: int = 0) -> Split:
    """Split requests 70/30.

    Args:
        category: the category of each request.
        by: ``request``: at random; ``category``: whole categories go to one side, so that testing meets domains that
            fitting never saw; ``time``: the first 70 % in order of recording against the rest.

    Raises:
        UserError: fewer than three requests, or fewer than two categories where they are asked for.
    """
    count = len(category)
    if count < 3:
        raise UserError(
            f"fitting needs at least 3 requests to split into fit, validation and test, the trace has {count}"
        )
    rng = np.random.default_rng(seed)
    cut = min(round(TRAIN_SHARE * count), count - 1)
    order = np.arange(count)
    if by == "request":
        order = rng.permutation(count)
    elif by == "category":
        names = np.unique(category)
        if len(names) < 2:
            raise UserError("splitting by category needs a trace with at least two categories")
        members = [np.flatnonzero(np.asarray(category) == name) for name in rng.permutation(names)]
        # the end of the category that reaches the cut, but one that leaves something to test
        ends = np.cumsum([len(requests) for requests in members])[:-1]
        order, cut = np.concatenate(members), int(ends[min(int(np.searchsorted(ends, cut)), len(ends) - 1)])
    elif by != "time":
        raise UserError(f"requests can be split by request, category or time, not by {by!r}")
    train = rng.permutation(order[:cut])
    held = min(max(1, round(VALIDATION_SHARE * len(train))), len(train) - 1)
    return Split(np.sort(train[held:]), np.sort(train[:held]), np.sort(order[cut:]))
