"""What every decision of a planner is made in: model, cluster, cost model, budget, and the planner's parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moeless.cluster import Cluster
from moeless.contracts import Budget
from moeless.costs import CostModel
from moeless.spec import MoESpec

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Setting:
    """Made once for a run and handed to the planner each time.

    Attributes:
        budget: room for replicas of one layer.
        params: the planner's parameters, an instance of ``Planner.params``.
    """

    spec: MoESpec
    cluster: Cluster
    costs: CostModel
    budget: Budget
    params: Any
    _derived: dict[Callable[[Setting], Any], Any] = field(default_factory=dict, repr=False)

    def derived(self, make: Callable[[Setting], T]) -> T:
        """``make(self)``, made at the first call and kept."""
        if make not in self._derived:
            self._derived[make] = make(self)
        found: T = self._derived[make]
        return found
