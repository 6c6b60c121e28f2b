"""Forecasts of layer l + d from the expert ids of layer l alone, for traces and engines without gate inputs.

A token's ids say much about its next experts; the ids of all tokens of the iteration together say what the texts are
about, which single tokens do not show. The logits of a token are

    b + W x + U relu(c + V x + S m) + A relu(a + B m)

with x the token's ids (one mark per expert among its best 1, its best half and all its K) and m the iteration's mean
marks less the training mean, shrunk by T / (T + 64) so that small iterations are not led by chance.

Axes: T tokens, E experts, K experts per token, X marks, F hidden units, L layers, D distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.predictors.base import not_fitted
from moeless.predictors.router import RouterRule
from moeless.predictors.token_level import TokenLevel
from moeless.predictors.variance import Variance
from moeless.spec import MoESpec

if TYPE_CHECKING:
    from moeless.predictors.fitting import FitInput

#: Tokens at which an iteration's mean is trusted half.
SHRINK_TOKENS = 64.0
#: Scale of the mean's deviations, so that they are of the size of a mark.
MEAN_SCALE = 4.0
NAMES = ("direct", "bias", "inner", "inner_bias", "mean_inner", "outer", "mean_first", "mean_bias", "mean_second")


def cuts(top_k: int) -> tuple[int, ...]:
    """How many of a token's best experts each block of marks covers."""
    return tuple(sorted({1, max(1, top_k // 2), top_k}))


def marks(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Marks ``[..., X]`` of expert ids ``[..., K]`` in the gate's order; the last E cover all K."""
    top_k = ids.shape[-1]
    blocks = []
    for cut in cuts(top_k):
        block = torch.zeros(*ids.shape[:-1], num_experts, device=ids.device)
        blocks.append(block.scatter_(-1, ids[..., :cut], 1.0))
    return torch.cat(blocks, -1)


def iteration_mean(mark_TX: torch.Tensor, mean_E: torch.Tensor) -> torch.Tensor:
    """Shrunk deviation ``[..., 1, E]`` of an iteration's mean marks from the training mean ``[..., E]``."""
    experts = mean_E.shape[-1]
    tokens = mark_TX.shape[-2]
    deviation = mark_TX[..., -experts:].mean(-2) - mean_E
    return (deviation * (MEAN_SCALE * tokens / (tokens + SHRINK_TOKENS))).unsqueeze(-2)


class Transition(TokenLevel):
    """Fitted tables and small networks, one per (layer, distance)."""

    name = "transition"
    needs_fitting = True
    reads = "topk"
    counting = "probability"
    batch_context = True

    def __init__(
        self,
        spec: MoESpec,
        state: Mapping[str, NDArray[Any]] | None = None,
        distances: Sequence[int] = (),
        variance: Mapping[tuple[int, int], Variance] | None = None,
    ) -> None:
        if state is None:
            raise not_fitted(self.name)
        super().__init__(spec, RouterRule("softmax"), variance or {})
        self.distances = tuple(distances)
        self._column = {d: index for index, d in enumerate(self.distances)}
        self._state = {name: array.astype(np.float16) for name, array in state.items()}
        self._tensor = {name: torch.from_numpy(array.astype(np.float32)) for name, array in self._state.items()}

    @classmethod
    def fit(cls, given: FitInput) -> Transition:
        """Fit on a trace; see :func:`moeless.predictors.fit_transition.fit_transition`."""
        from moeless.predictors.fit_transition import fit_transition

        return fit_transition(given)

    def covers(self, layer: int, distance: int) -> bool:
        """Fitted pairs."""
        return layer >= 0 and distance in self._column and layer + distance < self.spec.L

    def scores(self, input_TX: torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """Logits ``[T, E]``; they depend on all tokens given."""
        at = layer, self._column[distance]
        part = {name: self._tensor[name][at].to(input_TX.device) for name in NAMES}
        mark_TX = marks(input_TX, self.spec.E)
        mean = iteration_mean(mark_TX, self._tensor["mean"][layer].to(input_TX.device))
        inner = (part["inner_bias"] + mean @ part["mean_inner"] + mark_TX @ part["inner"]).relu()
        shared = (part["mean_bias"] + mean @ part["mean_first"]).relu() @ part["mean_second"]
        return part["bias"] + mark_TX @ part["direct"] + inner @ part["outer"] + shared

    def settings(self) -> dict[str, Any]:
        """Distances and variances."""
        return {"distances": list(self.distances), "variance": self.variance_json()}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The fitted arrays."""
        return dict(self._state)

    @classmethod
    def from_state(cls, spec: MoESpec, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild."""
        if missing := {*NAMES, "mean"} - set(tensors):
            raise KeyError(missing.pop())
        return cls(spec, tensors, settings["distances"], cls.variance_from_json(settings["variance"]))
