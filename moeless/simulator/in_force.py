"""The plan in force of each layer, for Python as a list and for compiled loops as padded rows.

Axes: L layers, R replicas (padded).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from moeless.contracts import LayerPlan
from moeless.simulator.plan_rows import Plans, room_for


class PlansInForce(Sequence[LayerPlan]):
    """A sequence of plans that may be assigned to; each form is made from the other when it is asked for.

    Args:
        plans: one of each layer, in order.
        widest: replicas that compiled loops may want a row to hold.
        shares: whether compiled loops may fix shares.
    """

    def __init__(self, plans: Sequence[LayerPlan], widest: int, shares: bool = False) -> None:
        self._list = list(plans)
        self._widest, self._shares = widest, shares
        self._rows: Plans | None = None
        self._list_is_old = False

    def __len__(self) -> int:
        return len(self._list)

    @overload
    def __getitem__(self, index: int) -> LayerPlan: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerPlan]: ...
    def __getitem__(self, index: int | slice) -> LayerPlan | list[LayerPlan]:
        return self._as_list()[index]

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self._as_list())

    def __setitem__(self, layer: int, plan: LayerPlan) -> None:
        self._as_list()[layer] = plan
        self._rows = None

    def _as_list(self) -> list[LayerPlan]:
        if self._list_is_old:
            assert self._rows is not None
            expert_LR, gpu_LR, primary_LR, count_L, share_LR, fixed_L = self._rows
            # copies: the rows go on changing
            self._list = [
                LayerPlan(
                    layer,
                    expert_LR[layer, :n].copy(),
                    gpu_LR[layer, :n].copy(),
                    primary_LR[layer, :n].copy(),
                    share_LR[layer, :n].copy() if fixed_L[layer] else None,
                )
                for layer, n in enumerate(count_L.tolist())
            ]
            self._list_is_old = False
        return self._list

    def rows(self) -> Plans:
        """The plans as padded rows; whoever changes them says so by :meth:`changed`."""
        if self._rows is None:
            widest = max(self._widest, max(plan.R for plan in self._list))
            fixed = self._shares or any(plan.share_R is not None for plan in self._list)
            self._rows = room_for(len(self._list), widest, fixed)
            for layer, plan in enumerate(self._list):
                self._rows.count_L[layer] = plan.R
                for row_LR, copies_R in zip(self._rows[:3], (plan.expert_R, plan.gpu_R, plan.primary_R), strict=True):
                    row_LR[layer, : plan.R] = copies_R
                if plan.share_R is not None:
                    self._rows.fixed_L[layer] = True
                    self._rows.share_LR[layer, : plan.R] = plan.share_R
        return self._rows

    def changed(self) -> None:
        """The rows are newer than the list."""
        self._list_is_old = True
