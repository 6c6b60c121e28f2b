"""An expert-parallel layer on one device: each rank's real work in turn, the slowest taken, links added by model.

Axes: S source ranks, R replicas of the layer, G ranks, C copies on one rank, N token rows of one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moeless.contracts import FloatArray, IntArray, LayerPlan
from moeless.costs.base import CostModel, LayerTime
from moeless.profiling.experts import Weights, pool_size, random_weights, run_kernel
from moeless.profiling.parts import combine, permute
from moeless.profiling.timing import Effort, measure
from moeless.spec import MoESpec

#: Rotating inputs of one rank's work.
TURNS = 4


@dataclass(frozen=True)
class EmulatedLayer:
    """Seconds of one layer, measured and as the cost model predicts them; both with the same exchange."""

    measured_G: FloatArray
    predicted: LayerTime

    @property
    def expert(self) -> float:
        """The slowest rank's work, seconds."""
        return float(self.measured_G.max(initial=0.0))

    @property
    def total(self) -> float:
        """The layer's time with the predicted exchange in it, seconds."""
        return self.expert + self.predicted.total - self.predicted.expert

    @property
    def expert_error(self) -> float:
        """Predicted over measured expert time, minus 1."""
        return self.predicted.expert / self.expert - 1.0

    @property
    def total_error(self) -> float:
        """Predicted over measured layer time, minus 1."""
        return self.predicted.total / self.total - 1.0


class RankWork:
    """What one rank does with the rows that arrive: sort by copy, compute, put back.

    Weights rotate through a pool of twice the cache, as a model's layers would. Rows arrive in random order of copy;
    which copy a row goes to is decided before, so that the time holds no drawing of random numbers.
    """

    def __init__(
        self, spec: MoESpec, kernel: str, dtype: torch.dtype, device: torch.device, most_copies: int, cache: int
    ) -> None:
        self.spec, self.kernel, self.dtype, self.device = spec, kernel, dtype, device
        self.weights = random_weights(spec, pool_size(spec, dtype, most_copies, cache), dtype, device)
        self._generator = torch.Generator(device=device).manual_seed(0)

    def inputs(self, counts_C: IntArray, turn: int) -> tuple[torch.Tensor, torch.Tensor, Weights, list[int]]:
        """Random rows, the copy of each, the copies that have any, and their rows."""
        used = counts_C[counts_C > 0].tolist()
        total = int(sum(used))
        rows = torch.empty(total, self.spec.hidden_size, dtype=self.dtype, device=self.device)
        rows.normal_(generator=self._generator)
        copy_N = torch.repeat_interleave(torch.arange(len(used)), torch.tensor(used)).to(self.device)
        copy_N = copy_N[torch.randperm(total, generator=self._generator, device=self.device)]
        start = (turn * len(used)) % (self.weights.count - len(used) + 1)
        return rows, copy_N, self.weights.slice(start, len(used)), used

    def call(
        self, rows: torch.Tensor, copy_N: torch.Tensor, part: Weights, used: list[int]
    ) -> Callable[[], torch.Tensor]:
        """The rank's work: output rows in the order in which they arrived, each weighted by 1."""
        # the counts come with the control message, before the rows: index tensors are made while those travel
        compute = run_kernel(self.kernel, used, part)
        weight = torch.ones(len(rows), dtype=self.dtype, device=self.device)

        def run() -> torch.Tensor:
            ordered, order = permute(rows, copy_N)
            return combine(compute(ordered), order, weight)

        return run

    def seconds(self, counts_C: IntArray, effort: Effort) -> float:
        """Median time of a rank that serves ``counts_C`` rows with each of its copies."""
        if not counts_C.sum():
            return 0.0
        calls = []
        for turn in range(TURNS):
            rows, copy_N, part, used = self.inputs(counts_C, turn)
            calls.append(self.call(rows, copy_N, part, used))
        return measure(calls, self.device, effort).seconds


def emulate_layer(
    quota_SR: IntArray, plan: LayerPlan, costs: CostModel, work: RankWork, effort: Effort
) -> EmulatedLayer:
    """Run every rank's share of one layer and set the cost model's prediction beside it.

    Args:
        quota_SR: tokens of each source rank on each replica, ``[S, R]``.
    """
    tokens_R = quota_SR.sum(0)
    measured_G = np.array(
        [work.seconds(tokens_R[plan.gpu_R == gpu], effort) for gpu in range(costs.cluster.num_gpus)], np.float64
    )
    return EmulatedLayer(measured_G, costs.layer_seconds(quota_SR, plan))
