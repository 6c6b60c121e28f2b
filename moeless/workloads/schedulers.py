"""Schedulers by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeless.contracts import Request
from moeless.errors import UserError
from moeless.workloads.continuous import Continuous
from moeless.workloads.one_second import OneSecond
from moeless.workloads.scheduler import Queueing, Scheduler

SCHEDULERS: dict[str, type[Scheduler]] = {"one-second": OneSecond, "continuous": Continuous}

__all__ = ["SCHEDULERS", "Continuous", "OneSecond", "Queueing", "Scheduler", "build"]


def build(name: str, requests: Sequence[Request], num_ranks: int = 1, **options: Any) -> Scheduler:
    """A scheduler of that name over the requests; options as its class takes them.

    Raises:
        UserError: no scheduler has that name, or it refuses the requests or an option.
    """
    if name not in SCHEDULERS:
        raise UserError(f"no batching is called {name!r}; there are: {', '.join(SCHEDULERS)}")
    try:
        return SCHEDULERS[name](requests, num_ranks, **options)
    except TypeError as error:
        raise UserError(f"batching {name!r} does not take these options ({error})") from None
