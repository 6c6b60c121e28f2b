"""An expert-parallel layer on one device: each rank's real work in turn, the slowest taken, links added by model.

Axes: S source ranks, R replicas of the layer, G ranks, C copies on one rank, N token rows of one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from moeless.contracts import FloatArray, IntArray, LayerPlan
from moeless.costs.base import CostModel
from moeless.costs.layer_time import LayerTime
from moeless.profiling.experts import Weights, pool_size, random_weights, run_kernel
from moeless.profiling.parts import combine, permute
from moeless.profiling.timing import Call, Effort, measure_in_turn
from moeless.spec import MoESpec

#: Rotating inputs of one rank's work.
TURNS = 6
#: The reference work whose time shows the machine's speed: experts that are active, tokens of each.
REFERENCE = (4, 64)


@dataclass(frozen=True)
class EmulatedLayer:
    """Seconds of one layer, measured and as the cost model predicts them; both with the same exchange.

    Attributes:
        predicted_G: every rank's work as predicted.
        reference: seconds of the reference work, measured in turn with the ranks' own.
    """

    measured_G: FloatArray
    predicted_G: FloatArray
    predicted: LayerTime
    reference: float

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
    def rank_errors(self) -> FloatArray:
        """Predicted over measured time of every rank that works, minus 1: no rank is picked for being slow."""
        busy = self.measured_G > 0
        return np.asarray(self.predicted_G[busy] / self.measured_G[busy] - 1.0)

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
        # other experts in every turn, spread over the pool
        start = turn * max(len(used), self.weights.count // TURNS) % (self.weights.count - len(used) + 1)
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

    def calls(self, counts_C: IntArray) -> list[Call]:
        """The work of a rank that serves ``counts_C`` rows with each of its copies, on rotating inputs."""
        return [self.call(*self.inputs(counts_C, turn)) for turn in range(TURNS)]

    def reference(self) -> list[Call]:
        """Grouped compute of a cell that every profile holds."""
        active, tokens = min(REFERENCE[0], self.weights.count), REFERENCE[1]
        found: list[Call] = []
        for turn in range(TURNS):
            rows, _, part, used = self.inputs(np.full(active, tokens, np.int64), turn)
            found.append(partial(run_kernel(self.kernel, used, part), rows))
        return found


def emulate_layer(
    quota_SR: IntArray, plan: LayerPlan, costs: CostModel, work: RankWork, effort: Effort
) -> EmulatedLayer:
    """Run every rank's share of one layer, in turn and again, and set the cost model's prediction beside it.

    Args:
        quota_SR: tokens of each source rank on each replica, ``[S, R]``.
    """
    tokens_R = quota_SR.sum(0)
    predicted_G = costs.expert_seconds(tokens_R, plan)
    measured_G = np.zeros(len(predicted_G))
    counts_G = [tokens_R[plan.gpu_R == gpu] for gpu in range(len(predicted_G))]
    busy = [gpu for gpu, counts_C in enumerate(counts_G) if counts_C.sum()]
    reference, *samples = measure_in_turn(
        [work.reference(), *(work.calls(counts_G[gpu]) for gpu in busy)], work.device, effort
    )
    measured_G[busy] = [sample.seconds for sample in samples]
    return EmulatedLayer(measured_G, predicted_G, costs.layer_seconds(quota_SR, plan), reference.seconds)
