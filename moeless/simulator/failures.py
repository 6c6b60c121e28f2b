"""What breaks during a run, and what stands in for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless.contracts import BoolArray, IntArray, LayerPlan
from moeless.errors import RunFailed, UserError


@dataclass(frozen=True)
class Failure:
    """A GPU is lost, or one copy dies; it takes effect when the iteration at that moment ends.

    Attributes:
        seconds: when, since the workload's start.
        gpu: the GPU that is lost, or that held the copy.
        layer, expert: the copy that dies; None for the whole GPU.
        restart_seconds: until a lost GPU is there again, empty.
        detection_seconds: until the others notice and go on.
    """

    seconds: float
    gpu: int
    layer: int | None = None
    expert: int | None = None
    restart_seconds: float = 60.0
    detection_seconds: float = 0.5

    def __post_init__(self) -> None:
        if (self.layer is None) != (self.expert is None):
            raise UserError("a copy's failure needs both its layer and its expert")
        if self.seconds < 0 or self.gpu < 0 or self.restart_seconds <= 0 or self.detection_seconds < 0:
            raise UserError("a failure's times must not be negative, its restart must take time, its GPU must exist")

    @classmethod
    def parse(cls, text: str) -> Failure:
        """Read ``SECONDS:GPU[:RESTART]``.

        Raises:
            UserError: the text has another form.
        """
        parts = text.split(":")
        try:
            if not 2 <= len(parts) <= 3:
                raise ValueError
            seconds, restart = float(parts[0]), float(parts[2]) if len(parts) == 3 else 60.0
            if not (math.isfinite(seconds) and math.isfinite(restart)):
                raise ValueError
            return cls(seconds, int(parts[1]), restart_seconds=restart)
        except ValueError:
            raise UserError(f"--fail-gpu {text!r} is not of the form SECONDS:GPU[:RESTART_SECONDS]") from None


class Outage:
    """Which GPUs are down, and how work moves off them.

    Attributes:
        down_G: lost, given back, or not there yet.
        back_at_G: when each GPU that is down will work.
        closed_G: they work, but requests that begin go elsewhere.
    """

    def __init__(self, num_gpus: int) -> None:
        self.down_G = np.zeros(num_gpus, np.bool_)
        # infinity: nobody knows
        self.back_at_G = np.full(num_gpus, np.inf)
        self.closed_G = np.zeros(num_gpus, np.bool_)
        self._moved: dict[int, int] = {}

    @property
    def down(self) -> bool:
        """Whether any GPU is down."""
        return bool(np.count_nonzero(self.down_G))

    @property
    def alive(self) -> list[int]:
        """GPUs that work."""
        return np.flatnonzero(~self.down_G).tolist()

    def lose(self, gpu: int, back_at: float) -> None:
        """Note a lost GPU.

        Raises:
            RunFailed: it was the last one.
        """
        self.down_G[gpu], self.back_at_G[gpu] = True, back_at
        if not self.alive:
            raise RunFailed("the last GPU was lost: nothing is left to serve with")

    @property
    def next_return(self) -> float:
        """When the first lost GPU is back, infinity where none is."""
        return float(self.back_at_G[self.down_G].min()) if self.down else math.inf

    def returned(self, now: float) -> list[int]:
        """GPUs that are back by ``now``, from here on counted as working."""
        if not self.down:
            return []
        back = np.flatnonzero(self.down_G & (self.back_at_G <= now)).tolist()
        self.down_G[back] = False
        return back

    def evacuate(self, plan: LayerPlan, leaving_G: BoolArray | None = None) -> LayerPlan:
        """The plan without the lost GPUs and those that are ``leaving_G``.

        Their extras go, their primaries move to the survivor with fewest copies. An expert that keeps another copy
        makes that one its primary. Of shares fixed ahead, a lost copy's go to those that are left in proportion to
        theirs, or to the primary where these have none.
        """
        gone_G = self.down_G if leaving_G is None else self.down_G | leaving_G
        if not gone_G.any():
            return plan
        lost_R = gone_G[plan.gpu_R]
        if not lost_R.any():
            return plan
        num_experts = int(plan.expert_R.max()) + 1
        expert, gpu = plan.expert_R[~lost_R].tolist(), plan.gpu_R[~lost_R].tolist()
        primary = plan.primary_R[~lost_R].tolist()
        headed = {e for e, first in zip(expert, primary, strict=True) if first}
        for place, e in enumerate(expert):
            if e not in headed:
                primary[place] = True
                headed.add(e)
        count = {g: gpu.count(g) for g in np.flatnonzero(~gone_G).tolist()}
        for e in range(num_experts):
            if e not in headed:
                home = min(count, key=lambda g: (count[g], g))
                count[home] += 1
                expert.append(e)
                gpu.append(home)
                primary.append(True)
        share = None
        if plan.share_R is not None:
            kept = np.concatenate([plan.share_R[~lost_R], np.zeros(len(expert) - int((~lost_R).sum()))])
            whole_E = np.bincount(expert, weights=kept, minlength=num_experts)
            alone = whole_E[expert] <= 0.0
            share = np.where(alone, np.array(primary, np.float64), kept / np.where(alone, 1.0, whole_E[expert]))
        return LayerPlan.build(
            plan.layer, expert, gpu, primary, num_experts=num_experts, num_gpus=len(self.back_at_G), share_R=share
        )

    def owners(self, rank_N: IntArray, request_N: IntArray, begins_N: BoolArray | None = None) -> IntArray:
        """Where each request's KV cache is: its scheduler's rank, unless it had to move once.

        A request whose rank is down moves for good, to the working GPU at its id modulo their number; so does one that
        ``begins_N`` and whose rank is closed.
        """
        if not self.down and not self._moved and not np.count_nonzero(self.closed_G):
            return rank_N
        owner_N = rank_N.copy()
        open_ones = np.flatnonzero(~self.down_G & ~self.closed_G).tolist() or self.alive
        begins = [False] * len(request_N) if begins_N is None else begins_N.tolist()
        for place, request in enumerate(request_N.tolist()):
            owner = self._moved.get(request, int(rank_N[place]))
            if self.down_G[owner] or (begins[place] and self.closed_G[owner]):
                owner = self._moved[request] = open_ones[request % len(open_ones)]
            owner_N[place] = owner
        return owner_N


def without_extras(plan: LayerPlan) -> LayerPlan:
    """A plan's primaries."""
    first_R = plan.primary_R
    return LayerPlan(plan.layer, plan.expert_R[first_R], plan.gpu_R[first_R], first_R[first_R])


def check_failures(failures: Sequence[Failure], num_gpus: int) -> list[Failure]:
    """Failures in order of time.

    Raises:
        UserError: one names a GPU that the cluster does not have.
    """
    for failure in failures:
        if failure.gpu >= num_gpus:
            raise UserError(f"GPU {failure.gpu} is to fail, but the cluster has GPUs 0 to {num_gpus - 1}")
    return sorted(failures, key=lambda failure: failure.seconds)
